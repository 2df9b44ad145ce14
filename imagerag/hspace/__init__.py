"""The H-space, the denoiser's deepest features: encoding of references and their fusion."""
