"""The diffusion process behind a scheduler, as training needs it: differentiable and for any timestep."""

import torch
from diffusers import DDPMScheduler, SchedulerMixin


class Diffusion:
    """Variance-preserving noising z_t = alpha_t z_0 + sigma_t eps, and its inverse for each kind of prediction."""

    def __init__(self, scheduler: SchedulerMixin) -> None:
        """Take betas and the kind of prediction from `scheduler`'s configuration.

        Raises:
            ValueError: if its UNet predicts neither epsilon, nor v, nor the sample.
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
        """Return z_t (B, C, H, W) of z_0 = `latents`, one timestep (B,) each."""
        noised: torch.Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noised

    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return v = alpha_t eps - sigma_t z_0 (arXiv 2202.00512)."""
        velocity: torch.Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def to_clean(self, prediction: torch.Tensor, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the z_0 that the UNet's `prediction` at z_t = `noised` implies."""
        if self.prediction_type == "sample":
            return prediction
        product = self.scheduler.alphas_cumprod.to(prediction.device)[timesteps].view(-1, 1, 1, 1)
        alpha: torch.Tensor = product.sqrt()
        sigma: torch.Tensor = (1 - product).sqrt()
        if self.prediction_type == "v_prediction":
            return alpha * noised - sigma * prediction
        return (noised - sigma * prediction) / alpha
