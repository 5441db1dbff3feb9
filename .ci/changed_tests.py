"""Name the test files that mirror what has changed since the last commit, or since a commit that is given.

    python .ci/changed_tests.py [COMMIT]

Tests mirror the tree: models/text/alignment.py is tested by tests/models/text/test_alignment.py. A module without a
test file of its own stands for the folder's tests. The tests of architecture are always named. Tests that are whole
runs (tests/faults, tests/equivalence, tests/gpu, and the scripts') take minutes: they are left to `make test`.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = "tests/test_architecture.py"
TOWERS = ("models", "utils")
WHOLE_RUNS = ("faults", "equivalence", "gpu")
"""Folders below tests/."""


def changed_files(since: str) -> list[Path]:
    """Return the files that differ from a commit, new ones too, relative to the checkout."""
    commands = (
        ["git", "diff", "--name-only", "--diff-filter=d", since],
        ["git", "ls-files", "--others", "--exclude-standard"],
    )
    names: list[str] = []
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names += done.stdout.splitlines()
    return [Path(name) for name in names]


def tests_of(file: Path) -> list[Path]:
    """Return the test files for a changed file, relative to the checkout; none for what is no module."""
    if file.suffix != ".py":
        return []
    if file.parts[0] == "tests":
        is_quick = file.name.startswith("test_") and len(file.parts) > 2 and file.parts[1] not in WHOLE_RUNS
        return [file] if is_quick else []
    if file.parts[0] not in TOWERS:
        return []

    folder = Path("tests") / file.parent
    own = folder / f"test_{file.stem}.py"
    if (ROOT / own).is_file():
        return [own]
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob("test_*.py"))


def main() -> None:
    """Print the files, one a line."""
    since = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    files = {str(test) for file in changed_files(since) for test in tests_of(file)}
    print("\n".join(sorted(files | {ALWAYS})))


if __name__ == "__main__":
    main()
