"""The page opens anywhere, loads nothing, and whatever a model wrote stays text."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from tests.utils.report.test_report import RESULTS, run, scores
from utils.report.charts import THEME, curves_as_svg, routing_as_svg
from utils.report.html import collapsed, page
from utils.report.report import REPORT_HTML, write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
EVIL = '</pre><script>alert("1")</script><img src=http://a.b/c> & \x00\x1b[31m \u202e $title'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COUNTS = {"tokens": 20, "at_boundary": 10, "anchored": 15}
TOKENS = [{"text": EVIL, "probability": 0.9}, {"text": 90 * "z", "probability": 0.1}]
DIFFERENCE = {"context": EVIL, "next": "\n", "kl": 3.2, "teacher": TOKENS, "student": TOKENS}
CHOSEN = {"window": 1, "windows": 9, "step": 1, "share": 0.2, "largest_share": 0.2, "select_by": "divergence"}
ROUTING = {"step": 9, "student_layers": [1, 2], "teacher_layers": [3, 4], "weights": [[0.9, 0.1], [0.2, 0.8]]}


class Page(HTMLParser):
    """Elements, attributes and text of a page; an element that is not closed in its turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.texts.append(data)


def whole() -> str:
    """A page with everything in it."""
    texts = (EVIL, 400 * "x", 300 * " \n")
    samples = [dict.fromkeys(("prompt", "teacher", "student", "baseline", "initial_student"), text) for text in texts]
    score = {"value": 0.75, "stderr": 0.01}
    task = {"task": EVIL, "metric": "acc", "higher_is_better": True, "documents": 2376, "student": score}

    results = RESULTS | {
        "samples": samples,
        "baseline": scores(1.1, 5),
        "tasks": [{**task, "teacher": score, "initial_student": score}],
        "alignment": {"spans": [{"student": [EVIL, " a"], "teacher": [120 * "y"]}] * 9, **COUNTS},
        "differences": [DIFFERENCE, DIFFERENCE],
        "chosen_positions": CHOSEN | {"tokens": [(EVIL, True), (" b", False)]},
    }

    pictures = [*curves_as_svg(run(kd=0.7, lm=0.3), results, run(lm=1.0)), routing_as_svg(ROUTING)]
    settings = {"teacher": {"name": "a/b"}, "student": {"name": EVIL}, "training": {"seed": 1}, "output_dir": EVIL}
    notes = {"notes": {"device": "cpu"}, "environment": {"packages": {"torch": "2.13"}}}
    return page(EVIL, results, pictures, settings, notes, [f"[RED FLAG] number {n} {EVIL}" for n in range(40)])


def test_the_page_is_well_formed_and_has_all_parts():
    read = Page(whole())
    text = " ".join(read.texts)

    for part in ("Distilled student", "1.0000", "fewer bits per byte than before training", "[RED FLAG] number 29"):
        assert part in text
    for part in ("and 10 more in train.log", "AutoModelForCausalLM", "seed", "torch", "Beginning", "closed 90.0%"):
        assert part in text

    for part in (
        "One text, two tokenizations",
        "Where the teacher is listened to",
        "What the teacher would have said",
        "3.20",
        "Tasks",
        "Repeat the run",
    ):
        assert part in text

    assert read.tags.count("svg") == 6 and text.count("Teacher") >= 4 and "number 30" not in text


def test_what_a_student_of_conversations_says_are_answers_to_prompts():
    asked, plain = page("a", RESULTS | {"prompted": True}), page("a", RESULTS)
    assert ">Prompt<" in asked and "answers to the same prompts" in asked and "Beginning" not in asked
    assert ">Beginning<" in plain and "continuations of the same beginnings" in plain
    assert "apply_chat_template(messages, add_generation_prompt=True" in asked and "apply_chat_template" not in plain


def test_a_run_that_came_to_its_end_is_finished_and_not_stopped():
    ended = page("a", RESULTS | {"run": {"steps": 5, "stopped_by": "finished"}})
    assert "training finished" in ended and "stopped by" not in ended
    stopped = page("a", RESULTS | {"run": {"steps": 5, "stopped_by": "max_hours"}})
    assert "stopped by max_hours" in stopped and "finished" not in stopped


def test_the_page_loads_nothing_and_runs_nothing():
    text = whole()
    read = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(read.tags)
    loads = [value for name, value in read.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert loads and all(value.startswith(("data:image/png", "#")) for value in loads)
    assert not any(name.startswith("on") for name, _ in read.attributes)
    style = re.search(r"<style>.*?</style>", text, flags=re.DOTALL)[0]
    assert "url(" not in style and "@import" not in style
    assert re.search(r"default-src 'none'", text)


@given(st.text())
def test_any_text_is_shown_as_it_is(written):
    read = Page(page("a", RESULTS | {"samples": [{"prompt": "", "student": f"<{written}>"}]}, [], {}, {}, [written]))
    shown = re.sub("[\ud800-\udfff\x80-\x9f]", "\ufffd", written.replace("\r\n", "\n"))
    shown = "".join(c if (ord(c) >= 32 and ord(c) != 127) or c in "\t\n" else "?" for c in shown)
    texts = [re.sub("[\u2400-\u241f\u2421]", "?", text) for text in read.texts]
    shown = re.sub("[\u2400-\u241f\u2421]", "?", shown)
    assert collapsed(f"<{shown}>") in texts and "script" not in read.tags
    assert shown in texts or not shown.strip()


def test_a_sample_that_is_mostly_space_is_shown_without_it():
    assert (
        collapsed("\n\n a  b\t\tc \n\n\n\n    d  \n" + 500 * "\n" + 400 * " " + "e")
        == "a b c\n\n    d\n\n            e"
    )
    assert len(collapsed(5000 * " \n")) == 0


def test_every_colour_of_the_curves_follows_the_readers_theme():
    for svg in curves_as_svg(run(kd=0.7, lm=0.3), RESULTS, run(lm=1.0)):
        fixed = set(re.findall(r"#[0-9a-f]{6}\b", svg))
        assert not fixed & {*THEME} and not fixed & {"#000000", "#ffffff"}
        assert "var(--c222222)" in svg and not re.search(r'<svg[^>]* (width|height)="', svg)


def test_warnings_settings_and_environment_are_those_of_the_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("training: {seed: 7}\n\n# environment: {place: moon}\n# notes: {a: b}\n")
    (tmp_path / "train.log").write_text(
        "2026-01-01 00:00:00 INFO    hello\n"
        "2026-01-01 00:00:00 WARNING [RED FLAG] a <b>\nTraceback\n"
        "2026-01-02 00:00:00 WARNING [RED FLAG] a <b>\n"
    )
    write_report(tmp_path, RESULTS, run(lm=1.0))
    text = "|".join(Page((tmp_path / REPORT_HTML).read_text(encoding="utf-8")).texts)
    assert "moon" in text and "|seed|7|" in text and text.count("[RED FLAG] a <b>") == 1 and "hello" not in text


def test_a_run_without_anything_to_tell_is_still_a_page():
    read = Page(page("a", {"student": scores(1.0, 5)}))
    assert "The run raised none." in read.texts and "Samples" not in read.texts and "details" not in read.tags


NO_BROWSER = "no chromium or chrome is installed: the page is not opened in a browser"


@pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_it_is_drawn_in_light_and_dark(tmp_path, width):
    (tmp_path / "a.html").write_text(whole(), encoding="utf-8")
    bright = {}
    for theme, number in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{theme}.png"
        scheme = f"--blink-settings=preferredColorScheme={number}"
        browse(tmp_path, "a.html", f"--screenshot={picture}", scheme, f"--window-size={width},2400")
        pixels = imread(picture)[..., :3]
        assert pixels.shape[1] == width and pixels.std() > 0.02
        bright[theme] = pixels.mean()
    assert bright["dark"] < 0.3 and bright["light"] > 0.8


@pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)
def test_in_a_browser_nothing_sticks_out_on_a_phone_or_a_desk(tmp_path):
    """Every element ends inside of the page, with all that is folded opened; the page itself runs no script.

    Nor is a number parted where a table just becomes one, or is in a notebook's frame.
    """
    widths = (390, 780, 902, 1280)
    unfolded = html.escape(whole().replace("<details>", "<details open>"))
    frames = "".join(f'<iframe width="{width}" srcdoc="{unfolded}"></iframe>' for width in widths)
    script = """onload = () => { document.title = [...document.querySelectorAll("iframe")].map(frame => {
      const page = frame.contentDocument, elements = [...page.querySelectorAll("body *")];
      const ends = elements.filter(e => !e.closest("svg")).map(e => e.getBoundingClientRect().right);
      return Math.max(page.documentElement.scrollWidth, ...ends) + " " + elements.length }) }"""
    (tmp_path / "b.html").write_text(f"<title></title>{frames}<script>{script}</script>", encoding="utf-8")

    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, "b.html", "--dump-dom"))[1]
    for width, measured in zip(widths, title.split(","), strict=True):
        end, elements = measured.split()
        assert float(end) <= width and int(elements) > 100


def browse(folder: Path, name: str, *options: str) -> str:
    """Return what the browser prints; it runs in a profile of its own, without network."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    alone = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *alone, *quiet, *options, (folder / name).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
