"""One Prefect task a stage: retries, progress, one call into `imagerag`."""

DISTRIBUTION = "imagerag-turbo"
"""Whose package of this name it is: others have one, too."""
