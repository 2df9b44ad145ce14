"""Load the results of a fine-tuning onto its base model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from imagerag.errors import UserError

if TYPE_CHECKING:
    from imagerag.base.model import BaseModel
    from imagerag.hspace.adapter import HSpaceAdapter

ADAPTER, LORA = "adapter", "lora"
"""Subfolders of a fine-tuning's folder."""
MANIFEST = "finetune.json"


def load_finetuned(folder: Path, base: "BaseModel") -> "HSpaceAdapter":
    """Load an adapter, and attach its LoRA, if there is one, to the base model's UNet.

    Args:
        folder: folder that `imagerag finetune` wrote, or the folder of an adapter alone.
        base: base model that the adapter was trained for.

    Raises:
        UserError: if the folder has no adapter, or one for another base model.
    """
    from imagerag.hspace.adapter import load_adapter
    from imagerag.hspace.lora import load_lora

    if not (folder / ADAPTER).is_dir():
        return load_adapter(folder, base.unet)
    if (folder / MANIFEST).is_file():
        made_for = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["finetuned"]
        if made_for["base_digest"] != base.identity.digest:
            raise UserError(
                f"the adapter in {folder} was trained for {made_for['base']} (digest {made_for['base_digest']}), not "
                f"for {base.identity.id} (digest {base.identity.digest})"
            )
    adapter = load_adapter(folder / ADAPTER, base.unet)
    if (folder / LORA).is_dir():
        load_lora(base.unet, folder / LORA)
    return adapter
