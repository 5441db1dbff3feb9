"""The claims of README and docs/: every snippet runs, every flag, key, path and link exists.

Command lines are run in `tests/faults/test_documented_commands.py`.
"""

import ast
import re
from pathlib import Path

import pytest
import transformers

import train
from benchmarks import alignment, memory_forecast
from tests.models.tiny import STORIES, byte_bpe, pretend_hub
from tests.toy import digest
from utils.commands import settings as run_config
from utils.config import chat_arguments
from utils.config.build import build
from utils.config.plain import to_plain
from utils.config.schema import keys_of
from utils.config.yaml_files import load_yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
PROSE = {page: BLOCK.sub(lambda m: "" if m[1] == "python" else m[0], text) for page, text in TEXT.items()}
"""Without the blocks of Python code."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --------------------------------------------------------------------- commands, flags, keys, links

FOREIGN = re.compile(
    r"(?:pip|pytest|python -m pytest|python convert_hf_to_gguf\.py|tensorboard|lm_eval|git|export|accelerate launch|"
    r"torchrun)\b"
    r"(?:[^\n`|]|\\\n)*?(?=train\.py|$|\n|`|\|)"
)
"""Commands of other programs, up to a train.py that they start."""
BENCHMARK = re.compile(r"python -m benchmarks\.(\w+)((?:\\\n|[^\n`|])*)")
OF_ACCELERATE = {"--fsdp_version"}
OF_SERVERS = {
    *("--max-logprobs", "--max-model-len", "--logprobs-mode"),
    *("--context-length", "--attention-backend", "--chunked-prefill-size"),
}
OF_BENCHMARKS = {
    flag for file in (ROOT / "benchmarks").rglob("*.py") for flag in re.findall(r'"(--[a-z-]+)"', file.read_text())
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z._-]*[a-z]\b")


def flags_of(command_line_parser) -> set[str]:
    return {option for action in command_line_parser._actions for option in action.option_strings}


@each_page
def test_every_flag_exists(page):
    known, text = flags_of(run_config.parser()) | OF_ACCELERATE | OF_SERVERS, PROSE[page].replace("\\\n", " ")
    for name, arguments in BENCHMARK.findall(text):
        places = (ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks" / name / "__main__.py")
        assert any(place.is_file() for place in places), f"{page.name}: there is no benchmarks.{name}"
        assert set(FLAG.findall(arguments)) <= OF_BENCHMARKS, f"{page.name}: {arguments}"
    known |= OF_BENCHMARKS if "python -m benchmarks." in text else set()
    known |= flags_of(chat_arguments.parser()) if "train.py chat" in text else set()
    found = set(FLAG.findall(FOREIGN.sub(" ", BENCHMARK.sub(" ", text))))
    assert found <= known, f"{page.name}: there is no {', '.join(sorted(found - known))}"


@each_page
def test_every_setting_exists(page):
    keys = keys_of(train.RunConfig)
    sections = "|".join(sorted({path.split(".")[0] for path in keys if "." in path}))
    prose = re.sub(r"\]\([^)]*\)|[\w./-]+/[\w./-]+|\w+\.md", "", PROSE[page])
    for key in re.findall(rf"(?<![\w./])((?:{sections})\.[a-z][a-z_]*(?:\.[a-z_]+)*)\b(?!\()", prose):
        assert any(path == key or path.startswith(f"{key}.") for path in keys), f"{page.name}: there is no {key}"


@each_page
def test_every_piece_of_a_recipe_is_accepted(page, tmp_path):
    for language, block in BLOCK.findall(TEXT[page]):
        if language == "yaml":
            base = to_plain(train.configure(["--config", "quickstart"])[0])
            given = load_yaml(write(tmp_path / "piece.yaml", block))
            # Several teachers stand in place of a single one.
            if "teachers" in given:
                base["teacher"]["name"] = None
            build(train.RunConfig, {**base, **given}, source=page.name)


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_and_path_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there.read_text()), f"{page.name}: no heading {target}"
    for path in re.findall(r"`((?:models|utils|tests|benchmarks|configs|docs)/[\w/.-]+)", TEXT[page]):
        assert (ROOT / path).exists(), f"{page.name}: there is no {path}"


def test_every_page_is_in_the_list_of_pages():
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in TEXT[PAGES[0]], f"README does not lead to docs/{page.name}"


@each_page
def test_every_recipe_it_asks_for_exists(page):
    for name in re.findall(r"--config ([a-z]\w+)", FOREIGN.sub(" ", PROSE[page])):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), f"{page.name}: {name}"


def strings_in_the_source() -> list[str]:
    files = [*ROOT.glob("*.py"), *(file for tower in ("models", "utils") for file in (ROOT / tower).rglob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_message_in_troubleshooting_is_one_that_is_printed():
    """Between the dots, which stand for what differs."""
    printed = strings_in_the_source()
    quoted = re.findall(r"^> `(.*)`$", TEXT[ROOT / "docs" / "troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        parts = [part.strip(" ,;:()") for part in message.split("...")]
        longest = max(parts, key=len)
        assert len(longest) > 10 and any(longest in text for text in printed), message
        rest = " ".join(printed)
        assert all(part in rest for part in parts), message


def test_the_drawn_sentence_is_what_the_two_tokenizers_do(real_models_dir):
    folder, page = real_models_dir / "tokenizers", TEXT[ROOT / "docs" / "how_it_works.md"]
    sentence = "The unperturbed lighthouse studied photosynthesis in 1789."
    drawn = alignment.Setting.of(folder / "qwen2.5", folder / "smollm", sentence).drawing()
    assert f"```\n{drawn}\n```" in page


@pytest.mark.parametrize("row", [memory_forecast.ROWS[i] for i in (0, 5, 12, -2)], ids=lambda row: row[0] + row[3])
def test_the_forecast_in_the_recipes_is_what_is_forecast(row):
    (told,) = re.findall(
        rf"^\| {re.escape(' | '.join(row[:3]))} \| {re.escape(f'`{row[3]}`' if row[3] else '')} \| ([\d.]+) \|",
        TEXT[ROOT / "docs" / "recipes.md"],
        re.MULTILINE,
    )
    assert sum(memory_forecast.forecast(*row).values()) / 2**30 == pytest.approx(float(told), abs=0.1)


# ------------------------------------------------------------------------------------- library.md

LIBRARY = [code for language, code in BLOCK.findall(TEXT[ROOT / "docs" / "library.md"]) if language == "python"]


@pytest.fixture
def scope(monkeypatch, as_installed, tmp_path):
    """The names that docs/library.md takes for granted; tiny models for those that it names."""
    monkeypatch.chdir(tmp_path)
    tokenizers = {"HuggingFaceTB/SmolLM2-360M": byte_bpe(280), "Qwen/Qwen2.5-1.5B": byte_bpe(330)}
    pretend_hub(monkeypatch, tokenizers, num_hidden_layers=2, tie_word_embeddings=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return {"texts": STORIES * 30}


def test_the_library_page_runs_from_top_to_bottom(scope, tmp_path):
    trained = []
    for code in LIBRARY:
        before = digest(scope["pair"].student) if "pair" in scope else None
        exec(code, scope)
        trained.append(before is not None and digest(scope["pair"].student) != before)

    assert trained == [False, True, True, True, False]
    assert scope["trainer"].state.global_step == scope["steps"] >= 2
    assert scope["framework"].router is not None and scope["output"].terms.keys() >= {"kd", "lm", "feat", "attn"}
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert digest(again) == digest(scope["pair"].student)
