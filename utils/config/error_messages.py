"""What pydantic finds wrong with plain values, in words for those who wrote them."""

from typing import Any

from pydantic import ValidationError


def describe(error: ValidationError, values: Any) -> list[str]:
    """One line for each wrong value; of a union's branches only those the value could have meant are named."""
    by_path: dict[str, list[dict]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(dotted(item["loc"], values), []).append(item)
    lines = []
    for path, items in by_path.items():
        if any(other.startswith(f"{path}.") for other in by_path):
            continue  # a ramp with mistakes inside was also tried as a number
        if isinstance(items[0]["input"], dict) and len(items) > 1:
            items = [item for item in items if not item["type"].startswith("float")]
        where, kind, message = f"{path}: " if path else "", items[0]["type"], items[0]["msg"]
        if kind == "value_error":
            lines.append(where + message.removeprefix("Value error, "))
        elif kind == "missing":
            lines.append(f"{where}missing")
        else:
            wanted = " or ".join(dict.fromkeys(_expected(item) for item in items))
            # Words such as "inf" are read as numbers, and it is the number that is refused.
            given = float(items[0]["input"]) if kind == "finite_number" else items[0]["input"]
            lines.append(f"{where}got {shown(given)}, expected {wanted}")
    return lines


def _expected(item: dict) -> str:
    """What pydantic wanted, as a phrase that follows "expected"."""
    if item["type"] == "dataclass_type":
        ramp = item["ctx"]["class_name"] == "Ramp"
        return "a mapping {points: [[progress, value], ...]}" if ramp else "a mapping"
    if item["type"] in ("string_too_short", "too_short") and isinstance(item["input"], str):
        return "a name that is not empty"
    if item["type"] == "is_instance_of" and item["ctx"]["class"] == "str":
        return "a valid string"
    return item["msg"].removeprefix("Input should be ").split(", unable")[0]


def dotted(location: tuple, values: Any) -> str:
    """The dotted path of an error without pydantic's names of union branches, which are no keys of `values`."""
    parts = []
    for part in location:
        inside = isinstance(values, dict) and part in values
        indexed = isinstance(values, list | tuple) and isinstance(part, int)
        if inside or indexed or not isinstance(part, str) or (isinstance(values, dict) and _is_key(part)):
            parts.append(str(part))
            if inside or (indexed and part < len(values)):
                values = values[part]
    return ".".join(parts)


def _is_key(part: str) -> bool:
    """A missing key, as opposed to the name of a union branch (a class or a built-in type)."""
    return part.islower() and part.isidentifier() and part not in ("float", "int", "str", "bool", "list", "tuple")


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
