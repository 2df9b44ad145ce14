"""The recipe of the embedded base model `tiny`."""
