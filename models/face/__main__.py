"""The command `curriculum-distill`: `train.py` and `verify_fixes.py` of the installed package, from any folder.

    curriculum-distill --batch-size 2 --epochs 1       what `python train.py --batch-size 2 --epochs 1` does
    curriculum-distill chat runs/NAME                  student and teacher of a run, side by side
    curriculum-distill verify --train-data FILE        what `python verify_fixes.py --train-data FILE` does

`python -m curriculum_distillation` is the same; several processes start as
`accelerate launch -m curriculum_distillation ...`.
"""

import sys

from curriculum_distillation.towers import make_importable


def main() -> int:
    """Run the script that the command line names; returns its exit code."""
    make_importable()
    # Before the commands, which take half a second to import.
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()
    if sys.argv[1:2] == ["verify"]:
        del sys.argv[1]
        import verify_fixes

        return verify_fixes.main()

    import train

    return train.main()


if __name__ == "__main__":
    sys.exit(main())
