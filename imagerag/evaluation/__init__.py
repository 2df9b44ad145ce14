"""Evaluation of generated pictures, by networks that are independent of generation and retrieval."""
