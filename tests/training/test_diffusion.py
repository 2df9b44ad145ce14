import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from imagerag.recipes.tiny_base.teacher import build_scheduler
from imagerag.training.diffusion import Diffusion


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_latent_comes_back(prediction_type: str) -> None:
    diffusion = Diffusion(EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))
    latents, noise = torch.randn(2, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    noised = diffusion.add_noise(latents, noise, timesteps)
    velocity = diffusion.velocity(latents, noise, timesteps)
    prediction = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    assert torch.allclose(diffusion.to_clean(prediction, noised, timesteps), latents, atol=1e-3)


def test_one_step_is_what_the_scheduler_makes_of_it() -> None:
    """Training and the pipeline must mean the same picture by one prediction."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(1)
    noise, prediction = torch.randn(2, 3, 4, 16, 16)
    stepped = scheduler.step(prediction, scheduler.timesteps[0], noise * scheduler.init_noise_sigma).prev_sample
    diffusion = Diffusion(scheduler)
    assert int(scheduler.timesteps[0]) == diffusion.last
    last = torch.full((3,), diffusion.last)
    assert torch.allclose(diffusion.to_clean(prediction, noise, last), stepped, atol=1e-2)
    assert torch.allclose(stepped, -prediction, atol=1e-2), "at T there is nothing but noise"


def test_another_kind_of_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon, v_prediction or sample, not flow"):
        Diffusion(DDIMScheduler(prediction_type="flow"))


def test_it_noises_as_the_scheduler_does() -> None:
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    expected = scheduler.add_noise(latents, noise, timesteps)
    assert torch.equal(Diffusion(scheduler).add_noise(latents, noise, timesteps), expected)
