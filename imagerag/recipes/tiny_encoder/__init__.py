"""The recipe of the embedded encoder `tiny`."""
