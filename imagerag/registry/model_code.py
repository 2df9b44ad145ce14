"""What MLflow runs to make the model ("models from code"): it copies this file into each version's folder."""

from mlflow.models import set_model

from imagerag.registry.serving import ImageRAGTurboModel

set_model(ImageRAGTurboModel())
