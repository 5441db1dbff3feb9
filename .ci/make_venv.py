"""Make a virtual environment, or say what this Python lacks for it.

    python3 .ci/make_venv.py .venv

It is read by whatever Python a machine has, so it is written in what all versions of Python 3 understand.
"""

import shutil
import subprocess
import sys

OLDEST = (3, 10)


def problem_with(version):
    """Return what is wrong with a version of Python, or None."""
    if version >= OLDEST:
        return None
    found = ".".join(str(number) for number in version)
    return (
        "Python " + found + " (" + sys.executable + ") is too old: 3.10 or newer is needed.\n"
        "If this machine has a newer one, name it: make train BASE_PYTHON=python3.12"
    )


def make(folder):
    """Return what went wrong while the environment was made, or None; a half-made folder is removed."""
    done = subprocess.run([sys.executable, "-m", "venv", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode == 0:
        return None

    shutil.rmtree(folder, ignore_errors=True)
    version = ".".join(str(number) for number in sys.version_info[:2])
    return (
        done.stdout.decode("utf-8", "replace").strip() + "\n\n"
        "No virtual environment could be made with " + sys.executable + ".\n"
        "On Debian and Ubuntu the module for it is a package of its own: sudo apt install python" + version + "-venv\n"
        "Or install into an environment that you have (README, first screen), and run: make train PYTHON=python"
    )


if __name__ == "__main__":
    problem = problem_with(tuple(sys.version_info[:2])) or make(sys.argv[1])
    if problem:
        sys.exit(problem)
