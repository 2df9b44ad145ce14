"""The folder that MLflow loads and serves: a registered model's own folder, code that loads it, and the card."""

import shutil
from pathlib import Path

from imagerag.digests import sha256_of
from imagerag.errors import UserError
from imagerag.registry.card import CARD, GRID
from imagerag.registry.package import INDEX, MANIFEST, Manifest, read

PACKAGE = "package"
"""The artifact that is the model's own folder."""
FOLDER = Path("artifacts", PACKAGE)
"""Where MLflow puts it."""
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def write_model(model: Path, folder: Path, manifest: Manifest, card: str, grid: Path | None) -> Path:
    """Write MLflow's folder `model` around a model's own `folder`, and return it."""
    import pandas as pd
    from mlflow.pyfunc import save_model

    from imagerag.registry.serving import MODEL_CONFIG, SIGNATURE

    save_model(
        model,
        python_model=str(Path(__file__).with_name("model_code.py")),
        artifacts={PACKAGE: str(folder)},
        signature=SIGNATURE,
        model_config=dict(MODEL_CONFIG),
        input_example=(pd.DataFrame({"prompt": ["a red dragon"]}), {"seed": 0, "num_images": 1}),
        pip_requirements=manifest.requirements,
    )
    (model / CARD).write_text(card, encoding="utf-8")
    if grid is not None:
        shutil.copy(grid, model / GRID)
    return model


def check_model(model: Path, digest: str) -> None:
    """Make sure that MLflow's folder has the manifest of this digest, the files that it lists, and no pickle.

    Raises:
        UserError: if not.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    index = model / FOLDER / INDEX  # only Lance reads that, which has no pickles but files named *.bin
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
