"""Prefect tasks, one per stage: retries, progress and one call into `imagerag`."""

DISTRIBUTION = "imagerag-turbo"
"""Distribution that this package belongs to: other distributions may have a package of the same name."""
