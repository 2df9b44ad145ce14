"""The trainable one-step generator with references (paper, Sec. 3.3 and 3.4).

Only the adapter and the LoRA on the UNet decoder are trainable. The UNet encoder runs without gradients, and the
features of the references come from the cache.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

from imagerag.base.text import LCM_GUIDANCE, embed_guidance
from imagerag.hspace.adapter import HSpaceAdapter, gate
from imagerag.hspace.lora import LORA_NAME, save_lora
from imagerag.hspace.split import decode, encode
from imagerag.training.data import RagBatch
from imagerag.training.diffusion import Diffusion

_DECODER_LAYERS = r"up_blocks\..*\.(to_q|to_k|to_v|to_out\.0|conv1|conv2|conv_shortcut)"


class Generator(nn.Module):
    """The student with its adapter; `forward` generates clean latents from noise in one step."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: HSpaceAdapter,
        diffusion: Diffusion,
        *,
        lora_rank: int,
        learn_adapter: bool = True,
    ) -> None:
        """Freeze `unet` and attach a float32 LoRA to its decoder.

        Args:
            unet: the student's UNet, changed in place.
            adapter: the H-space adapter.
            diffusion: the student's diffusion process.
            lora_rank: rank of the LoRA; 0 attaches none.
            learn_adapter: whether the adapter is trainable.
        """
        super().__init__()
        self.unet = unet.eval().requires_grad_(False)
        self.adapter = adapter.train().requires_grad_(learn_adapter)
        self.diffusion = diffusion
        if lora_rank:
            lora = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=_DECODER_LAYERS)
            self.unet.add_adapter(lora, adapter_name=LORA_NAME)
            cast_training_params(self.unet, torch.float32)

    def forward(self, batch: RagBatch, scale: float = 1.0) -> torch.Tensor:
        """Return the predicted clean latents `z_hat_0` (B, C, H, W), with the adapter's output scaled by `scale`."""
        last = torch.full((len(batch.noise),), self.diffusion.last, device=batch.noise.device)
        with torch.no_grad():
            noised = self.diffusion.add_noise(torch.zeros_like(batch.noise), batch.noise, last)  # z_T
            guidance = embed_guidance(self.unet, LCM_GUIDANCE)  # as in the pipeline
            target = encode(
                self.unet,
                noised,
                last,
                batch.text,
                timestep_cond=None if guidance is None else guidance.to(batch.text),
                added_cond_kwargs=batch.added,
            )
        h = self.adapter(target.h, batch.h_references, gate(batch.similarities, 0.0), scale).sample
        prediction = decode(self.unet, replace(target, h=h))
        # In float32: with epsilon prediction, the conversion to z_0 amplifies errors about 15 times.
        return self.diffusion.to_clean(prediction.float(), noised, last)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the adapter; the UNet stays in evaluation mode."""
        super().train(mode)
        self.unet.eval()
        return self

    def save_lora(self, folder: Path) -> None:
        """Write the LoRA weights in diffusers' format, for `load_lora`."""
        save_lora(self.unet, folder)

    def learning(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable parameters with their names."""
        return ((name, each) for name, each in self.named_parameters() if each.requires_grad)
