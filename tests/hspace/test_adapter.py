import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from imagerag.hspace.adapter import HSpaceAdapter, gate
from imagerag.hspace.attention import HSpaceAttention

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
    assert torch.equal(adapter(target, references, WEIGHTS).sample, target)


def test_a_gate_that_starts_open_is_an_interpolation_towards_the_reference(
    target: torch.Tensor, references: torch.Tensor
) -> None:
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    adapter.start_gate(0.75)
    fused = adapter(target, references[:, :1], torch.ones(SIZE, 1)).sample
    assert torch.allclose(fused, 0.25 * target + 0.75 * references[:, 0], atol=1e-5)
    assert torch.equal(adapter(target, references[:, :1], torch.zeros(SIZE, 1)).sample, target)


def test_scale_zero_is_the_base_bit_for_bit(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    assert torch.equal(trained(target, references, WEIGHTS, scale=0.0).sample, target)
    half, whole = (trained(target, references, WEIGHTS, scale=scale).sample - target for scale in (0.5, 1.0))
    assert whole.abs().max() > 0.1
    assert torch.allclose(2 * half, whole, atol=1e-5)


def test_no_reference_above_the_gate_is_the_base_bit_for_bit(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    fused = trained(target, references, WEIGHTS).sample
    assert torch.equal(fused[2], target[2])
    changed = (fused - target).abs().amax((1, 2, 3)) > 0.01
    assert changed.tolist() == [True, True, False, True]
    assert torch.equal(trained(target, references[:, :0], WEIGHTS[:, :0]).sample, target)


def test_the_order_of_references_does_not_matter(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    order = [2, 0, 1]
    other = trained(target, references[:, order], WEIGHTS[:, order]).sample
    assert torch.allclose(trained(target, references, WEIGHTS).sample, other, atol=1e-5)


def test_a_batch_is_its_items(trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor) -> None:
    batch = trained(target, references, WEIGHTS).sample
    for row in range(SIZE):
        own = slice(row, row + 1)
        alone = trained(target[own], references[own], WEIGHTS[own]).sample
        assert torch.allclose(batch[own], alone, atol=1e-5)


def test_a_reference_of_weight_zero_is_not_there(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    row = slice(3, 4)
    without = trained(target[row], references[row, :2], WEIGHTS[row, :2]).sample
    assert torch.allclose(trained(target[row], references[row], WEIGHTS[row]).sample, without, atol=1e-5)
    unlike = references.clone()
    unlike[row, 2] = 100.0
    assert torch.allclose(trained(target[row], unlike[row], WEIGHTS[row]).sample, without, atol=1e-5)


def test_one_reference_is_the_papers_formula(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    """What is added is in proportion to lambda."""
    one = references[:, :1]
    added = [trained(target, one, torch.full((SIZE, 1), weight)).sample - target for weight in (0.4, 0.8)]
    assert torch.allclose(2 * added[0], added[1], atol=1e-5)


def test_a_wide_open_gate_puts_the_reference_in_the_targets_place(
    target: torch.Tensor, references: torch.Tensor
) -> None:
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    torch.nn.init.constant_(adapter.to_gate.bias, 100.0)
    fused = adapter(target, references[:, :1], torch.ones(SIZE, 1)).sample
    assert torch.allclose(fused, references[:, 0], atol=1e-5)


def test_of_several_references_the_one_with_the_nearest_text_is_followed(
    target: torch.Tensor, references: torch.Tensor
) -> None:
    """A mean of pictures is no picture. Of equals it is the first, however similar another one is to the target."""
    adapter = HSpaceAdapter(CHANNELS, num_heads=4)
    torch.nn.init.constant_(adapter.to_gate.bias, 100.0)
    like_target = references.clone()
    like_target[:, 1] = target
    assert torch.allclose(adapter(target, like_target, torch.ones(SIZE, COUNT)).sample, references[:, 0], atol=1e-3)
    by_text = adapter(target, references, torch.tensor([[0.98, 0.2, 1.0]]).expand(SIZE, -1)).sample
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
    assert torch.allclose(
        again(target, references, WEIGHTS).sample, trained(target, references, WEIGHTS).sample, atol=1e-6
    )


def test_one_that_was_saved_without_a_scale_has_one(trained: HSpaceAdapter, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("default_scale") == 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert HSpaceAdapter.from_pretrained(tmp_path).config.default_scale == 1.0


def test_dimensions_are_checked() -> None:
    with pytest.raises(ValueError, match="divisible by num_heads and channels by 4; got 60, 8, 32"):
        HSpaceAdapter(32, inner_dim=60)


def test_it_returns_what_models_of_diffusers_return(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    (fused,) = trained(target, references, WEIGHTS, return_dict=False)
    assert torch.equal(fused, trained(target, references, WEIGHTS).sample)
    (unchanged,) = trained(target, references, WEIGHTS, scale=0.0, return_dict=False)
    assert torch.equal(unchanged, target)


def test_weights_have_the_names_of_trained_adapters(trained: HSpaceAdapter) -> None:
    assert set(trained.state_dict()) == {
        "norm_target.weight", "norm_target.bias", "norm_reference.weight", "norm_reference.bias", "to_q.0.weight",
        "to_q.0.bias", "to_q.2.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_gate.weight", "to_gate.bias",
    }  # fmt: skip


def test_gradient_checkpointing_learns_the_same(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    def learn() -> tuple[int, list[torch.Tensor]]:
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        trained.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trained(target, references, WEIGHTS).sample.square().sum()
        loss.backward()
        return len(kept), [each.grad.clone() for each in trained.parameters() if each.grad is not None]

    many, expected = learn()
    trained.enable_gradient_checkpointing()
    few, found = learn()
    assert few < many
    assert len(expected) == len(list(trained.parameters()))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_lora_learns_and_is_saved_and_loaded(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor, tmp_path: Path
) -> None:
    before = trained(target, references, WEIGHTS).sample
    layers = ["to_q.0", "to_q.2", "to_k", "to_v", "to_out"]
    trained.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    expected = trained(target, references, WEIGHTS).sample
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.equal(expected[2], target[2]), "a row without references"
    trained.save_lora_adapter(tmp_path)
    trained.unload_lora()
    assert torch.equal(trained(target, references, WEIGHTS).sample, before)
    trained.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(trained(target, references, WEIGHTS).sample, expected)


def test_its_attention_takes_a_processor(
    trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor
) -> None:
    class Seen:
        def __call__(self, attn: HSpaceAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor) -> torch.Tensor:  # fmt: skip
            query, key, value = (
                tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2) for tokens in (query, key, value)
            )
            scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~attention_mask, -torch.inf)
            self.shares = scores.softmax(-1)
            return (self.shares @ value).transpose(1, 2).flatten(2)

    expected = trained(target, references, WEIGHTS).sample
    assert list(trained.attn_processors) == ["attn.processor"]
    own = Seen()
    trained.set_attn_processor(own)
    assert torch.allclose(trained(target, references, WEIGHTS).sample, expected, atol=1e-5)
    assert own.shares.shape == (SIZE, 4, SIDE**2, COUNT * SIDE**2)
    assert own.shares[1, :, :, SIDE**2 :].abs().max() == 0, "of references that are not there"


def test_it_is_compiled_as_one_graph(trained: HSpaceAdapter, target: torch.Tensor, references: torch.Tensor) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(trained, backend=counter, fullgraph=True)
    for scale in (1.0, 1.5):
        expected = trained(target, references, WEIGHTS, scale).sample
        assert torch.equal(compiled(target, references, WEIGHTS, scale).sample, expected)
    assert counter.frame_count in (1, 2), "one, and one for all scales"
