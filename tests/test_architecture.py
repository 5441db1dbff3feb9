"""Two towers, one junction: who may import whom."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOWERS = ("models", "utils")
JUNCTION = ("utils", "commands")

FLOORS = {
    "models": [
        {"types", "validation", "attention", "mask_checks", "divergences"},
        {"config"},
        {"curriculum", "language_model"},
        {"losses", "document_attention"},
        {"text"},
        {"teacher"},
        {"student_aware_router", "chosen_positions"},
        {"distillation_framework"},
        {"distillation"},
        {"self_check"},
    ],
    "utils": [
        {"errors", "git_lfs", "interrupt", "run_layout", "spread"},
        {"advice", "files", "paths", "seeding"},
        {"machine"},
        {"config"},
        {"interfaces", "parallel"},
        {"logs"},
        {"pretrained"},
        {"captures"},
        {"forecast", "data", "served"},
        {"evaluation"},
        {"on_policy"},
        {"training"},
        {"teacher_cache", "report"},
        {"run", "comparison"},
        {"checks"},
    ],
}
"""Folders, and modules that lie in none, from the ground up: each imports only from lower floors, or from itself."""


def sources(folder: str) -> list[Path]:
    """Return the modules of a folder and of the folders in it, but for the face of the installed package."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "face" not in path.relative_to(ROOT).parts)


def tower_sources(tower: str) -> list[Path]:
    """Return the modules of a tower without the junction, the folder in which the commands bring both together."""
    return [path for path in sources(tower) if path.relative_to(ROOT).parts[:2] != JUNCTION]


def module_name(path: Path) -> str:
    """Return the dotted name of a module in the checkout."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (level, absolute name) of all that a file imports, inside functions too.

    What follows `from package import` counts as a module where there is one of that name.
    """
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]

    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            names += [(node.level, _module_in(module, alias.name)) for alias in node.names]
    return names


def _module_in(package: str, name: str) -> str:
    """Return the module `package.name` if there is one, and else `package`."""
    path = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() else package


def inner_imports(tower: str, parts: int | None = None) -> dict[str, set[str]]:
    """Return module of a tower -> the modules of that tower that it imports; names are cut after `parts` parts."""
    graph: dict[str, set[str]] = {}
    for path in tower_sources(tower):
        name = ".".join(module_name(path).split(".")[:parts])
        inside = {".".join(module.split(".")[:parts]) for level, module in imports(path) if level}
        graph[name] = graph.get(name, set()) | inside - {name}
    return graph


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_imports_itself_relatively_and_never_the_other(tower):
    for path in tower_sources(tower):
        for level, module in imports(path):
            assert not module.startswith("utils.commands"), f"{path.name} imports what is above both towers"
            top = module.split(".")[0]
            if level:
                assert top == tower, f"{path.name} reaches out of its tower: {module}"
            else:
                assert top not in (
                    *TOWERS,
                    "curriculum_distillation",
                    *(script.stem for script in ROOT.glob("*.py")),
                ), f"{path.name} imports {module}"


@pytest.mark.parametrize("tower", TOWERS)
def test_every_folder_has_a_floor_and_imports_only_from_below(tower):
    floor = {f"{tower}.{name}": level for level, names in enumerate(FLOORS[tower]) for name in names}
    graph = inner_imports(tower, parts=2)
    folders = set(graph) - {tower}
    assert folders <= set(floor), f"without a floor: {sorted(folders - set(floor))}"
    assert set(floor) <= folders, f"floors without a module: {sorted(set(floor) - folders)}"
    for folder in folders:
        for other in graph[folder] - {tower}:
            assert floor[other] < floor[folder], f"{folder} (floor {floor[folder]}) imports {other}"


@pytest.mark.parametrize("tower", TOWERS)
def test_no_cycles_among_modules(tower):
    """A face counts as the module that its package's name imports, so that no face closes a circle either."""
    graph = inner_imports(tower)
    while graph:
        free = {module for module, wanted in graph.items() if not wanted & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {module: wanted for module, wanted in graph.items() if module not in free}


def relative_imports(path: Path) -> set[str]:
    """Return the first words of what a file imports from its own package."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.level and node.module
    }


def test_only_the_junction_imports_both_towers():
    """And what starts a command or is the face of the installed package, which lies in no tower once it is there."""
    starters = {"train.py", "face/__init__.py"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "models" / "face").glob("*.py")]:
        name = path.name if path.parent == ROOT else f"face/{path.name}"
        words = {module.split(".")[0] for _, module in imports(path)}
        met = words & set(TOWERS) if path.parent == ROOT else relative_imports(path) & set(TOWERS)
        assert len(met) < 2 or name in starters, f"{name} imports both towers"


def test_every_source_file_tells_what_it_is_for():
    for path in [*sources("models"), *sources("utils"), *ROOT.glob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no docstring"


def test_what_is_learned_touches_neither_files_nor_the_command_line():
    """The cache of vocabulary maps is the one exception."""
    for path in sources("models"):
        modules = {module.split(".")[0] for _, module in imports(path)}
        banned = {"argparse", "yaml", "json", "logging", "rich", "tqdm", "accelerate", "datasets"}
        if path.stem not in ("vocabulary", "tokens"):
            banned |= {"os", "pathlib", "shutil", "tempfile"}
            calls = re.search(r"(?<![.\w])(open|print)\(", path.read_text(encoding="utf-8"))
            assert calls is None, f"{path.name} calls {calls and calls[0]}"
        if path.stem in ("vocabulary", "tokens", "token_bytes", "encoder_decoder", "distillation"):
            banned -= {"json"}  # a tokenizer describes itself in JSON
        if path.stem in ("messages", "chat", "chat_side", "chat_template", "chat_turns"):
            banned -= {"json"}  # a conversation is JSON
        assert not modules & banned, f"{path.name} imports {sorted(modules & banned)}"


def test_every_third_party_import_is_a_declared_dependency():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    sections = [setup["options"]["install_requires"], *dict(setup["options.extras_require"]).values()]
    needed, *extras = ({re.split(r"[<>=\[]", line)[0].lower() for line in text.split()} for text in sections)
    packages = importlib.metadata.packages_distributions()
    scripts = {path.stem for path in ROOT.glob("*.py")}
    brought_along = {"tokenizers", "huggingface_hub", "pyarrow", "packaging"}  # by transformers and datasets
    for path in [*sources("models"), *sources("utils"), *ROOT.glob("*.py")]:
        for level, module in imports(path):
            top = module.split(".")[0]
            if level or top in sys.stdlib_module_names or top in (*TOWERS, *scripts) or top in brought_along:
                continue
            names = {name.lower() for name in packages.get(top, [top])}
            late = not re.search(rf"^(import|from) {top}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            allowed = needed.union(*extras) if late else needed  # an extra is imported where it is used, or not at all
            assert names & allowed, f"{path.name} imports {top}, which setup.cfg does not ask for"


def test_every_package_is_installed():
    """In a checkout a package that `setup.cfg` does not list is found all the same."""
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = {*setup["options"]["packages"].split()}
    for tower in TOWERS:
        for file in (ROOT / tower).rglob("__init__.py"):
            path = file.parent.relative_to(ROOT)
            if path != Path("models", "face"):  # the face of the whole
                assert ".".join(("curriculum_distillation", *path.parts)) in listed


# ------------------------------------------------------------------------------------------- functions

MOST_LINES, MOST_PARAMETERS, WITHOUT_PARAGRAPH = 40, 7, 15


def code_files() -> list[Path]:
    """Return all files of the product and of its benchmarks."""
    return [*sources("models"), *sources("utils"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.py")]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def body_lines(function: ast.FunctionDef, lines: list[str]) -> list[str]:
    """Return the lines of a function behind its signature and docstring, but for those of functions in it."""
    statements = function.body[ast.get_docstring(function) is not None :]
    if not statements:
        return []

    inner: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and node is not function:
            inner |= set(range(node.lineno, node.end_lineno + 1))
    numbers = range(statements[0].lineno, function.end_lineno + 1)
    return [lines[number - 1].strip() for number in numbers if number not in inner]


def is_code(line: str) -> bool:
    return bool(line) and not line.startswith("#")


def test_a_function_fits_on_a_screen_and_has_paragraphs():
    problems = []
    for path in code_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        for function in functions(path):
            body = body_lines(function, lines)
            size = sum(map(is_code, body))
            place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            if size > MOST_LINES:
                problems.append(f"{place}: {size} lines of code")
            if size > WITHOUT_PARAGRAPH and "" not in body:
                problems.append(f"{place}: {size} lines of code without a paragraph")
    assert not problems, "\n".join(problems)


def test_a_function_has_few_parameters():
    problems = []
    for path in code_files():
        for function in functions(path):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            if count > MOST_PARAMETERS:
                problems.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {count} parameters")
    assert not problems, "\n".join(problems)
