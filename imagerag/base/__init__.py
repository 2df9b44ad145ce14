"""Base models: their files and digests, their parts, and the encoding of prompts."""
