"""The deepest features of the denoiser: what a reference picture is turned into and where it is fused."""
