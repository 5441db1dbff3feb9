"""Two towers, one junction: who may import whom."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOWERS = ("models", "utils")

FLOORS = {
    "models": [
        {"outputs", "validation", "head_passes", "attention", "token_bytes", "chat_template", "text_start"},
        {"config"},
        {"vocabulary", "alignment", "losses", "causal_lm", "curriculum", "projection", "fused_head"},
        {"pairing", "chat", "teacher", "student_aware_router"},
        {"distillation_framework", "cached_teacher", "encoder_decoder"},
    ],
    "utils": [
        {"errors", "atomic", "paths", "seeding", "progress", "processes", "shell", "mistakes", "git_lfs"}
        | {"device_memory", "streams", "run_layout", "comparability", "model_folders", "advice"},
        {"validation", "data_folders"},
        {"config", "hardware", "logs", "guards", "columns", "sources", "stopping", "meters"}
        | {"checklist", "environment", "families", "forecast", "endings", "sharding", "signal_codec"}
        | {"adapter_folders", "generation"},
        {"data", "checkpoints", "evaluation", "results", "quickstart", "pretrained", "command_line", "run_folder"}
        | {"tracking", "engines", "student_use"},
        {"memory", "contradictions", "zero", "loading"},
        {"plan", "held_out", "preflight", "miniature", "pictures", "adapters"}
        | {"model_card", "hub", "benchmark_tasks", "exported"},
        {"requirements", "students", "run_state", "report_html", "comparison", "out_of_memory", "teacher_cache"}
        | {"rehearsal", "teachers"},
        {"training", "report", "cache_building", "conversation_date", "dry_run"},
    ],
}
"""From the ground up. A module imports only from lower floors, or from its own as `WITHIN_A_FLOOR` tells."""

WITHIN_A_FLOOR = {
    ("utils", "paths", "errors"),
    ("utils", "cache_building", "conversation_date"),
    ("utils", "advice", "errors"),
    ("utils", "forecast", "config"),
    ("utils", "forecast", "families"),
    ("models", "alignment", "vocabulary"),
    ("models", "chat", "pairing"),
    ("models", "fused_head", "causal_lm"),
    ("models", "fused_head", "losses"),
    ("models", "projection", "vocabulary"),
    ("utils", "memory", "zero"),
    ("utils", "seeding", "errors"),
    ("utils", "sharding", "families"),
    ("utils", "model_folders", "git_lfs"),
    ("utils", "sources", "columns"),
    ("utils", "sources", "data_folders"),
}
"""(tower, importer, imported) on one floor; `test_no_cycles` keeps these in order."""


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level and node.module is None:
                found += [(node.level, alias.name) for alias in node.names]
            else:
                found.append((node.level, node.module))
    return found


def inner_imports(tower: str) -> dict[str, set[str]]:
    """Module of a tower -> the modules of that tower it imports."""
    return {
        path.stem: {module.split(".")[0] for level, module in imports(path) if level == 1} for path in sources(tower)
    }


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_imports_itself_relatively_and_never_the_other(tower):
    for path in sources(tower):
        for level, module in imports(path):
            assert level in (0, 1), f"{path.name} reaches out of its tower: {'.' * level}{module}"
            assert level == 1 or module.split(".")[0] not in (*TOWERS, "curriculum_distillation", "train"), (
                f"{path.name} imports {module}"
            )


@pytest.mark.parametrize("tower", TOWERS)
def test_every_module_has_a_floor_and_imports_only_from_below(tower):
    floor = {name: level for level, names in enumerate(FLOORS[tower]) for name in names}
    graph = inner_imports(tower)
    assert set(graph) <= set(floor), f"without a floor: {sorted(set(graph) - set(floor))}"
    assert set(floor) <= set(graph), f"floors without a module: {sorted(set(floor) - set(graph))}"
    for module, wanted in graph.items():
        for other in wanted:
            beside = (tower, module, other) in WITHIN_A_FLOOR and floor[other] == floor[module]
            assert floor[other] < floor[module] or beside, f"{module} (floor {floor[module]}) imports {other}"


@pytest.mark.parametrize("tower", TOWERS)
def test_no_cycles(tower):
    graph = inner_imports(tower)
    while graph:
        free = {module for module, wanted in graph.items() if not wanted & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {module: wanted for module, wanted in graph.items() if module not in free}


def test_only_the_junctions_import_both_towers():
    """Two scripts of a checkout, and the face of the installed package, which lies in no tower once it is there."""
    junctions = {"train.py", "verify_fixes.py", "face/__init__.py"}
    for path in [*ROOT.glob("*.py"), *sources("models/face"), ROOT / "models" / "face" / "__init__.py"]:
        met = {module.split(".")[0] for _, module in imports(path)} & set(TOWERS)
        name = path.name if path.parent == ROOT else f"face/{path.name}"
        assert len(met) < 2 or name in junctions, f"{name} imports both towers"


def test_every_source_file_tells_what_it_is_for():
    for path in [*sources("models"), *sources("utils"), *ROOT.glob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no docstring"


def test_what_is_learned_touches_neither_files_nor_the_command_line():
    """The cache of vocabulary maps is the one exception."""
    for path in sources("models"):
        modules = {module.split(".")[0] for _, module in imports(path)}
        banned = {"argparse", "yaml", "json", "logging", "rich", "tqdm", "accelerate", "datasets"}
        if path.stem != "vocabulary":
            banned |= {"os", "pathlib", "shutil", "tempfile"}
            calls = re.search(r"(?<![.\w])(open|print)\(", path.read_text(encoding="utf-8"))
            assert calls is None, f"{path.name} calls {calls and calls[0]}"
        if path.stem in ("vocabulary", "token_bytes", "chat", "encoder_decoder"):
            banned -= {"json"}  # a tokenizer describes itself in JSON, and a conversation is a list in JSON
        assert not modules & banned, f"{path.name} imports {sorted(modules & banned)}"


def test_every_third_party_import_is_a_declared_dependency():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    sections = [setup["options"]["install_requires"], *dict(setup["options.extras_require"]).values()]
    needed, *extras = ({re.split(r"[<>=\[]", line)[0].lower() for line in text.split()} for text in sections)
    packages = importlib.metadata.packages_distributions()
    brought_along = {"tokenizers", "huggingface_hub", "pyarrow", "packaging"}  # by transformers and datasets
    for path in [*sources("models"), *sources("utils"), ROOT / "train.py"]:
        for level, module in imports(path):
            top = module.split(".")[0]
            if level or top in sys.stdlib_module_names or top in TOWERS or top in brought_along:
                continue
            names = {name.lower() for name in packages.get(top, [top])}
            late = not re.search(rf"^(import|from) {top}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            allowed = needed.union(*extras) if late else needed  # an extra is imported where it is used, or not at all
            assert names & allowed, f"{path.name} imports {top}, which setup.cfg does not ask for"
