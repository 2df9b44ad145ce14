"""The folder that MLflow loads and serves: a registered model's own folder, its loading code, and the card.

MLflow runs code from this folder: `model_code.py`, anything that `MLmodel` names, a portable model's copy of this
package, and, if it creates an environment, the packages in `requirements.txt`. `code_digest` detects changes of all
these files.
"""

import hashlib
import platform
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from imagerag.errors import UserError
from imagerag.registry.card import CARD, GRID
from imagerag.registry.package import INDEX, MANIFEST, Manifest, read
from imagerag.storage.digests import sha256_of

PACKAGE = "package"
"""Name of MLflow's artifact for the model's own folder."""
FOLDER = Path("artifacts", PACKAGE)
"""Path of that artifact in MLflow's folder."""
_SOURCE = Path(__file__).parent.parent
_NOT_FOR_PICTURES = ("embedded/sample/data", "recipes")
_METADATA = (
    "base",
    "base_digest",
    "encoder_id",
    "index_name",
    "index_version",
    "features_digest",
    "training",
    "portable",
)
"""Manifest fields copied to MLflow's model metadata."""
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def write_model(model: Path, folder: Path, manifest: Manifest, card: str, grid: Path | None) -> Path:
    """Write MLflow's folder `model`, which contains the model's own `folder`, and return it."""
    import pandas as pd
    from mlflow.pyfunc import save_model

    from imagerag.registry.serving import MODEL_CONFIG, SIGNATURE

    with TemporaryDirectory() as temporary:
        code = Path(temporary, _SOURCE.name)
        if manifest.portable:
            shutil.copytree(_SOURCE, code, ignore=_not_for_pictures)
        save_model(
            model,
            python_model=str(Path(__file__).with_name("model_code.py")),
            code_paths=[str(code)] if manifest.portable else None,
            artifacts={PACKAGE: str(folder)},
            signature=SIGNATURE,
            model_config=dict(MODEL_CONFIG),
            input_example=(pd.DataFrame({"prompt": ["a red dragon"]}), {"seed": 0, "num_images": 1}),
            pip_requirements=manifest.requirements,
            metadata={name: getattr(manifest, name) for name in _METADATA},
        )
    # MLflow would name this machine's patch release of Python, its pip and its setuptools. Other machines lack these, a
    # folder of the requirements' wheels does too, and nothing has to be built.
    python = ".".join(platform.python_version_tuple()[:2])
    (model / "python_env.yaml").write_text(f'python: "{python}"\ndependencies:\n- -r requirements.txt\n')
    (model / CARD).write_text(card, encoding="utf-8")
    if grid is not None:
        shutil.copy(grid, model / GRID)
    return model


def _not_for_pictures(folder: str, names: list[str]) -> set[str]:
    """Return the names to leave out of a copy of this package: sample drawings, recipes, bytecode caches."""
    at = Path(folder).relative_to(_SOURCE)
    return {name for name in names if name == "__pycache__" or (at / name).as_posix() in _NOT_FOR_PICTURES}


def code_digest(model: Path) -> str:
    """Return a digest of all files that MLflow may run: all but the model's own folder, the card and its grid."""
    found = (path for path in sorted(model.rglob("*")) if path.is_file() and (model / FOLDER) not in path.parents)
    files = ((path.relative_to(model).as_posix(), path) for path in found)
    lines = [f"{name}\0{sha256_of(path)}\n" for name, path in files if name not in (CARD, GRID)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_model(model: Path, digest: str, code: str | None) -> None:
    """Check that MLflow's folder has a manifest with this digest, exactly the files that it lists, and no pickle.

    Args:
        model: MLflow's folder.
        digest: SHA-256 of the manifest, from the version's tag.
        code: `code_digest` of the folder, from the version's tag; None for versions registered without one.

    Raises:
        UserError: if a check fails.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    index = model / FOLDER / INDEX  # read only by Lance, which has no pickles, but files named *.bin
    for path in sorted(model.rglob("*")):
        if path.suffix in _PICKLED and index not in path.parents:
            raise UserError(f"the model has {path.relative_to(model)}, a pickle, which can run code when it is loaded")
    try:
        flavour = Model.load(str(model)).flavors["python_function"]
    except (MlflowException, OSError, KeyError, TypeError) as error:
        raise UserError(f"{model / 'MLmodel'} does not describe a model that MLflow can load: {error}") from error
    if "python_model" in flavour or "model_code_path" not in flavour:
        raise UserError("the model's code is a pickle, which can run other code when it is loaded; MLmodel names it")
    manifest = model / FOLDER / MANIFEST
    found = sha256_of(manifest) if manifest.is_file() else "that of no file"
    if found != digest:
        raise UserError(
            f"{FOLDER / MANIFEST} was changed after the model was registered: its SHA-256 is {found}, and the "
            f"version's tag says {digest}. It is not used: register the model again"
        )
    read(model / FOLDER)
    if code is not None and (found := code_digest(model)) != code:
        raise UserError(
            "what MLflow runs of the model (MLmodel, model_code.py, requirements.txt and what is beside them) was "
            f"changed after the model was registered: its digest is {found}, and the version's tag says {code}. It is "
            "not used: register the model again"
        )
