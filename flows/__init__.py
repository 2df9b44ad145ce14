"""Prefect flows: one per file, composed of tasks."""

DISTRIBUTION = "imagerag-turbo"
"""Distribution that this package belongs to: other distributions may have a package of the same name."""
