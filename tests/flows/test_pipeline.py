"""`pipeline` from a list of URLs to a registered model, with every engine real and a small base model."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from pydantic import ValidationError

from flows.parameters import PipelineParameters
from flows.pipeline import pipeline
from imagerag.embedded.sample.server import SampleServer
from imagerag.evaluation.config import EvaluateConfig, GateConfig, MetricFiles
from imagerag.hspace.config import FeaturesConfig
from imagerag.registry.versions import list_versions
from imagerag.retrieval.publish import status
from imagerag.retrieval.store import Store
from imagerag.settings import Settings
from imagerag.training.config import (
    FinetuneConfig,
    LossWeights,
    ReferenceChoice,
    SynthesizeConfig,
    TrainWorkersConfig,
)
from tests.evaluation.networks import write_clip
from tests.generation.folders import write_sd

NUM_IMAGES = 40


def parameters(folder: Path, url_list: Path) -> PipelineParameters:
    base = str(write_sd(folder / "base"))
    return PipelineParameters(
        url_list=str(url_list),
        name="flow",
        download={"allowed_hosts": ["127.0.0.1"], "image_format": "webp", "timeout_s": 1, "retries": 1},
        features=FeaturesConfig(base=base),
        data=SynthesizeConfig(base=base, teacher=base, held_out_share=0.2, num_inference_steps=2),
        training=FinetuneConfig(
            references=ReferenceChoice(number=2), losses=LossWeights(perceptual=0.0), steps=2, batch_size=4,
            micro_batch_size=4, adapter_inner_dim=64, lora_rank=2, checkpoint_every=2, num_validated=2,
        ),
        workers=TrainWorkersConfig(num_workers=1),
        evaluation=EvaluateConfig(
            ways=("base", "best_slerp", "adapter"),
            num_prompts=3,
            slerp_ws=(0.2,),
            adapter_scales=(),
            files=MetricFiles(clip=str(write_clip(folder / "clip"))),
        ),
        gate=GateConfig(metric="clip_score", min_prompts=2),
    )  # fmt: skip


@pytest.mark.engines
@pytest.mark.usefixtures("ray_session", "prefect_api_url")
def test_a_list_becomes_a_registered_model_and_a_second_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGERAG_HOME", str(tmp_path / "home"))
    with SampleServer() as server:
        urls = server.url_list(limit=NUM_IMAGES)
        good = urls.filter(pc.not_equal(urls["source"], pa.scalar("bad URLs")))
        pq.write_table(good, tmp_path / "urls.parquet")
        given = parameters(tmp_path, tmp_path / "urls.parquet")
        first = pipeline(**dict(given))
        second = pipeline(**dict(given))
    assert [stage.name for stage in first.stages] == ["ingest", "features", "finetune", "evaluate"]
    assert [stage.made for stage in first.stages] == [
        f"{NUM_IMAGES} fetched, {NUM_IMAGES} rows",
        f"{NUM_IMAGES} rows",
        "2 steps",
        "3 prompts, models:/imagerag-turbo/1",
    ]
    made, published = first.features.cached, first.features.publication
    assert (made.num_rows, made.num_added) == (NUM_IMAGES, NUM_IMAGES)
    assert f"{NUM_IMAGES} of {NUM_IMAGES} rows" in first.features.markdown()
    index = status(Store(Settings().index_uri, "flow"))
    assert [(each.base, each.num_rows) for each in index.features] == [(given.features.base, NUM_IMAGES)]
    assert published.published
    assert (published.version or 0) > (first.corpus.publication.version or 0)
    assert second.features.publication.version == published.version == index.newest_version
    assert {stage.made for stage in second.stages} == {""}
    assert second.summary().count("nothing: done before") == 4
    assert second.evaluate.registered.uri == first.evaluate.registered.uri
    assert first.finetune.training_set is not None
    assert first.finetune.finetuned is not None
    assert second.finetune.finetuned is not None
    assert first.finetune.training_set.num_added == 2 * NUM_IMAGES, "latents and references of each"
    assert second.finetune.finetuned.uri == first.finetune.finetuned.uri
    assert not second.finetune.finetuned.is_new
    (info,) = list_versions(Settings())
    assert "candidate" in info.aliases
    assert ("champion" in info.aliases) == first.evaluate.decision.passed

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts()
    texts = [str(artifact.data) for artifact in artifacts]
    assert any("what the training takes" in text for text in texts)
    assert any(first.finetune.finetuned.uri in text for text in texts)
    assert any("from URLs to a model" in text and "nothing: done before" in text for text in texts)
    progress = [artifact.description for artifact in artifacts if artifact.type == "progress"]
    assert any(text.startswith("train: 2 of 2 steps (adversarial") and "left" in text for text in progress), progress


def test_features_of_another_base_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"features\.base is other and data\.base is tiny"):
        PipelineParameters(
            url_list="list.csv",
            features=FeaturesConfig.model_construct(base="other"),
            data=SynthesizeConfig(),
        )
