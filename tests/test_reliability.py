"""The table of faults in docs/reliability.md is whole, and every test it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def names_in(file: Path) -> set[str]:
    """Names of test functions, also of those that are made by a call and assigned."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in found if name.startswith("test_")}


def test_every_fault_has_a_row_with_a_test_and_every_named_test_exists():
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", TABLE, re.MULTILINE)
    assert len(rows) >= 54, "a row of the table is gone, or no longer reads as one"
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"row {number} names no test"
        for file, test in named:
            assert test in names_in(ROOT / file), f"row {number}: no {test} in {file}"
