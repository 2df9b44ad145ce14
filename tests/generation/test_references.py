"""The pipeline with an index: what it finds, what it does with it, what it says of it, and what it refuses."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from imagerag.base.model import load_base
from imagerag.errors import UserError, VersionGoneError
from imagerag.generation.pipeline import ImageRAGTurboPipeline
from imagerag.hspace.lora import LORA_NAME, load_lora, save_lora
from imagerag.retrieval.store import Store
from imagerag.retrieval.takedown import remove_rows
from imagerag.storage.hexadecimal import to_hex
from tests.generation.folders import write_sd
from tests.generation.with_index import (
    CAPTIONS,
    call,
    drawing,
    encode,
    fill,
    latents,
    make_adapter,
    make_pipeline,
    sentences,
    write_store,
)
from tests.retrieval.rows import append, fixed_size_lists, index_and_publish, make_rows


def load(folder: Path) -> ImageRAGTurboPipeline:
    pipeline = ImageRAGTurboPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_nearest_row_comes_first_and_is_named(pipe: ImageRAGTurboPipeline) -> None:
    (references,) = call(pipe, "a red dragon", num_references=3).references
    assert [each.caption for each in references][:2] == ["red dragon", "green dragon"]
    first = references[0]
    assert (first.url, first.source, first.licence) == ("https://example.org/0.png", "even", "CC0-1.0")
    assert len(first.id) == 40
    assert 0.5 < first.similarity <= 1
    assert first.weight == pytest.approx(first.similarity)
    assert references[0].similarity > references[1].similarity > references[2].similarity


def test_references_change_the_picture(pipe: ImageRAGTurboPipeline) -> None:
    base = latents(pipe, fusion="none")
    for fusion in ("adapter", "slerp"):
        assert not torch.allclose(latents(pipe, fusion=fusion), base, atol=1e-3), fusion


@pytest.mark.parametrize(
    "arguments",
    [
        {"fusion": "slerp", "w": 1.0},
        {"fusion": "adapter", "adapter_scale": 0.0},
        {"fusion": "adapter", "similarity_threshold": 1.0},
        {"fusion": "slerp", "similarity_threshold": 1.0},
        {"fusion": "adapter", "num_references": 0},
    ],
)
def test_without_an_effect_it_is_the_base_model_bit_for_bit(
    pipe: ImageRAGTurboPipeline, plain: ImageRAGTurboPipeline, arguments: dict[str, Any]
) -> None:
    expected = latents(plain, fusion="none")
    assert torch.equal(latents(pipe, fusion="none"), expected)
    assert torch.equal(latents(pipe, **arguments), expected)


def test_the_adapter_has_a_scale_of_its_own(pipe: ImageRAGTurboPipeline, tmp_path: Path) -> None:
    one, two = latents(pipe, adapter_scale=1.0), latents(pipe, adapter_scale=2.0)
    assert not torch.allclose(one, two, atol=1e-3)
    assert torch.equal(latents(pipe), one)
    pipe.adapter.register_to_config(default_scale=2.0)
    assert torch.equal(latents(pipe), two)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(latents(load(tmp_path)), two)
    assert [row.weight for row in call(pipe, "a red dragon", adapter_scale=0.0).references[0]] == [0.0] * 4


def test_slerp_has_the_base_models_weight(store: Store, tmp_path: Path) -> None:
    papers, own = (make_pipeline(**own).use_index(store.uri, store.name) for own in ({}, {"slerp_w": 0.3}))
    assert torch.equal(latents(papers), latents(own, w=0.8))
    assert torch.equal(latents(own), latents(papers, w=0.3))
    assert not torch.allclose(latents(own), latents(papers), atol=1e-3)
    own.save_pretrained(tmp_path)
    assert torch.equal(latents(load(tmp_path)), latents(own))
    assert ImageRAGTurboPipeline.from_base(load_base(str(tmp_path), "cpu")).config.slerp_w == 0.3


def test_a_small_index_gives_all_it_has_unless_more_is_asked_for(
    pipe: ImageRAGTurboPipeline, plain: ImageRAGTurboPipeline, tmp_path: Path
) -> None:
    small = write_store(tmp_path, plain, num_rows=3)
    fill(small, plain)
    index_and_publish(small)
    assert len(call(pipe, "a castle").references[0]) == 4
    pipe.use_index(small.uri, small.name)
    assert len(call(pipe, "a castle").references[0]) == 3
    with pytest.raises(UserError, match="4 of 3 in 'images'"):
        call(pipe, "a castle", num_references=4)


def test_a_pipeline_has_a_threshold_of_its_own(store: Store) -> None:
    strict = make_pipeline(make_adapter(), similarity_threshold=1.0).use_index(store.uri, store.name)
    base = latents(strict, fusion="none")
    assert torch.equal(latents(strict), base)
    assert not torch.allclose(latents(strict, similarity_threshold=0.0), base, atol=1e-3)


def test_a_caption_that_many_rows_have_leaves_room_for_others(plain: ImageRAGTurboPipeline, tmp_path: Path) -> None:
    own = write_store(tmp_path, plain)
    same = {"caption": ["red dragon"] * 3, "image": [drawing(number) for number in range(20, 23)]}
    embeds = fixed_size_lists(sentences(plain, same["caption"]))
    append(own, make_rows(20, 23, own.encoder, **same, text_embed=embeds, image_embed=embeds))
    fill(own, plain)
    index_and_publish(own)
    pipeline = make_pipeline().use_index(own.uri, own.name)
    (references,) = call(pipeline, "a red dragon", num_references=3).references
    assert [each.caption for each in references] == ["red dragon", "red dragon", "green dragon"]


def test_slerp_is_the_papers_formula(pipe: ImageRAGTurboPipeline, store: Store) -> None:
    """At w = 0 the decoder sees the reference's h and the target's skips, nothing else."""
    seen: list[torch.Tensor] = []
    first_of_decoder = pipe.unet.up_blocks[0]
    hook = first_of_decoder.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    latents(pipe, "red dragon", fusion="slerp", w=0.0)
    hook.remove()
    expected = encode(pipe, [drawing(0)], ["red dragon"])
    assert torch.allclose(seen[0], expected, atol=2e-3 * float(expected.abs().max()))


def test_slerp_goes_beyond_the_reference(pipe: ImageRAGTurboPipeline) -> None:
    """A negative w changes the picture further in the direction from the base model to the reference."""
    base, reference, beyond = (latents(pipe, "red dragon", fusion="slerp", w=w) for w in (1.0, 0.0, -0.5))
    to_reference, to_beyond = (other - base for other in (reference, beyond))
    assert to_beyond.norm() > 1.1 * to_reference.norm()
    assert torch.cosine_similarity(to_beyond.flatten(), to_reference.flatten(), dim=0) > 0.8


def test_a_batch_is_its_pictures(pipe: ImageRAGTurboPipeline) -> None:
    prompts = ["a red dragon", "a castle", "some rain"]
    together = latents(pipe, prompts, num_references=2)
    for number, prompt in enumerate(prompts):
        assert torch.allclose(
            latents(pipe, prompt, seed=number, num_references=2), together[number : number + 1], atol=1e-4
        )


def test_each_picture_of_a_prompt_has_its_references(pipe: ImageRAGTurboPipeline) -> None:
    output = call(pipe, ["a castle", "a harp"], num_images_per_prompt=2, num_references=1)
    assert [own[0].caption for own in output.references] == ["castle", "castle", "harp", "harp"]
    alone = latents(pipe, "a harp", seed=2, num_images_per_prompt=2, num_references=1)
    assert torch.allclose(output.images[2:], alone, atol=1e-4)
    weights = {"num_references": 1, "reference_weights": [[2.0], [0.5]]}
    weighted = call(pipe, ["a castle", "a harp"], num_images_per_prompt=2, **weights).references
    assert [own[0].weight / own[0].similarity for own in weighted] == pytest.approx([2.0, 2.0, 0.5, 0.5])


def test_given_rows_are_used_instead_of_a_search(pipe: ImageRAGTurboPipeline, store: Store) -> None:
    ids = {row["caption"]: row["id"].hex() for row in store.dataset().to_table(columns=["id", "caption"]).to_pylist()}
    output = call(pipe, ["a castle", "a harp"], reference_ids=[[ids["llama"]], [ids["doughnut"], ids["harp"]]])
    assert [[row.caption for row in own] for own in output.references] == [["llama"], ["doughnut", "harp"]]
    alone = latents(pipe, "a castle", reference_ids=[ids["llama"]])
    assert torch.allclose(output.images[:1], alone, atol=1e-4), "another prompt may have more"
    flat = call(pipe, ["a castle", "a harp"], reference_ids=[ids["llama"]])
    assert [[row.caption for row in own] for own in flat.references] == [["llama"], ["llama"]]


def test_given_pictures_are_as_good_as_rows(pipe: ImageRAGTurboPipeline, plain: ImageRAGTurboPipeline) -> None:
    image = Image.open(io.BytesIO(drawing(0)))
    arguments = {"reference_images": [image], "reference_captions": ["red dragon"]}
    searched = latents(pipe, "red dragon", num_references=1, fusion="slerp")
    assert torch.allclose(latents(pipe, "red dragon", fusion="slerp", **arguments), searched, atol=0.02)
    # Without an index too.
    output = call(plain, "red dragon", fusion="slerp", **arguments)
    assert torch.allclose(output.images, searched, atol=0.02)
    assert output.references[0][0].source == "given"
    assert output.references[0][0].similarity == pytest.approx(1, abs=1e-5)


def test_one_picture_and_no_caption_are_enough(pipe: ImageRAGTurboPipeline) -> None:
    image = Image.open(io.BytesIO(drawing(0)))
    lists = latents(pipe, "a harp", reference_images=[[image]], reference_captions=[["a harp"]])
    assert torch.equal(latents(pipe, "a harp", reference_images=image), lists)
    assert torch.equal(latents(pipe, "a harp", reference_images=image, reference_captions="a harp"), lists)
    each = call(pipe, ["a harp", "a castle"], reference_images=image).references
    assert [own[0].caption for own in each] == ["a harp", "a castle"]
    assert [own[0].similarity for own in each] == pytest.approx([1, 1], abs=1e-5)


def test_references_have_weights(pipe: ImageRAGTurboPipeline, plain: ImageRAGTurboPipeline) -> None:
    arguments = {"num_references": 2, "fusion": "slerp", "w": 0.0}
    both, one = latents(pipe, **arguments), latents(pipe, **arguments | {"num_references": 1})
    assert torch.allclose(latents(pipe, reference_weights=[1.0, 0.0], **arguments), one, atol=1e-5)
    assert not torch.allclose(both, one, atol=1e-3)
    assert torch.equal(latents(pipe, reference_weights=[0, 0], **arguments), latents(plain, fusion="none"))
    (references,) = call(pipe, "a red dragon", reference_weights=[2.0, 0.5], num_references=2).references
    assert [each.weight / each.similarity for each in references] == pytest.approx([2.0, 0.5])


@pytest.mark.parametrize("fusion", ["slerp", "adapter"])
def test_references_have_masks(pipe: ImageRAGTurboPipeline, fusion: str) -> None:
    """Their H-space is 4 by 4, and each half of the picture is here as if its reference were the only one."""
    seen: list[torch.Tensor] = []
    up_block = pipe.unet.up_blocks[0]
    hook = up_block.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["hidden_states"]), with_kwargs=True
    )

    def fused(**arguments: Any) -> torch.Tensor:
        latents(pipe, **{"fusion": fusion, "w": 0.1 if fusion == "slerp" else None} | arguments)
        return seen[-1]

    left, right = (Image.new("L", (100, 60)) for _ in range(2))
    left.paste(255, (0, 0, 50, 60))
    right.paste(255, (50, 0, 100, 60))
    white, black = Image.new("L", (9, 9), 255), Image.new("1", (9, 9))
    ids = [row.id for row in call(pipe, "a red dragon", num_references=2).references[0]]
    one, other, none = fused(reference_ids=ids[:1]), fused(reference_ids=ids[1:]), fused(num_references=0)
    halves = fused(reference_ids=ids, reference_masks=[left, right])
    assert torch.allclose(halves[..., :2], one[..., :2], atol=1e-5)
    assert torch.allclose(halves[..., 2:], other[..., 2:], atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(fused(reference_ids=ids, reference_masks=[black, black]), none)
    shared = fused(reference_ids=ids, reference_masks=[white, white])
    assert torch.allclose(shared, (one + other) / 2, atol=1e-5)
    hook.remove()
    made = call(pipe, "a red dragon", reference_ids=ids, reference_masks=[left, right], num_images_per_prompt=2)
    assert [len(own) for own in made.references] == [2, 2]


def test_the_scale_of_references_is_set_for_all_calls(pipe: ImageRAGTurboPipeline) -> None:
    own, bold = latents(pipe), latents(pipe, adapter_scale=2.0)
    pipe.set_reference_scale(2.0)
    assert torch.equal(latents(pipe), bold)
    assert torch.equal(latents(pipe, adapter_scale=1.0), own)
    pipe.set_reference_scale(None)
    assert torch.equal(latents(pipe), own)
    with pytest.raises(UserError, match="the scale of references must be between 0 and 10; got -1"):
        pipe.set_reference_scale(-1)


def test_embeds_are_searched_for_by_a_query(pipe: ImageRAGTurboPipeline) -> None:
    embeds, _ = pipe.encode_prompt("a red dragon", "cpu", 1, False)
    made = call(pipe, None, prompt_embeds=embeds, query="a castle", num_references=1)
    assert made.references[0][0].caption == "castle"
    both = call(pipe, ["a red dragon", "a harp"], query="a castle", num_references=1)
    assert [own[0].caption for own in both.references] == ["castle", "castle"]
    with pytest.raises(UserError, match="prompt_embeds can't be searched for: name by `query`"):
        pipe(prompt_embeds=embeds)
    plain = latents(pipe, fusion="none")
    assert torch.equal(call(pipe, None, prompt_embeds=embeds, fusion="none").images, plain)


def test_an_index_needs_no_text_encoder(pipe: ImageRAGTurboPipeline) -> None:
    """Neither does diffusers' pipeline, once prompts are encoded: theirs may be on another machine."""
    embeds, _ = pipe.encode_prompt("a red dragon", "cpu", 1, False)
    expected = call(pipe, "a red dragon", num_references=2)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.use_index(pipe.config.index_uri, pipe.config.index_name)
    given = {"prompt_embeds": embeds, "query": "a red dragon"}
    made = call(pipe, None, num_references=2, **given)
    assert torch.allclose(made.images, expected.images, atol=1e-4)
    assert [row.id for row in made.references[0]] == [row.id for row in expected.references[0]]
    with pytest.raises(UserError, match="text encoders, which this pipeline does not have"):
        call(pipe, None, reference_images=Image.new("RGB", (8, 8)), reference_captions="a castle", **given)


def test_other_heights_and_widths_have_references_too(pipe: ImageRAGTurboPipeline) -> None:
    made = latents(pipe, height=24, width=32)
    assert made.shape == (1, 4, 12, 16)
    assert not torch.allclose(made, latents(pipe, height=24, width=32, fusion="none"), atol=1e-3)


def test_a_negative_prompt_counts_beside_references(pipe: ImageRAGTurboPipeline) -> None:
    """As a text and as embeddings, although the index shares the text encoder and prompts are encoded beforehand."""
    guided = {"guidance_scale": 3.0, "num_references": 2}
    made = latents(pipe, negative_prompt="a castle", **guided)
    assert not torch.allclose(made, latents(pipe, **guided), atol=1e-3)
    _, negative = pipe.encode_prompt("a red dragon", "cpu", 1, True, "a castle")
    assert torch.allclose(latents(pipe, negative_prompt_embeds=negative, **guided), made, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_more_steps_and_guidance(pipe: ImageRAGTurboPipeline, steps: int) -> None:
    arguments = {"num_inference_steps": steps, "guidance_scale": 3.0}
    made = latents(pipe, num_references=2, **arguments)
    assert torch.isfinite(made).all()
    assert not torch.allclose(made, latents(pipe, fusion="none", **arguments), atol=1e-3)
    assert torch.equal(latents(pipe, similarity_threshold=1.0, **arguments), latents(pipe, fusion="none", **arguments))


def test_things_of_a_composition_are_found_each(pipe: ImageRAGTurboPipeline) -> None:
    (references,) = call(pipe, "a harp and a castle", num_references=2, compose=True).references
    assert {each.caption for each in references} == {"harp", "castle"}


def test_the_prompt_is_encoded_once_where_the_index_shares_the_encoder(pipe: ImageRAGTurboPipeline) -> None:
    calls = []
    hook = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    latents(pipe, num_references=2)
    hook.remove()
    assert pipe.index is not None
    assert pipe.index.shares_encoder
    assert len(calls) == 1


def test_another_text_encoder_asks_the_indexs_own(store: Store, tmp_path: Path) -> None:
    base = load_base(str(write_sd(tmp_path)), device="cpu")
    pipeline = ImageRAGTurboPipeline.from_base(base).use_index(store.uri, store.name)
    assert pipeline.index is not None
    assert not pipeline.index.shares_encoder
    given = {"reference_images": Image.new("RGB", (16, 16)), "reference_captions": "a castle"}
    one, other = pipeline.encode_queries(["a red dragon", "a castle"])
    assert call(pipeline, "a red dragon", **given).references[0][0].similarity == pytest.approx(float(one @ other))
    with pytest.raises(UserError, match=rf"features for test \(fit auto, digest .*none for {base.identity.id}"):
        pipeline("a red dragon")


def test_a_pipeline_of_a_plain_folder_knows_whose_features_are_its_own(store: Store, tmp_path: Path) -> None:
    write_sd(tmp_path)
    digest = load_base(str(tmp_path), device="cpu").identity.digest
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    for pipeline in (ImageRAGTurboPipeline.from_pretrained(tmp_path), ImageRAGTurboPipeline.from_pipe(theirs)):
        assert pipeline.use_index(store.uri, store.name).config.base_digest == digest
        with pytest.raises(UserError, match=f"none for {tmp_path}"):
            pipeline("a red dragon")


def test_it_is_saved_and_loaded_with_all_that_it_needs(pipe: ImageRAGTurboPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (tmp_path / "adapter" / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(latents(loaded, num_references=2), latents(pipe, num_references=2))


def test_lora_is_attached_by_pefts_own_calls(pipe: ImageRAGTurboPipeline) -> None:
    from peft import LoraConfig

    before = latents(pipe, num_references=2)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=r"up_blocks.*to_q", init_lora_weights=False))
    assert not torch.allclose(latents(pipe, num_references=2), before, atol=1e-4)
    pipe.unet.disable_adapters()
    assert torch.allclose(latents(pipe, num_references=2), before, atol=1e-6)


def test_an_open_pipeline_moves_on_when_its_version_is_gone(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.uri, tmp_path / "index")
    own = Store(str(tmp_path / "index"), store.name)
    version = own.version
    following = make_pipeline(make_adapter()).use_index(own.uri, own.name)
    pinned = make_pipeline(make_adapter()).use_index(own.uri, own.name, version)
    remove_rows(own, ids=to_hex(make_rows(0, 1, caption=CAPTIONS[:1], image=[drawing(0)])["id"]))
    (found,) = call(following, "a castle", num_references=1).references
    assert found[0].caption == "castle"
    assert following.index is not None
    assert following.index.retriever.version == own.version
    with pytest.raises(VersionGoneError, match=f"version {version} of table 'images'"):
        call(pinned, "a castle")


def test_a_call_without_a_trainings_lora_leaves_it_as_it_was(pipe: ImageRAGTurboPipeline, tmp_path: Path) -> None:
    """`fusion="none"` is the base model, also between two calls with the adapter, and nothing becomes trainable."""
    from peft import LoraConfig

    before = latents(pipe, fusion="none")
    config = LoraConfig(r=2, target_modules=r"up_blocks.*to_q", init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name=LORA_NAME)
    pipe.unet.requires_grad_(False)
    trained = latents(pipe, num_references=2)
    assert torch.allclose(latents(pipe, fusion="none"), before, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert torch.equal(latents(pipe, num_references=2), trained)
    assert not torch.allclose(trained, before, atol=1e-4)

    save_lora(pipe.unet, tmp_path)
    pipe.unet.delete_adapters(LORA_NAME)
    pipe.unet.requires_grad_(True)
    load_lora(pipe.unet, tmp_path)
    assert torch.allclose(latents(pipe, num_references=2), trained, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
