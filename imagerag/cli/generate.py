"""`imagerag generate`: generate pictures of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imagerag.errors import UserError
from imagerag.limits import check_guidance, check_seeds

if TYPE_CHECKING:
    from imagerag.generation.batch import Generated
    from imagerag.generation.pipeline import ImageRAGTurboPipeline

_MAX_ROWS_IN_SHEET = 64
DEFAULT_BASE = "tiny"
PromptsArgument = Annotated[list[str] | None, typer.Argument(help="Prompts.")]
PromptFileOption = Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")]
AdapterOption = Annotated[str | None, typer.Option(help="Folder or URI of an adapter.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model: `tiny`, `tiny-teacher`, a hub id and commit (`org/name@<commit>`), or a diffusers folder. "
        "Default: `tiny`."
    ),
]
ScaleOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=10,
        help="Scale of the adapter's contribution; 0 is the base model, more is bolder. Default: the adapter's own.",
    ),
]


class FusionOption(StrEnum):
    """Fusions of references."""

    ADAPTER = "adapter"
    SLERP = "slerp"
    NONE = "none"


def generate(
    prompts: PromptsArgument = None,
    prompt_file: PromptFileOption = None,
    base: BaseOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Registered model, with its own base model, adapter and index: an alias or version of the model that "
            "IMAGERAG_MODEL_NAME names, or, as in MLflow, `mugs@champion` or `mugs/3`."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Denoising steps: 1 for a student, 25 to 50 for a teacher.")
    ] = 1,
    guidance: Annotated[
        float,
        typer.Option(min=0, help="Scale of classifier-free guidance; off at 1 and below. Teachers need guidance."),
    ] = 0.0,
    name: Annotated[str | None, typer.Option(help="Name of the corpus with the index of references.")] = None,
    references: Annotated[
        int | None,
        typer.Option(min=0, help="Number of references per prompt. Default: 4 for the adapter, 1 for slerp."),
    ] = None,
    fusion: Annotated[
        FusionOption | None,
        typer.Option(help="Fusion of references. Default: the adapter if there is one, otherwise slerp."),
    ] = None,
    w: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Slerp weight: 1 is the base model, 0 the reference, below 0 beyond it. Default: the base model's.",
        ),
    ] = None,
    scale: ScaleOption = None,
    compose: Annotated[bool, typer.Option("--compose", help="Also search for each thing that a prompt names.")] = False,
    adapter: AdapterOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of pictures per prompt, with consecutive seeds.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="First seed; the same seed gives the same picture.")] = 0,
    out: Annotated[Path, typer.Option(help="Output folder: a PNG per picture, and all in grid.png.")] = Path(
        "generated"
    ),
) -> None:
    """Generate pictures of prompts with a base model and references from an index."""
    wanted = read_prompts(prompts or [], prompt_file)
    check_seeds(seed, seeds)
    check_guidance(guidance)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is a folder; {out} is a file")
    check_alone([model] if model else [], base=base, adapter=adapter, name=name)
    wants_index = references or adapter or compose or (fusion is not None and fusion is not FusionOption.NONE)
    if model is None and name is None and wants_index:
        raise UserError("references come from an index: name its corpus by --name")
    check_scale(scale, has_adapter=bool(adapter or model))
    with ExitStack() as stack:
        if model is not None:
            pipeline = stack.enter_context(open_model(model))
        else:
            pipeline = open_pipeline(base or DEFAULT_BASE, adapter)
            if name is not None:
                from imagerag.settings import Settings, check_name

                pipeline.use_index(Settings().index_uri, check_name(name))
        options = {
            "num_inference_steps": steps, "guidance_scale": guidance, "num_references": references,
            "fusion": None if fusion is None else fusion.value, "w": w, "adapter_scale": scale, "compose": compose,
        }  # fmt: skip
        about = {"base": pipeline.config.base_id, "digest": pipeline.config.base_digest, "model": model, "steps": steps}
        about |= {"guidance": guidance, "fusion": fusion, "w": w, "scale": scale}
        _write(pipeline, wanted, range(seed, seed + seeds), options, about, out)


def _write(
    pipeline: "ImageRAGTurboPipeline",
    wanted: list[str],
    seeds: range,
    options: dict[str, Any],
    about: dict[str, Any],
    out: Path,
) -> None:
    from tqdm import tqdm

    from imagerag.generation.batch import file_name, labelled_png
    from imagerag.generation.batch import generate as generate_pictures

    out.mkdir(parents=True, exist_ok=True)
    made: list[Generated] = []
    pictures, num_pictures = generate_pictures(pipeline, wanted, seeds, **options), len(wanted) * len(seeds)
    with tqdm(pictures, total=num_pictures, unit=" pictures", disable=None) as bar:
        for number, picture in enumerate(bar):
            (out / file_name(number, picture)).write_bytes(labelled_png(picture, about))
            if number < _MAX_ROWS_IN_SHEET * len(seeds):
                made.append(picture)
    _save_sheet(made, len(seeds), out / "grid.png")
    left_out = "" if len(wanted) <= _MAX_ROWS_IN_SHEET else f" (the first {_MAX_ROWS_IN_SHEET} prompts)"
    typer.echo(f"{num_pictures} pictures in {out}, all in {out / 'grid.png'}{left_out}")


def check_alone(models: Sequence[str], **others: object) -> None:
    """Check that no option is given together with a registered model that has its own value of it.

    Raises:
        UserError: if one is.
    """
    given = [name for name, value in others.items() if value is not None]
    if models and given:
        raise UserError(
            f"a registered model has its own base model, adapter and index: leave out --{given[0]}, or --model "
            f"{models[0]}"
        )


def check_scale(scale: float | None, *, has_adapter: bool) -> None:
    """Check that there is an adapter if a scale is given.

    Raises:
        UserError: if there is none.
    """
    if scale is not None and not has_adapter:
        raise UserError(
            "--scale is of what an adapter adds: name one by --adapter, or a model that has one by --model; got "
            f"--scale {scale:g} alone"
        )


@contextmanager
def open_model(model: str) -> "Iterator[ImageRAGTurboPipeline]":
    """Download and verify a registered model (`champion`, `3`, `mugs@champion` or `mugs/3`), and yield its pipeline."""
    from imagerag.cli.quiet import quiet_models
    from imagerag.registry.fetch import opened
    from imagerag.settings import settings_of

    name, _, alias_or_version = model.replace("@", "/").rpartition("/")
    settings = settings_of(name or None)
    quiet_models()
    with opened(settings, alias_or_version) as pipeline:
        yield pipeline


def open_pipeline(base: str, adapter: str | None) -> "ImageRAGTurboPipeline":
    """Load a pipeline of a base model, with an adapter from a folder or an object store's URI if given."""
    from imagerag.base.files import check_spec

    check_spec(base)
    from imagerag.cli.quiet import quiet_models

    quiet_models()
    from imagerag.base.model import load_base
    from imagerag.generation.finetuned import load_finetuned
    from imagerag.generation.pipeline import ImageRAGTurboPipeline
    from imagerag.storage.files import local_copy

    loaded, trained = load_base(base), None
    if adapter is not None:
        with local_copy(adapter) as folder:
            trained = load_finetuned(folder, loaded)
    pipeline = ImageRAGTurboPipeline.from_base(loaded, trained)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_prompts(prompts: list[str], prompt_file: Path | None) -> list[str]:
    """Return the prompts from the command line and from a file.

    Raises:
        UserError: if there are none, one is empty, or the file can't be read.
    """
    if prompt_file is not None:
        try:
            lines = prompt_file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file has to be a readable text file; {prompt_file}: {error}") from error
        prompts = [*prompts, *(line.strip() for line in lines if line.strip())]
    if not prompts:
        raise UserError("give at least one prompt, or a --prompt-file with some")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty")
    return prompts


def _save_sheet(made: "list[Generated]", columns: int, path: Path) -> None:
    from imagerag.generation.sheet import sheet, to_png
    from imagerag.generation.xmp import to_xmp

    rows = [made[start : start + columns] for start in range(0, len(made), columns)]
    grid = sheet([(row[0].prompt, [picture.image for picture in row]) for row in rows])
    references = {each.id: each for picture in made for each in picture.references if each.weight}
    path.write_bytes(to_png(grid, xmp=to_xmp(references.values())))
