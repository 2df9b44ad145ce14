from functools import partial

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from imagerag.embedded.sample import load_concepts, load_drawings
from imagerag.embedding.encoder import load_encoder
from imagerag.evaluation.distances import frechet, measure_distances, mmd, polynomial, spread
from imagerag.evaluation.efficientnet import load_feature_network
from imagerag.evaluation.intervals import estimate, jackknifed
from imagerag.evaluation.recognition import ClipJudge, Judge, is_nearest
from imagerag.recipes.tiny_base.data import Pictures
from imagerag.recipes.tiny_base.vae import to_input

STYLES = ("noto", "twemoji")


@pytest.fixture(scope="module")
def judged() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features and concepts of held-out drawings in two styles, and the concepts' names."""
    drawings = load_drawings(styles=STYLES, splits=["held_out"])
    pictures = Pictures.of(drawings)
    names = {concept.codepoint: concept.name for concept in load_concepts()}
    features = load_feature_network()([to_input(pictures.pixels, "cpu")])
    return features, pictures.concepts.numpy(), [names[codepoint] for codepoint in pictures.codepoints]


def test_real_drawings_are_recognised_by_the_other_style(judged: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    """Measured: 0.51 where chance is 0.01."""
    features, concepts, _ = judged
    rows = np.arange(len(features))
    judge = Judge.of(features, concepts)
    found = judge.recognised(features[rows], concepts[rows], range(concepts.max() + 1), ignored=rows[:, None])
    assert found.mean() > 0.45
    wrong = np.roll(concepts[rows], 83)  # far from it in Unicode, so unlike it
    assert judge.recognised(features[rows], wrong, range(concepts.max() + 1), ignored=rows[:, None]).mean() < 0.05


def test_the_clip_score_prefers_the_right_name(judged: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    """On concepts that its map was not fitted to."""
    features, concepts, names = judged
    sentences = load_encoder("tiny", "cpu").encode_texts(names)[concepts]
    fitted = concepts % 2 == 0
    judge = ClipJudge.fit(features[fitted], sentences[fitted])
    right = judge.scores(features[~fitted], sentences[~fitted])
    wrong = judge.scores(features[~fitted], np.roll(sentences[~fitted], 7, axis=0))
    assert estimate(right - wrong).low > 0.01


def test_noise_is_far_from_drawings(judged: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    features, _, _ = judged
    shuffled = np.random.default_rng(0).permutation(features)
    one, other = np.array_split(shuffled, 2)
    near = measure_distances(one, other)
    noise = torch.rand(len(one), 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    far = measure_distances(load_feature_network()([noise]), other)
    assert abs(near.kernel) < 3 * near.kernel_deviation
    assert far.kernel > 10 * near.kernel_deviation
    assert far.frechet > 2 * near.frechet


def test_the_kernel_distance_of_all_pictures_is_torch_fidelitys(
    judged: tuple[np.ndarray, np.ndarray, list[str]],
) -> None:
    shuffled = np.random.default_rng(0).permutation(judged[0])
    one, other = shuffled[:130], shuffled[130:260] + 0.1
    expected = kid_features_to_metric(
        *(torch.from_numpy(each).double() for each in (one, other)),
        kid_subsets=1, kid_subset_size=130, verbose=False,
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert mmd(one, other, polynomial, spread(other, polynomial)) == pytest.approx(1000 * expected, rel=1e-6)
    assert mmd(one, other, polynomial) == pytest.approx(1000 * expected, rel=1e-6)


def test_the_kernel_distances_interval_covers_zero_for_pictures_of_one_kind(
    judged: tuple[np.ndarray, np.ndarray, list[str]],
) -> None:
    """With as few pictures as it takes, too."""
    covered = []
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(judged[0])
        other = shuffled[100:200]
        found = jackknifed(partial(mmd, other=other, kernel=polynomial), shuffled[:100], np.arange(100))
        covered.append(found.low <= 0 <= found.high)
    assert np.mean(covered) > 0.7


def test_nearest_of_the_names() -> None:
    similarities = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2]])
    drawn, concepts = np.array([0, 1, 2]), np.array([0, 1, 2])
    assert is_nearest(similarities, drawn, concepts, [0, 1, 2], num_names=3).tolist() == [True, False, False]


def test_an_interval_holds_the_mean() -> None:
    """Of 200 samples, 95 % intervals miss the true mean in about 10."""
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.normal(1, 1, 50)) for _ in range(200)]
    missed = sum(not interval.low <= 1 <= interval.high for interval in intervals)
    assert 3 <= missed <= 25
    constant = estimate([1.0, 1.0])
    assert (constant.low, constant.high, constant.num) == (1, 1, 2)


@pytest.mark.parametrize("num", [40, 300], ids=["fewer pictures than features", "more"])
def test_the_frechet_distance_is_torch_fidelitys(num: int) -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(64, 64))
    one, other = rng.normal(size=(num, 64)), rng.normal(0.3, 1, (500, 64)) @ mixed
    statistics = [fid_features_to_statistics(torch.from_numpy(each)) for each in (one, other)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet(one, other) == pytest.approx(theirs, rel=1e-4)


def test_the_interval_of_a_distance_holds_that_of_other_pictures() -> None:
    """Of 200 samples, 95 % intervals miss what samples of their size have on average in about 10.

    Values come in pairs of one group, which are alike; where that is not known, three times as many miss it (measured:
    31 instead of 10).
    """
    rng = np.random.default_rng(0)
    distance = partial(frechet, other=rng.normal(0.5, 1, (400, 8)))
    groups = np.repeat(np.arange(150), 2)
    samples = [np.repeat(rng.normal(size=(150, 8)), 2, 0) + 0.1 * rng.normal(size=(300, 8)) for _ in range(200)]
    expected = np.mean([distance(sample) for sample in samples])

    def missed(groups: np.ndarray) -> int:
        intervals = [jackknifed(distance, sample, groups) for sample in samples]
        return sum(not interval.low <= expected <= interval.high for interval in intervals)

    grouped = missed(groups)
    assert 3 <= grouped <= 25
    assert missed(np.arange(300)) > 2 * grouped
