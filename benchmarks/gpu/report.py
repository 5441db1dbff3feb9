"""The results as one JSON file, and as Markdown to paste into an issue or a report."""

import json
from pathlib import Path

from benchmarks.gpu.parts import BY_NAME
from benchmarks.gpu.targets import verdicts
from benchmarks.measure import table
from utils.files import write_text

JSON_NAME = "gpu.json"
MARKDOWN_NAME = "gpu.md"


def write_results(folder: Path, results: dict) -> None:
    """Write both files, each whole or not at all; called after every row."""
    write_text(folder / JSON_NAME, json.dumps(results, indent=1) + "\n")
    write_text(folder / MARKDOWN_NAME, markdown(results))


def markdown(results: dict) -> str:
    """Return everything that was measured as Markdown."""
    machine = results["machine"]
    sections = [f"# {machine.get('gpu', machine['cpu'])}", _head_line(results)]

    # No verdict on toy sizes: a ratio of two overheads means nothing.
    if results["toy"]:
        sections.append("**Toy sizes: they show that the measurements run. No figure says anything of the device.**")
    else:
        sections.append(_verdicts(results))

    sections.append(_overview(results))
    for name, part in results["parts"].items():
        if part["rows"]:
            sections.append(_rows_of(name, part))
    return "\n\n".join(section for section in sections if section) + "\n"


def _head_line(results: dict) -> str:
    """Return the line below the title: when, where and at which sizes."""
    machine = results["machine"]
    return (
        f"{machine['date']}; {machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, "
        f"Python {machine['python']}; sizes for {results['scale']}; {results['seconds']:.0f} s in all"
    )


def _verdicts(results: dict) -> str:
    """Return the section of figures that have a target; empty if none was measured."""
    measured = {name: part["rows"] for name, part in results["parts"].items()}
    rows = []
    for verdict in verdicts(measured):
        met = "yes" if verdict.met else "**no**"
        rows.append([verdict.figure, verdict.measured, verdict.right, met])

    if not rows:
        return ""
    return "## Beside what is right\n\n" + table(["figure", "measured", "right", "met"], rows)


def _overview(results: dict) -> str:
    """Return the section with a line for each part."""
    rows = []
    for name, part in results["parts"].items():
        seconds = f"{part['seconds']:.0f}"
        rows.append([name, part["title"], part["state"], seconds, _cell(part["why"])])
    return "## Parts\n\n" + table(["part", "what", "state", "s", "why"], rows)


def _rows_of(name: str, part: dict) -> str:
    """Return the heading and the table of one part; columns in the order in which they first come."""
    # A dict, as a set that is ordered: rows of one part may have other columns.
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))

    rows = [[_cell(row.get(column)) for column in columns] for row in part["rows"]]
    header = [column.replace("_", " ") for column in columns]
    return f"## {name}: {BY_NAME[name].title}\n\n{table(header, rows)}"


def _cell(value: object) -> str:
    """Return a value as the content of a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
