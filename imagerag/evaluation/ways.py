"""The ways to make pictures that an evaluation compares, and what the pictures of each depend on."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import fsspec

from imagerag.artifacts import Finetuned
from imagerag.evaluation.compare import TEACHER_GUIDANCE
from imagerag.evaluation.config import EvaluateConfig, WayName
from imagerag.generation.finetuned import ADAPTER, LORA
from imagerag.generation.spec import PAPERS_W, resolve

_PAPERS_GUIDANCE = 7.5
_NUM_REFERENCES = 4


@dataclass(frozen=True, kw_only=True)
class Way:
    """One column of the comparison."""

    name: WayName
    title: str
    base: str
    base_digest: str
    fusion: str = "none"
    num_references: int = 0
    is_random: bool = False
    """Whether references are any rows of the index, rather than those that a search finds."""
    w: float = PAPERS_W
    steps: int = 1
    guidance: float = 0.0
    adapter: str | None = None
    """The folder of what was trained."""
    adapter_digest: str | None = None

    def key(self, index: dict[str, Any]) -> dict[str, Any]:
        """Return all that its pictures depend on, beside prompt and seed."""
        own = {name: value for name, value in asdict(self).items() if name not in ("name", "title", "base", "adapter")}
        return own | ({"index": index} if self.num_references else {})


def ways_of(config: EvaluateConfig, finetuned: Finetuned, teacher: str, champion: str | None) -> list[Way]:
    """Return the ways that are asked for.

    Args:
        config: which.
        finetuned: the candidate.
        teacher: its teacher.
        champion: the folder of the present champion, if there is one.
    """
    own: dict[str, Any] = {"base": finetuned.base, "base_digest": finetuned.base_digest}
    k = config.num_references
    trained = _trained(finetuned.uri)
    w = resolve(finetuned.base).slerp_w if config.slerp_w is None else config.slerp_w
    guidance = config.teacher_guidance
    if guidance is None:
        guidance = TEACHER_GUIDANCE.get(teacher, _PAPERS_GUIDANCE)
    made: dict[WayName, Way] = {
        "base": Way(name="base", title="base", **own),
        "slerp": Way(
            name="slerp", title=f"slerp, w = {w}", fusion="slerp", num_references=k or 1, w=w, **own,
        ),
        "adapter": Way(name="adapter", title="adapter", num_references=k or _NUM_REFERENCES, **own, **trained),
        "random": Way(
            name="random", title="adapter, random references", num_references=k or _NUM_REFERENCES, is_random=True,
            **own, **trained,
        ),
        "no_references": Way(name="no_references", title="adapter, no references", **own, **trained),
    }  # fmt: skip
    if champion is not None:
        made["champion"] = Way(
            name="champion", title="champion", num_references=k or _NUM_REFERENCES, **own, **_trained(champion)
        )
    if "teacher" in config.ways:
        made["teacher"] = Way(
            name="teacher", title="teacher", base=teacher, base_digest=resolve(teacher).identity.digest,
            steps=config.teacher_steps, guidance=guidance,
        )  # fmt: skip
    return [made[name] for name in config.ways if name in made]


def _trained(folder: str) -> dict[str, Any]:
    return {"fusion": "adapter", "adapter": folder, "adapter_digest": digest_of_weights(folder)}


def digest_of_weights(folder: str) -> str:
    """Return the SHA-256 of an adapter and its LoRA."""
    filesystem, root = fsspec.url_to_fs(folder)
    digest = hashlib.sha256()
    for part in (ADAPTER, LORA):
        for path in sorted(filesystem.glob(f"{root}/{part}/*")):
            digest.update(f"{part}/{path.rsplit('/', 1)[1]}\0".encode())
            digest.update(filesystem.cat_file(path))
    return digest.hexdigest()
