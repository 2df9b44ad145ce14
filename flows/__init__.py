"""Prefect flows: composition only, one a file."""

DISTRIBUTION = "imagerag-turbo"
"""Whose package of this name it is: others have one, too."""
