"""The command `curriculum-distill`: `train.py` and `verify_fixes.py` of the installed package, from any folder.

    curriculum-distill --batch-size 2 --epochs 1       what `python train.py --batch-size 2 --epochs 1` does
    curriculum-distill chat runs/NAME                  student and teacher of a run, side by side
    curriculum-distill verify --train-data FILE        what `python verify_fixes.py --train-data FILE` does

`python -m curriculum_distillation` is the same; several processes start as
`accelerate launch -m curriculum_distillation ...`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run the script that the command line names; returns its exit code."""
    # Both scripts import `models` and `utils`, which Python finds beside them when it runs a script of a checkout. Here
    # it is told where they are: the scripts are beside the two towers, or in a folder there (setup.cfg, package_dir).
    package = __package__ or "curriculum_distillation"
    models = find_spec(f"{package}.models")
    assert models is not None and models.origin is not None
    towers = Path(models.origin).parent.parent
    sys.path[:0] = [str(towers), str(towers / "scripts")]

    if sys.argv[1:2] == ["verify"]:
        del sys.argv[1]
        import verify_fixes

        return verify_fixes.main()

    import train

    return train.main()


if __name__ == "__main__":
    sys.exit(main())
