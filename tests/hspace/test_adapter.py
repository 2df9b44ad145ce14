import json
from pathlib import Path

import pytest
import torch

from imagerag.hspace.adapter import HSpaceAdapter, gate

SIZE, COUNT, CHANNELS, SIDE = 4, 3, 32, 4


@pytest.fixture
def trained() -> HSpaceAdapter:
    """An adapter whose output projection and gate are no longer zero."""
    torch.manual_seed(0)
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    torch.nn.init.normal_(adapter.to_out.weight, std=0.5)
    torch.nn.init.normal_(adapter.to_gate.weight, std=0.5)
    return adapter.eval()


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randn(SIZE, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def references() -> torch.Tensor:
    return torch.randn(SIZE, COUNT, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


WEIGHTS = torch.tensor([[0.9, 0.5, 0.7], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.8, 0.8, 0.0]])


def test_a_new_adapter_changes_nothing(target: torch.Tensor, references: torch.Tensor) -> None:
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    assert torch.equal(adapter(target, references, WEIGHTS), target)


def test_a_gate_that_starts_open_is_an_interpolation_towards_the_reference(
    target: torch.Tensor, references: torch.Tensor
) -> None:
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    adapter.start_gate(0.75)
    fused = adapter(target, references[:, :1], torch.ones(SIZE, 1))
    assert torch.allclose(fused, 0.25 * target + 0.75 * references[:, 0], atol=1e-5)
    assert torch.equal(adapter(target, references[:, :1], torch.zeros(SIZE, 1)), target)


def test_scale_zero_is_the_base_bit_for_bit(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    assert torch.equal(trained(target, references, WEIGHTS, scale=0.0), target)
    half, whole = (trained(target, references, WEIGHTS, scale=scale) - target for scale in (0.5, 1.0))
    assert whole.abs().max() > 0.1
    assert torch.allclose(2 * half, whole, atol=1e-5)


def test_no_reference_above_the_gate_is_the_base_bit_for_bit(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    fused = trained(target, references, WEIGHTS)
    assert torch.equal(fused[2], target[2])
    changed = (fused - target).abs().amax((1, 2, 3)) > 0.01
    assert changed.tolist() == [True, True, False, True]
    assert torch.equal(trained(target, references[:, :0], WEIGHTS[:, :0]), target)


def test_the_order_of_references_does_not_matter(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    order = [2, 0, 1]
    other = trained(target, references[:, order], WEIGHTS[:, order])
    assert torch.allclose(trained(target, references, WEIGHTS), other, atol=1e-5)


def test_a_batch_is_its_items(trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor) -> None:
    batch = trained(target, references, WEIGHTS)
    for row in range(SIZE):
        own = slice(row, row + 1)
        alone = trained(target[own], references[own], WEIGHTS[own])
        assert torch.allclose(batch[own], alone, atol=1e-5)


def test_a_reference_of_weight_zero_is_not_there(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    row = slice(3, 4)
    without = trained(target[row], references[row, :2], WEIGHTS[row, :2])
    assert torch.allclose(trained(target[row], references[row], WEIGHTS[row]), without, atol=1e-5)
    unlike = references.clone()
    unlike[row, 2] = 100.0
    assert torch.allclose(trained(target[row], unlike[row], WEIGHTS[row]), without, atol=1e-5)


def test_one_reference_is_the_papers_formula(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    """What is added is in proportion to lambda."""
    one = references[:, :1]
    added = [trained(target, one, torch.full((SIZE, 1), weight)) - target for weight in (0.4, 0.8)]
    assert torch.allclose(2 * added[0], added[1], atol=1e-5)


def test_a_wide_open_gate_puts_the_reference_in_the_targets_place(
    target: torch.Tensor, references: torch.Tensor
) -> None:
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    torch.nn.init.constant_(adapter.to_gate.bias, 100.0)
    fused = adapter(target, references[:, :1], torch.ones(SIZE, 1))
    assert torch.allclose(fused, references[:, 0], atol=1e-5)


def test_of_several_references_the_nearest_is_followed(target: torch.Tensor, references: torch.Tensor) -> None:
    """By text where that differs, else in the H-space: a mean of pictures is no picture."""
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    torch.nn.init.constant_(adapter.to_gate.bias, 100.0)
    like_target = references.clone()
    like_target[:, 1] = target + 0.1 * references[:, 1]
    assert torch.allclose(adapter(target, like_target, torch.ones(SIZE, COUNT)), like_target[:, 1], atol=1e-3)
    by_text = adapter(target, references, torch.tensor([[0.2, 0.2, 1.0]]).expand(SIZE, -1))
    assert torch.allclose(by_text, references[:, 2], atol=1e-3)


def test_the_gate() -> None:
    similarities = torch.tensor([[-0.5, 0.2, 0.7, 1.2]])
    assert gate(similarities, 0.5)[0].tolist() == pytest.approx([0.0, 0.0, 0.7, 1.0])
    assert gate(similarities, -1.0)[0].tolist() == pytest.approx([0.0, 0.2, 0.7, 1.0])


def test_its_size_at_sd_2() -> None:
    """The paper has 36M."""
    with torch.device("meta"):
        adapter = HSpaceAdapter(1280)
    assert sum(parameter.numel() for parameter in adapter.parameters()) / 1e6 == pytest.approx(36, rel=0.1)


def test_it_is_saved_and_loaded(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = HSpaceAdapter.from_pretrained(tmp_path)
    assert again.config.channels == CHANNELS
    assert torch.allclose(again(target, references, WEIGHTS), trained(target, references, WEIGHTS), atol=1e-6)


def test_one_that_was_saved_without_a_scale_has_one(trained: HSpaceAdapter, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("default_scale") == 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert HSpaceAdapter.from_pretrained(tmp_path).config.default_scale == 1.0


def test_dimensions_are_checked() -> None:
    with pytest.raises(ValueError, match="divisible by num_heads and channels by 4; got 60, 8, 32"):
        HSpaceAdapter(32, inner_dim=60)
