"""Base models and the pipeline that makes pictures with them."""
