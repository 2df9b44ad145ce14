"""Find the packages `flows` and `tasks`, and check that they belong to this project."""

from importlib import import_module
from pathlib import Path

from imagerag.errors import UserError

DISTRIBUTION = "imagerag-turbo"


def project() -> Path:
    """Return the folder with the packages `flows` and `tasks`: a checkout, or the wheel's installation folder.

    Other distributions may have packages with these names; if both are installed, one overwrites or shadows the other.

    Raises:
        UserError: if a package is missing or belongs to another distribution.
    """
    folders = set()
    for name in ("flows", "tasks"):
        try:
            package = import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"the package {name!r} of {DISTRIBUTION} is missing: install that again") from error
        folder = Path(str(package.__path__[0]) if package.__file__ is None else package.__file__).parent
        if getattr(package, "DISTRIBUTION", None) != DISTRIBUTION:
            raise UserError(
                f"the package {name!r} in {folder} is not that of {DISTRIBUTION}, which has one of this name, too: "
                f"install {DISTRIBUTION} into an environment of its own"
            )
        folders.add(folder.parent)
    if len(folders) > 1:
        found = " and ".join(sorted(map(str, folders)))
        raise UserError(f"the packages 'flows' and 'tasks' belong together; here they are in {found}")
    return folders.pop()
