"""The results as one JSON file, and as Markdown to paste into an issue or a report."""

import json
from pathlib import Path

from benchmarks.gpu.parts import BY_NAME
from benchmarks.gpu.targets import verdicts
from benchmarks.measure import table
from utils.files import write_text

JSON_NAME, MARKDOWN_NAME = "gpu.json", "gpu.md"


def write_results(folder: Path, results: dict) -> None:
    """Write both files, whole or not at all: called whenever there is something new."""
    write_text(folder / JSON_NAME, json.dumps(results, indent=1) + "\n")
    write_text(folder / MARKDOWN_NAME, markdown(results))


def markdown(results: dict) -> str:
    """Return everything that was measured as Markdown."""
    machine, toy = results["machine"], results["toy"]
    sections = [f"# {machine.get('gpu', machine['cpu'])}", _head_line(results)]

    if toy:
        sections.append("**Toy sizes: they show that the measurements run. No figure says anything of the device.**")
    else:
        sections.append(_judged(results))

    sections.append(_overview(results))
    sections += [_rows_of(name, part) for name, part in results["parts"].items() if part["rows"]]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head_line(results: dict) -> str:
    machine = results["machine"]
    return (
        f"{machine['date']}; {machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, "
        f"Python {machine['python']}; sizes for {results['scale']}; {results['seconds']:.0f} s in all"
    )


def _judged(results: dict) -> str:
    found = verdicts({name: part["rows"] for name, part in results["parts"].items()})
    if not found:
        return ""
    rows = [[v.figure, v.measured, v.right, "yes" if v.met else "**no**"] for v in found]
    return "## Beside what is right\n\n" + table(["figure", "measured", "right", "met"], rows)


def _overview(results: dict) -> str:
    rows = [
        [name, part["title"], part["state"], f"{part['seconds']:.0f}", _cell(part["why"])]
        for name, part in results["parts"].items()
    ]
    return "## Parts\n\n" + table(["part", "what", "state", "s", "why"], rows)


def _rows_of(name: str, part: dict) -> str:
    """Return the heading and the table of one part; columns in the order in which they first come."""
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    rows = [[_cell(row.get(column)) for column in columns] for row in part["rows"]]
    header = [column.replace("_", " ") for column in columns]
    return f"## {name}: {BY_NAME[name].title}\n\n{table(header, rows)}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
