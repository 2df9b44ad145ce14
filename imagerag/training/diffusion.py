"""The diffusion process of a scheduler for training: differentiable, at any timestep."""

import torch
from diffusers import DDPMScheduler, SchedulerMixin


class Diffusion:
    """Variance-preserving diffusion z_t = alpha_t z_0 + sigma_t eps, and the conversion of predictions to z_0."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        """Read the betas and the prediction type from `scheduler`'s configuration.

        Raises:
            ValueError: if the prediction type is not epsilon, v_prediction or sample.
        """
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"a UNet predicts epsilon, v_prediction or sample, not {self.prediction_type}")
        self.num_timesteps: int = self.scheduler.config.num_train_timesteps

    @property
    def last(self) -> int:
        """The timestep T of pure noise."""
        return self.num_timesteps - 1

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return z_t (B, C, H, W) for z_0 = `latents` and `noise` (B, C, H, W) at `timesteps` (B,)."""
        noised: torch.Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noised

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return v = alpha_t eps - sigma_t z_0 (arXiv 2202.00512)."""
        velocity: torch.Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def to_clean(self, prediction: torch.Tensor, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return z_0 (B, C, H, W) from the UNet's `prediction` at z_t = `noised` and `timesteps` (B,)."""
        if self.prediction_type == "sample":
            return prediction
        product = self.scheduler.alphas_cumprod.to(prediction.device)[timesteps].view(-1, 1, 1, 1)
        alpha: torch.Tensor = product.sqrt()
        sigma: torch.Tensor = (1 - product).sqrt()
        if self.prediction_type == "v_prediction":
            return alpha * noised - sigma * prediction
        return (noised - sigma * prediction) / alpha
