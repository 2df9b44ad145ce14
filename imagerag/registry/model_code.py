"""Code that MLflow runs to create the model ("models from code"), copied into each version's folder."""

from mlflow.models import set_model

from imagerag.registry.serving import ImageRAGTurboModel

set_model(ImageRAGTurboModel())
