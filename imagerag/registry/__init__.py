"""The model registry: versions that pin all that their pictures depend on, kept by MLflow."""
