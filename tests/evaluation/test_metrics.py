"""What metrics say of drawings, where it is known what they should say."""

import io
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from imagerag.embedded.sample import Drawing, load_drawings
from imagerag.errors import UserError
from imagerag.evaluation import distances, recognition
from imagerag.evaluation.clip import Aesthetics, Clip, ClipScore, Cmmd, Fid, Inception, check_evaluator
from imagerag.evaluation.config import MetricFiles
from imagerag.evaluation.copies import measure_copies, threshold_of
from imagerag.evaluation.made import MadeHere, features_here
from imagerag.evaluation.metrics import (
    Distance,
    NotMeasuredError,
    Pictures,
    Real,
    Recognised,
    TextScore,
    by_prompt,
    mean_of,
)
from imagerag.evaluation.networks import check_networks
from imagerag.evaluation.recognition import Judge
from imagerag.evaluation.results import JUDGES
from imagerag.evaluation.tifa import AnswerNetwork, Tifa
from imagerag.evaluation.ways import Way
from imagerag.evaluation.weights import digests_of
from imagerag.generation.references import Reference
from imagerag.retrieval.search import Retriever
from imagerag.retrieval.store import Store
from tests.evaluation.networks import CLIP_DIM, write_clip, write_head, write_inception, write_vilt
from tests.retrieval.rows import DIM, ENCODER, append, embeddings, index_and_publish, make_rows

WAY = Way(name="adapter", title="adapter", base="", base_digest="")


def open_image(drawing: Drawing) -> Image.Image:
    return Image.open(io.BytesIO(drawing.image)).convert("RGB")


def reference(id: str) -> Reference:
    return Reference(id=id, caption="", url="", source="", licence="", similarity=0.9, weight=1.0)


@dataclass(frozen=True)
class RealHere(Real):
    """Real pictures in memory."""

    images: list[Image.Image]


def real_of(
    ids: list[str], images: list[Image.Image], prompts: np.ndarray, files: MetricFiles | None = None
) -> RealHere:
    return RealHere(ids, prompts, features_here(images, files), images)


def pictures_of(
    real: Real,
    images: list[Image.Image],
    numbers: np.ndarray,
    shown: list[tuple[str, ...]] | None = None,
    files: MetricFiles | None = None,
) -> Pictures:
    references = [tuple(map(reference, own)) for own in shown or [()] * len(images)]
    return Pictures(MadeHere(WAY, images, references, files), numbers, real, real.places_of(references))


@pytest.fixture(scope="module")
def drawn() -> tuple[RealHere, list[Image.Image], np.ndarray]:
    """Held-out drawings in two styles as real ones, and those of a third as if they had been generated."""
    by_style = {
        style: {d.concept.name: d for d in load_drawings(styles=[style], splits=["held_out"])}
        for style in ("noto", "twemoji", "noto-v1")
    }
    names = sorted(set.intersection(*(set(own) for own in by_style.values())))
    listed = [
        (style, number, by_style[style][name]) for style in ("twemoji", "noto-v1") for number, name in enumerate(names)
    ]
    real = real_of(
        [f"{style}-{number}" for style, number, _ in listed],
        [open_image(each) for _, _, each in listed],
        np.array([number for _, number, _ in listed]),
    )
    return real, [open_image(by_style["noto"][name]) for name in names], np.arange(len(names))


def test_drawings_of_another_style_are_recognised(drawn: tuple[RealHere, list[Image.Image], np.ndarray]) -> None:
    """Measured: 0.82, and 0.00 with wrong prompts; chance is 0.01."""
    real, images, numbers = drawn
    judge = Recognised(real)
    assert np.mean(judge.measure(pictures_of(real, images, numbers))) > 0.7
    assert np.mean(judge.measure(pictures_of(real, images, np.roll(numbers, 40)))) < 0.06


def test_a_copy_is_not_recognised_by_what_it_copies(drawn: tuple[RealHere, list[Image.Image], np.ndarray]) -> None:
    """It is as good as the copied drawing is at telling what the remaining one shows. Measured: 0.41."""
    real, _, numbers = drawn
    half = len(real.ids) // 2
    copies, shown = real.images[:half], [(id,) for id in real.ids[:half]]
    judge = Recognised(real)
    assert np.mean(judge.measure(pictures_of(real, copies, numbers))) == 1
    assert 0.3 < np.mean(judge.measure(pictures_of(real, copies, numbers, shown))) < 0.6


def test_a_picture_is_worth_the_same_whatever_its_way_was_shown(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray],
) -> None:
    """The widest way decides what is left out for all, and what leaves nothing is not measured."""
    real, images, numbers = drawn
    half = len(real.ids) // 2
    judge = Recognised(real)
    one, two = ([own[:count] for own in zip(real.ids[:half], real.ids[half:], strict=True)] for count in (1, 2))
    left_out = real.places_of(pictures_of(real, images, numbers, one).made.references())
    values = [
        np.asarray(judge.measure(replace(pictures_of(real, images, numbers, shown), left_out=left_out)))
        for shown in (None, one, two)
    ]
    assert np.array_equal(values[0], values[1])
    assert np.array_equal(values[0], values[2])
    assert np.isnan(np.asarray(judge.measure(pictures_of(real, images, numbers, two)))).all()


def test_the_second_judge_is_another_one_and_knows_what_it_does_not_know(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray],
) -> None:
    real, images, numbers = drawn
    pictures = pictures_of(real, images, numbers)
    first, second = (np.asarray(Recognised(real, name).measure(pictures)) for name in JUDGES)
    assert second.mean() > 0.2
    assert 0.02 < (first != second).mean() < 0.5
    noise = np.random.default_rng(0).integers(0, 256, (len(real.images), 16, 16, 3), np.uint8)
    unlike = real_of(real.ids, [Image.fromarray(each) for each in noise], real.prompts)
    with pytest.raises(NotMeasuredError, match=r"knows drawings alone: of the index's own pictures it recognises 0\.0"):
        Recognised(unlike, "recognised_second").measure(pictures)


def test_copies_are_found_and_drawings_of_the_same_are_none(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray],
) -> None:
    """Measured: 1.00 and 0.03."""
    real, images, numbers = drawn
    half, threshold = len(real.ids) // 2, threshold_of(real)
    shown = [(id,) for id in real.ids[:half]]
    copies = measure_copies(pictures_of(real, real.images[:half], numbers, shown), threshold)
    others = measure_copies(pictures_of(real, images, numbers, shown), threshold)
    assert copies is not None
    assert others is not None
    assert copies.share > 0.97
    assert others.share < 0.1
    assert measure_copies(pictures_of(real, images, numbers), threshold) is None, "shown nothing"


def test_larger_is_better_of_all_but_distances() -> None:
    assert all(metric.larger_is_better for metric in (Recognised, TextScore, ClipScore, Aesthetics, Tifa))
    assert not any(metric.larger_is_better for metric in (Distance, Cmmd, Fid))


def test_too_little_is_not_measured(drawn: tuple[RealHere, list[Image.Image], np.ndarray]) -> None:
    real, images, numbers = drawn
    few = real_of(real.ids[:10], real.images[:10], real.prompts[:10])
    with pytest.raises(NotMeasuredError, match="at least 20 of the prompts; there are 10"):
        Recognised(few)
    with pytest.raises(NotMeasuredError, match="needs 100 pictures of the index for the prompts; there are 10"):
        Distance("frechet", few)
    with pytest.raises(NotMeasuredError, match="needs 100 pictures of each way"):
        Distance("kernel", real).measure(pictures_of(real, images[:10], numbers[:10]))
    with pytest.raises(NotMeasuredError, match="at least two prompts; 1 could"):
        mean_of(np.array([np.nan, 1.0]))


def test_prompts_without_pictures_in_the_index_count_for_nothing(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray],
) -> None:
    real, images, numbers = drawn
    unknown = numbers.max() + 1
    pictures = pictures_of(real, [images[0], images[0]], np.array([0, unknown]))
    values = np.asarray(Recognised(real).measure(pictures))
    assert np.isnan(values).tolist() == [False, True]
    means = by_prompt(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 2]), 3)
    assert means[0] == 0.5
    assert np.isnan(means[1])


def test_a_text_score_is_the_same_in_any_order_of_the_index(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagerag.evaluation.metrics.NUM_ROWS", 100)
    real, images, numbers = drawn
    rows = make_rows(0, 120, image=[each.image for each in load_drawings(styles=["noto"])[:120]])
    embeds = embeddings(0, len(images), DIM)
    scores = []
    for name, order in (("a", np.arange(120)), ("b", np.arange(120)[::-1])):
        store = Store(str(tmp_path), name)
        store.create(ENCODER)
        append(store, rows.take(order))
        index_and_publish(store)
        metric = TextScore(Retriever(str(tmp_path), name), ["picture number 7"], embeds)
        scores.append(metric.measure(pictures_of(real, images, numbers)))
    assert np.ptp(scores[0]) > 0.1
    np.testing.assert_array_equal(*scores)


def test_clip_scores_follow_its_embeddings(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray], tmp_path: Path
) -> None:
    real, images, numbers = drawn
    files = MetricFiles(clip=str(write_clip(tmp_path / "clip")))
    clip, prompts = Clip(files.clip or ""), ["a", "bc", "def"]
    own = pictures_of(real, images[:3], numbers[:3], files=files)
    scores = np.asarray(ClipScore(clip, prompts).measure(own))
    expected = (clip.images(images[:3]) * clip.texts(prompts)).sum(1)
    assert scores == pytest.approx(expected)
    assert np.linalg.norm(clip.images(images[:3]), axis=1) == pytest.approx(1, abs=1e-5)
    cmmd = Cmmd(real_of(real.ids, real.images, real.prompts, files))
    same = pictures_of(real, real.images, real.prompts, files=files)
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)) for n in range(120)]
    unlike = pictures_of(real, noise, np.arange(120), files=files)
    near, far = (cmmd.measure(each).mean for each in (same, unlike))  # type: ignore[union-attr]
    assert abs(near) < 0.1 * far
    head = write_head(tmp_path / "head.safetensors", CLIP_DIM, 8, 1)
    values = np.asarray(Aesthetics(str(head), clip.dim).measure(own))
    assert values.shape == (3,)
    assert len(set(values.tolist())) == 3
    with pytest.raises(UserError, match=f"embeddings of dimension 7; files.clip has dimension {CLIP_DIM}"):
        Aesthetics(str(write_head(tmp_path / "other.safetensors", 7, 1)), clip.dim)


def test_the_matrix_of_all_pairs_is_never_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of pictures give what all pictures at once give."""
    rng = np.random.default_rng(0)
    one, other = (rng.standard_normal((count, 8)) for count in (50, 70))
    concepts, drawn_concepts = (rng.integers(0, 30, count) for count in (50, 70))
    judge = Judge.of(other, np.concatenate([np.arange(30), drawn_concepts[30:]]))

    def results() -> tuple[float, list[bool]]:
        return distances.mmd(one, other, distances.gaussian), judge.recognised(
            one, concepts, np.arange(30), None, 5
        ).tolist()

    at_once = results()
    monkeypatch.setattr(distances, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(recognition, "_BLOCK_ROWS", 16)
    in_blocks = results()
    assert in_blocks[0] == pytest.approx(at_once[0])
    assert in_blocks[1] == at_once[1]
    assert 0 < sum(at_once[1]) < 50


def test_the_retriever_is_no_evaluator(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    with pytest.raises(UserError, match="the evaluator must not be the retriever"):
        check_evaluator(str(folder), str(folder))
    check_evaluator(str(folder), "tiny")
    with pytest.raises(UserError, match="must be a transformers folder with safetensors"):
        Clip(str(tmp_path))


def test_tifa_counts_right_answers(drawn: tuple[RealHere, list[Image.Image], np.ndarray], tmp_path: Path) -> None:
    _, images, _ = drawn
    model, questions = str(write_vilt(tmp_path / "vilt")), tmp_path / "questions.json"

    def ask(answer: str, *choices: str) -> dict[str, object]:
        return {"caption": "0", "question": "is it red?", "choices": choices, "answer": answer}

    # Of two choices, one is the model's preferred one, whichever that is; of one that it does not know, none is.
    questions.write_text(json.dumps([ask("yes", "yes", "no"), ask("no", "yes", "no"), ask("blue", "blue")]))
    Tifa(str(questions), ["0", "1"])
    values = AnswerNetwork(str(questions), model)(images[:2], ["0", "1"])
    assert values.shape == (2, 1)
    assert values[0, 0] == pytest.approx(1 / 3)
    assert np.isnan(values[1, 0])
    with pytest.raises(NotMeasuredError, match="none of the prompts is a caption"):
        Tifa(str(questions), ["something else"])
    questions.write_text(json.dumps([{"caption": "0"}]))
    with pytest.raises(UserError, match="a list of objects with caption, question, choices, answer"):
        Tifa(str(questions), ["0"])


def test_inception_is_read_without_running_what_a_file_holds(
    drawn: tuple[RealHere, list[Image.Image], np.ndarray], tmp_path: Path
) -> None:
    real, images, _ = drawn
    few = real_of(real.ids[:2], real.images[:2], real.prompts[:2])
    with pytest.raises(NotMeasuredError, match="there are 2"):
        Fid(few)
    inception = Inception(str(write_inception(tmp_path / "inception.pth")))
    mixed = [images[0], images[0].resize((40, 30)), images[1]]
    features = inception(mixed)
    assert features.shape == (3, 2048)
    np.testing.assert_allclose(features, np.concatenate([inception([each]) for each in mixed]), rtol=1e-3, atol=1e-4)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="must hold torch-fidelity's InceptionV3"):
        check_networks(MetricFiles(inception=str(tmp_path / "other.pth")))

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "harmed",)  # type: ignore[return-value]

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="can't be read as a file of tensors"):
        check_networks(MetricFiles(inception=str(tmp_path / "hostile.pth")))
    assert not (tmp_path / "harmed").exists()


def test_what_metrics_are_given_is_known_by_its_contents(tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", 3, 1)
    first = digests_of(MetricFiles(aesthetic_head=str(head)))
    write_head(head, 3, 1)
    assert digests_of(MetricFiles(aesthetic_head=str(head))) != first
    assert digests_of(MetricFiles()) == {}
    with pytest.raises(UserError, match=r"files.clip must be a file or folder on this machine; .*gone does not exist"):
        digests_of(MetricFiles(clip=str(tmp_path / "gone")))


def test_a_head_that_is_none_is_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(1, CLIP_DIM)}, tmp_path / "biasless.safetensors")
    with pytest.raises(UserError, match=r"linear layers down to one value; .*biasless"):
        Aesthetics(str(tmp_path / "biasless.safetensors"), CLIP_DIM)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="must hold tensors by name; it holds a list"):
        Aesthetics(str(tmp_path / "list.pth"), CLIP_DIM)


def test_one_picture_can_not_tell_what_a_copy_is(drawn: tuple[RealHere, list[Image.Image], np.ndarray]) -> None:
    real, images, numbers = drawn
    for count in (0, 1):
        few = real_of(real.ids[:count], real.images[:count], real.prompts[:count])
        assert threshold_of(few) is None
        assert measure_copies(pictures_of(few, images, numbers, [(real.ids[0],)] * len(images)), None) is None
