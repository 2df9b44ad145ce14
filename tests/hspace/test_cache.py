"""The cached-features job."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from imagerag.base.files import resolve
from imagerag.base.model import load_base
from imagerag.errors import UserError
from imagerag.hspace.cache import cache_features, identities_of
from imagerag.hspace.config import FeaturesConfig
from imagerag.hspace.encode import encode_references, feature_identity, open_images
from imagerag.retrieval import feature_column
from imagerag.retrieval.schema import Fit
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.storage.lance_table import CommitConflictError
from tests.devices import DEVICES
from tests.generation.folders import write_sd
from tests.retrieval.rows import ENCODER, append, make_rows

pytestmark = pytest.mark.usefixtures("jobs_here")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sd(tmp_path_factory.mktemp("base")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "index"), "images")
    store.open_or_create(ENCODER)
    append(store, make_rows(0, 20))
    append(store, make_rows(20, 30))
    return store


def config(base: str, device: Literal["cpu", "cuda"] = "cpu", fit: Fit | None = None) -> FeaturesConfig:
    return FeaturesConfig(base=base, device=device, dtype="fp32", batch_size=8, fit=fit, commit_every_s=0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_has_what_the_base_model_makes_of_it(
    store: Store, base: str, tmp_path: Path, device: Literal["cpu", "cuda"]
) -> None:
    settings = Settings(home=tmp_path)
    reports: list[tuple[int, int, str]] = []
    done = cache_features(store, config(base, device), settings, lambda *report: reports.append(report))
    assert (done.num_rows, done.num_added) == (30, 30)
    assert reports[-1] == (30, 30, "encoded")

    loaded = load_base(base, device="cpu")
    identity = feature_identity(loaded.identity, loaded.unet.config, "auto")
    assert done.features_digest == identity.digest
    table = store.dataset(done.version).to_table(columns=["image", "caption", identity.column])
    images, captions = open_images(table["image"].to_pylist()), table["caption"].to_pylist()
    expected = encode_references(loaded.vae, loaded.unet, loaded.conditioner, images, captions, "auto")
    cached = np.stack([own for own in feature_column.to_features(table[identity.column], identity) if own is not None])
    tolerance = 2e-3 if device == "cpu" else 1e-2  # a GPU convolves in TF32
    assert torch.allclose(torch.from_numpy(cached).float(), expected, atol=tolerance * float(expected.abs().max()))

    version = store.version
    refusing = Settings(home=tmp_path, ray_address="nowhere:1")
    assert cache_features(store, config(base), refusing).num_added == 0, "where nothing is missing nothing is started"
    assert store.version == version


def test_a_job_that_dies_keeps_what_it_committed(
    store: Store, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[Sequence[str]] = []

    def dying(store: Store, filled: Sequence[str], version: int) -> int:
        if committed:
            raise CommitConflictError("as if another writer had come")
        committed.append(filled)
        return commit(store, filled, version)

    commit = feature_column.commit
    with monkeypatch.context() as patch:
        patch.setattr(feature_column, "commit", dying)
        with pytest.raises(CommitConflictError):
            cache_features(store, config(base), Settings(home=tmp_path))
    rest = cache_features(store, config(base), Settings(home=tmp_path))
    assert rest.num_added in (10, 20), "one fragment of two was committed"


def test_a_wrong_base_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a base model is `tiny`"):
        FeaturesConfig(base="no such thing")
    with pytest.raises(UserError, match="does not exist"):
        cache_features(
            Store(str(tmp_path), "none"), FeaturesConfig(base=str(tmp_path / "gone")), Settings(home=tmp_path)
        )


def test_pictures_are_fitted_as_before_unless_another_fit_is_asked_for(store: Store, base: str, tmp_path: Path) -> None:
    of_each = identities_of(resolve(base))
    cropped, padded = of_each["crop"], of_each["pad"]
    stranger = replace(cropped, base="stranger", digest="0" * 64)
    former = replace(cropped, digest="1" * 64)  # of other weights in the same folder
    for each in (stranger, former, cropped):
        feature_column.prepare(store, each)
    version = store.version
    for fragment, size in feature_column.missing(store.dataset(), cropped).items():
        zeros = np.zeros((size, *cropped.shape), np.float16)
        feature_column.commit(
            store, [feature_column.fill(store, cropped, version, fragment, lambda *_, z=zeros: z, size)], version
        )

    refusing = Settings(home=tmp_path, ray_address="nowhere:1")
    kept = cache_features(store, config(base), refusing)
    assert (kept.num_added, kept.fit, kept.features_digest) == (0, "crop", cropped.digest)
    assert feature_column.cached_features(store.dataset().schema) == [stranger, cropped]
    made = cache_features(store, config(base, fit="pad"), Settings(home=tmp_path))
    assert (made.num_added, made.fit, made.features_digest) == (30, "pad", padded.digest)
    assert feature_column.cached_features(store.dataset().schema) == [stranger, padded]
    assert feature_column.cached_features(store.dataset(kept.version).schema) == [stranger, cropped], (
        "what readers may be on"
    )
    assert cache_features(store, config(base), refusing).fit == "pad"
