"""The direction of imports: flows → tasks → imagerag, and each engine only where it belongs."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which modules may import a package. What is not listed may be imported anywhere.
ALLOWED = {
    "prefect": ("flows/", "tasks/", "imagerag/cli/", "imagerag/prefect_app.py"),
    "flows": ("flows/", "imagerag/cli/"),
    "tasks": ("flows/", "tasks/", "imagerag/cli/"),
    "ray": (
        "imagerag/compute.py",
        "imagerag/workers.py",
        "imagerag/cli/submit.py",
        "imagerag/corpus/download.py",
        "imagerag/training/finetune.py",
        "imagerag/training/worker.py",
    ),
    "lance": (
        "imagerag/retrieval/",
        "imagerag/storage/",
        "imagerag/training/data.py",
        "imagerag/training/places.py",
        "imagerag/corpus/stores.py",
    ),
    "lancedb": ("imagerag/retrieval/",),
    "img2dataset": ("imagerag/corpus/",),
    "mlflow": ("imagerag/training/databases.py", "imagerag/training/tracking.py", "imagerag/registry/"),
    "typer": ("imagerag/cli/",),
}


LAYERS = (
    "storage",  # files, locks and tables
    "embedded",  # what ships
    "base",  # base models
    "corpus",  # URLs → shards
    "retrieval",  # the index
    "embedding",  # shards → index
    "hspace",  # fusion, and its features in the index
    "generation",  # pipelines
    "training",
    "evaluation",
    "registry",
    "recipes",  # how what ships was made
    "cli",
)
"""The packages of imagerag, from the bottom to the top: each imports only itself and those before it."""


@cache
def _imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return frozenset(names)


def _sources() -> list[Path]:
    return [path for folder in ("flows", "tasks", "imagerag") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("package", ALLOWED)
def test_only_its_own_modules_import(package: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in _sources()
        if any(name == package or name.startswith(f"{package}.") for name in _imports(path))
    }
    assert importers, f"nothing imports {package}: the rule guards nothing"
    assert {importer for importer in importers if not importer.startswith(ALLOWED[package])} == set()


def test_packages_import_only_what_is_below_them() -> None:
    found = {path.name for path in (ROOT / "imagerag").iterdir() if (path / "__init__.py").exists()}
    assert found == set(LAYERS)
    upwards = []
    for number, layer in enumerate(LAYERS):
        for path in sorted((ROOT / "imagerag" / layer).rglob("*.py")):
            packages = {name.split(".")[1] for name in _imports(path) if name.startswith("imagerag.")}
            upwards += [f"{path.relative_to(ROOT)} imports {each}" for each in packages & set(LAYERS[number + 1 :])]
    assert upwards == []


def _patched(path: Path, package: str) -> set[str]:
    """What a module imports from a package and then sets an attribute of."""
    tree = ast.parse(path.read_text())
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] == package
    }
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"]
    targets = [ast.unparse(node.value) for node in stored] + [ast.unparse(node.args[0]) for node in calls]
    return {target for target in targets if target.partition(".")[0] in imported}


def test_nothing_patches_img2dataset(tmp_path: Path) -> None:
    (tmp_path / "patch.py").write_text("import img2dataset.writer as w\nw.WebDatasetSampleWriter.write = None\n")
    assert _patched(tmp_path / "patch.py", "img2dataset") == {"w.WebDatasetSampleWriter"}
    assert {str(path): found for path in _sources() if (found := _patched(path, "img2dataset"))} == {}


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _sources()}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def _tree(text: str) -> list[str]:
    """Return the paths in CONTRIBUTING.md's tree: two spaces a level, a folder ends in a slash, then a description."""
    block = text.split("## The tree", 1)[1].split("```")[1]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        entry = re.fullmatch(r"( *)([\w.]+/?) +(\S.*)", line)
        assert entry, f"not a name and a description: {line!r}"
        indent, name, _ = entry.groups()
        folders = folders[: len(indent) // 2]
        paths.append("".join([*folders, name]))
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_names_every_module() -> None:
    modules = [str(path.relative_to(ROOT)) for path in _sources() if path.name != "__init__.py"]
    packages = {f"{path.parent.relative_to(ROOT)}/" for path in _sources()}
    listed, there = _tree((ROOT / "CONTRIBUTING.md").read_text()), {*modules, *packages, "infra/", "tests/"}
    assert {path for path in there if path not in listed} == set(), "not in CONTRIBUTING.md's tree"
    assert {path for path in listed if path not in there} == set(), "in CONTRIBUTING.md's tree, but not there"
    assert len(listed) == len(set(listed))


def test_the_papers_symbols_lead_to_code() -> None:
    text = (ROOT / "imagerag/README.md").read_text().split("### Symbols", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for symbol, _, code, places in rows:
        files: list[Path] = []
        for name in re.findall(r"`([^`]+\.py)`", places):
            files.append(files[-1].parent / name if "/" not in name else ROOT / "imagerag" / name)
        assert files, symbol
        found = set(re.findall(r"\w+", "\n".join(file.read_text() for file in files)))
        names = {word for each in re.findall(r"`([^`]+)`", code) for word in re.findall(r"[A-Za-z]\w+", each)}
        names -= {"digest", "h_retr_"}  # the column's name, which is made of a prefix
        assert names - found == set(), f"{symbol}: not in {[file.name for file in files]}"


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from imagerag.cli import app; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "prefect", "lancedb", "open_clip", "pydantic", "pyarrow", "diffusers", "mlflow"}
    assert heavy & set(result.stdout.split()) == set()


def test_no_flow_imports_an_engine_before_it_needs_one() -> None:
    flows = [path.stem for path in sorted((ROOT / "flows").glob("[a-z]*.py"))]
    imports = [f"import flows.{flow}; print('{flow}', *sys.modules)" for flow in flows]
    script = "\n".join(["import sys, imagerag.corpus.corpus", *imports])
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    engines = {"torch", "ray", "lancedb", "img2dataset", "open_clip", "diffusers", "transformers", "mlflow"}
    found = {flow: engines & set(modules) for flow, *modules in map(str.split, result.stdout.splitlines())}
    assert found == {flow: set() for flow in flows}
