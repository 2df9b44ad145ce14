"""Latent adversarial distillation: discriminator, losses and loop of both base and adapter."""
