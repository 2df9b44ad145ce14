"""The ways of making pictures that an evaluation compares, and the inputs of each."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec

from imagerag.artifacts import Deployed, Finetuned, IndexVersion
from imagerag.base.files import PAPERS_W, resolve
from imagerag.errors import UserError
from imagerag.evaluation.compare import teacher_guidance
from imagerag.evaluation.config import EvaluateConfig, WayName
from imagerag.generation.finetuned import ADAPTER, LORA
from imagerag.retrieval.store import Store
from imagerag.storage.files import read_json

_NUM_REFERENCES = 4
_NOT_IN_KEY = ("name", "title", "base", "adapter", "is_column", "curve", "index")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One column of the comparison, or one point of a curve."""

    name: str
    title: str
    base: str
    base_digest: str
    fusion: str = "none"
    num_references: int = 0
    index: IndexVersion | None = None
    """The index version that references come from."""
    is_random: bool = False
    """Whether references are random rows of the index instead of retrieved ones."""
    w: float = PAPERS_W
    adapter_scale: float = 1.0
    steps: int = 1
    guidance: float = 0.0
    adapter: str | None = None
    """URI of the folder with the trained adapter and LoRA."""
    adapter_digest: str | None = None
    is_column: bool = True
    """Whether this way has a column with all metrics; otherwise it is only a point of its curve."""
    curve: str = ""
    """The curve that this way is a point of: `slerp` over w, `adapter` over scale, or none."""

    @property
    def setting(self) -> float:
        """The value on the curve: w or the adapter's scale."""
        return self.w if self.curve == "slerp" else self.adapter_scale

    def key(self) -> dict[str, Any]:
        """Return everything that the pictures depend on apart from prompt and seed."""
        own = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_KEY}
        return own | ({"index": self.index.key} if self.index is not None else {})


def ways_of(
    config: EvaluateConfig, finetuned: Finetuned, teacher: str, index: IndexVersion, champion: Deployed | None
) -> list[Way]:
    """Return the configured ways, then the curve points that are not among them.

    `best_slerp` is not included: it is composed later from the pictures of slerp's curve.

    Args:
        config: the configured ways and their parameters.
        finetuned: the candidate.
        teacher: spec of the candidate's teacher.
        index: the index version that references come from.
        champion: the current champion, if there is one; it keeps its own index version.

    Raises:
        UserError: if `config.num_references` exceeds the index's rows.
    """
    base: dict[str, Any] = {"base": finetuned.base, "base_digest": finetuned.base_digest}
    k = config.num_references
    guidance = teacher_guidance(teacher) if config.teacher_guidance is None else config.teacher_guidance
    w = resolve(finetuned.base).slerp_w if config.slerp_w is None else config.slerp_w
    slerp = Way(
        name="slerp", title=f"slerp, w = {w}", fusion="slerp", num_references=_number(k, 1, index), w=w, curve="slerp",
        index=index, **base,
    )  # fmt: skip
    adapter = Way(
        name="adapter", title="adapter", num_references=_number(k, _NUM_REFERENCES, index), curve="adapter",
        index=index, **base, **_trained(finetuned.uri),
    )  # fmt: skip
    made: dict[WayName, Way] = {
        "base": Way(name="base", title="base", **base),
        "slerp": slerp,
        "adapter": adapter,
        "random": replace(adapter, name="random", title="adapter, random references", is_random=True, curve=""),
        "no_references": replace(
            adapter, name="no_references", title="adapter, no references", num_references=0, index=None, curve=""
        ),
    }
    if champion is not None:
        made["champion"] = replace(
            adapter, name="champion", title=f"champion, with its index's version {champion.index.version}",
            index=champion.index, num_references=_number(k, _NUM_REFERENCES, champion.index), curve="",
            **_trained(champion.folder),
        )  # fmt: skip
    if "teacher" in config.ways:
        made["teacher"] = Way(
            name="teacher", title="teacher", base=teacher, base_digest=resolve(teacher).identity.digest,
            steps=config.teacher_steps, guidance=guidance,
        )  # fmt: skip
    columns = [made[name] for name in config.ways if name in made]
    return [*columns, *(point for point in _points(config, slerp, adapter) if point.key() not in _keys(columns))]


def _number(asked: int | None, default: int, index: IndexVersion) -> int:
    """Return the number of references per picture; the default is limited to the index's rows.

    Raises:
        UserError: if `asked` exceeds the index's rows.
    """
    rows = int(Store(index.uri, index.name).dataset(index.version).count_rows())
    if asked is not None and asked > rows:
        raise UserError(f"num_references can't be more than the index has rows: {asked} of {rows} in {index.name!r}")
    return min(default, rows) if asked is None else asked


def _points(config: EvaluateConfig, slerp: Way, adapter: Way) -> Iterator[Way]:
    for w in dict.fromkeys(config.slerp_ws):
        yield replace(slerp, name=f"slerp, w = {w}", title=f"slerp, w = {w}", w=w, is_column=False)
    for scale in dict.fromkeys(config.adapter_scales):
        title = f"adapter, scale {scale}"
        yield replace(adapter, name=title, title=title, adapter_scale=scale, is_column=False)


def _keys(ways: list[Way]) -> list[dict[str, Any]]:
    return [way.key() for way in ways]


def _trained(folder: str) -> dict[str, Any]:
    """Return the fields of a way that uses the adapter in `folder` at its default scale, as when deployed."""
    config = read_json(f"{folder}/{ADAPTER}/config.json") or {}
    return {
        "fusion": "adapter",
        "adapter": folder,
        "adapter_digest": digest_of_weights(folder),
        "adapter_scale": config.get("default_scale", 1.0),
    }


def digest_of_weights(folder: str) -> str:
    """Return the SHA-256 of an adapter and its LoRA."""
    filesystem, root = fsspec.url_to_fs(folder)
    digest = hashlib.sha256()
    for part in (ADAPTER, LORA):
        for path in sorted(filesystem.glob(f"{root}/{part}/*")):
            digest.update(f"{part}/{path.rsplit('/', 1)[1]}\0".encode())
            digest.update(filesystem.cat_file(path))
    return digest.hexdigest()
