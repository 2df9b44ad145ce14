"""Prefect flows: composition only, one a file."""
