"""The two towers under the names by which the commands import them."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TOWERS = ("models", "utils")


def make_importable() -> None:
    """Let Python find `models`, `utils` and the scripts, as it does beside a script of a checkout.

    The scripts are beside the two towers, or in a folder there (setup.cfg, package_dir).

    Raises:
        ImportError: the program has modules of its own with these names.
    """
    models = find_spec(f"{__package__}.models")
    assert models is not None and models.origin is not None
    folder = Path(models.origin).parent.parent

    for name in TOWERS:
        module = sys.modules.get(name)
        place = getattr(module, "__file__", None) or ""
        if module is not None and folder not in Path(place).parents:
            raise ImportError(
                f"this program has a module `{name}` of its own ({place or 'without a file'}), by which name a run "
                f"finds its own one. Run the command in a process of its own: python -m {__package__} --help"
            )

    paths = [str(folder), str(folder / "scripts")]
    sys.path[:0] = [path for path in paths if path not in sys.path]


def distil(*arguments: Any, **settings: Any) -> Any:
    """Do a whole run: what `utils.commands.api.distil` does, with the errors of this package."""
    from .utils.errors import UserError

    make_importable()
    api = import_module("utils.commands.api")
    try:
        return api.distil(*arguments, **settings)
    except api.UserError as error:
        # To the program that called, another class of the same name would be no UserError.
        raise UserError(str(error)) from None
