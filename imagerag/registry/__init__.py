"""The model registry: model versions in MLflow that pin everything their pictures depend on."""
