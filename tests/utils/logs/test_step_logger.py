"""The log and the metrics of a run are bounded, have one line per message, and survive a kill."""

import io
import json
import logging
import math
import re
import warnings
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from tests.utils.logs.test_progress import Clock, Terminal
from utils.errors import RunError, UserError
from utils.logs import console, progress
from utils.logs.console import setup_logging
from utils.logs.lines import ROUTER_TERMS, evaluation_line, learned_lines, own_text_line, sample_line, training_line
from utils.logs.progress import Progress
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger

TAGS = ("[TOTAL]", "[Eval]")
TWELVE_HOURS = 12 * 3600.0


class _Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ValueError("broken window")


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    yield
    for handler in [h for h in logging.getLogger().handlers if getattr(h, "_of_this_project", False)]:
        logging.getLogger().removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


def record_at(step: int, total: int, **changes) -> dict:
    def term(raw: float, weight: float) -> dict:
        return {"raw": raw, "weight": weight, "weighted": raw * weight, "count": 4096}

    return {
        "step": step,
        "epoch": 3 * step / total,
        "progress": step / total,
        "loss": 5.25,
        "lr": 1e-4,
        "grad_norm": 0.875,
        "tokens_per_second": 12345.6,
        "peak_memory_mb": 2048.0,
        "terms": {"kd": term(32.0, 0.7), "span": term(0.2, 0.0), "lm": term(3.0, 0.3), "feat": term(1.0, 0.1)},
        "kd_nats_per_token": 2.0,
        "coverage": {"anchored": 0.981, "depth0": 0.932},
        "top_k": 256,
        "temperature": 4.0,
        **changes,
    }


def evaluation_at(step: int, split: str = "eval") -> dict:
    return {
        "step": step,
        "split": split,
        "loss": 2.5,
        "perplexity": 12.18,
        "bits_per_byte": 0.9,
        "tokens": 1000,
        "bytes": 4000,
    }


def simulate(output_dir, stream, clock, *, total=25_000, seconds=TWELVE_HOURS, every=100) -> None:
    """A whole run as the loop drives it: steps, logged steps, evaluations and saves, but no training."""
    setup_logging(output_dir)
    display = Progress(stream, clock=clock)
    steps = StepLogger(output_dir, total, every, progress=display)
    display.time_left.expect({"step": total}, {})
    steps.begin(0)
    loop = logging.getLogger("utils.training.loop")

    for step in range(1, total + 1):
        clock.now += seconds / total
        if steps.due(step):
            steps.training(record_at(step, total))
        steps.progress(step)
        if step % 200 == 0:
            loop.debug("saved checkpoints/step-%08d", step)
        if step % 500 == 0:
            steps.evaluation(evaluation_at(step))

    steps.close()
    display.close()


@pytest.mark.parametrize("seconds", [600.0, TWELVE_HOURS, 10 * TWELVE_HOURS])
def test_25000_steps_are_a_line_a_logged_step_and_a_status_line_after_a_minute_of_silence(
    tmp_path, monkeypatch, seconds
):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    simulate(tmp_path, stream, Clock(), seconds=seconds)
    log_lines = (tmp_path / "train.log").read_text().splitlines()
    console_lines = stream.getvalue().splitlines()
    assert len(log_lines) == 250 + 50 + 125
    assert 300 <= len(console_lines) < 300 + 500
    for tag, count in zip(TAGS, (250, 50), strict=True):
        assert sum(tag in line for line in log_lines) == sum(tag in line for line in console_lines) == count
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 250 + 50
    assert max(map(len, console_lines)) < 80


def test_a_notebook_keeps_less_than_a_megabyte_and_a_half_of_12_hours(tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr(progress, "BAR_DRAWS", 500)
    simulate(tmp_path, stream, Clock())
    written = stream.getvalue()
    assert len(written.encode()) < 150_000 + 300 * 120
    assert 400 < written.count("\r") < 2500
    assert "\x1b[1A" not in written  # a saved notebook does not understand cursor movements
    assert written.endswith("\x1b[?25h")  # the cursor is there again


def test_steps_are_due_by_number_alone_and_the_first_five_are_not():
    steps = StepLogger(None, 1234, 100, progress=Progress(io.StringIO()))
    due = [step for step in range(1235) if steps.due(step)]
    assert due == [*range(100, 1201, 100), 1234]


def test_a_logged_step_is_one_line_with_the_terms_that_are_on():
    line = training_line(record_at(100, 25_000), 25_000, seconds_left=12_345)
    assert line == (
        "[TOTAL] step 100/25000 loss 5.250 kd 32.00 lm 3.000 feat 1.000 lr 1.0e-04 norm 0.875 12.3k tok/s 2.0 GB "
        "3:25:45 left"
    )
    failed = training_line(record_at(100, 25_000, loss=None, grad_norm=None, peak_memory_mb=None), 25_000)
    assert failed == "[TOTAL] step 100/25000 loss - kd 32.00 lm 3.000 feat 1.000 lr 1.0e-04 12.3k tok/s"


def test_a_term_that_was_on_for_a_part_of_the_steps_is_shown():
    record = record_at(100, 1000)
    record["terms"]["span"] |= {"weight": 0.0, "weighted": 0.01}
    assert " span 0.200 " in training_line(record, 1000)


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 100, 119])
def test_a_narrow_console_lacks_what_matters_least(columns):
    record = record_at(12_300, 25_000, loss=math.pi, grad_norm=12345.678)
    record["terms"] |= {name: {"raw": 0.1234567, "weight": 0.1, "weighted": 0.01} for name in ROUTER_TERMS}
    line = training_line(record, 25_000, 100_000, columns=columns)
    assert len(line) <= max(columns, len("[TOTAL] step 12300/25000 loss 3.142"))
    assert line.startswith("[TOTAL] step 12300/25000 loss 3.142")
    assert ("left" in line) == (columns >= 60) and (" layer " in line) == (columns >= 119) and "GB" not in line


def test_an_evaluation_is_one_line_and_its_sample_another():
    assert evaluation_line(evaluation_at(100)) == "[Eval] step 100 bits/byte 0.9000 perplexity 12.18 loss 2.500"
    sample = {"prompt": "Once upon a time, there was a\nlittle girl", "text": " who  liked\n" + "very " * 100}
    whole = sample_line(sample)
    assert whole.startswith("[sample] Once upon a time, there was a little girl | who liked very very")
    assert whole.count("very") == 100
    short = sample_line(sample, 70)
    assert short.startswith("[sample] ...ere was a little girl | who") and short.endswith("...") and len(short) <= 70


def test_the_console_shows_less_than_the_file_and_no_clock_where_there_is_little_room(tmp_path, capsys, monkeypatch):
    setup_logging(tmp_path)
    steps = StepLogger(tmp_path, 1000, 100)
    steps.evaluation({**evaluation_at(0), "sample": {"prompt": "Once", "text": "upon " * 100}})
    logging.getLogger("utils.x").debug("nobody can act on this")
    monkeypatch.setenv("COLUMNS", "120")
    logging.getLogger("utils.x").info("wide")
    steps.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["[Eval]", "[sample]"] and len(lines) == 3
    assert len(lines[1]) < 80 and re.fullmatch(r"\d\d:\d\d:\d\d wide", lines[2])
    kept = (tmp_path / "train.log").read_text()
    assert "upon " * 99 in kept and "nobody can act on this" in kept


def test_resume_drops_later_records_and_a_line_cut_by_a_kill(tmp_path):
    steps = StepLogger(tmp_path, 1000, 100, progress=Progress(io.StringIO()))
    for step in (100, 200, 300):
        steps.training(record_at(step, 1000))
        steps.evaluation(evaluation_at(step))
    steps.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + '{"step": 150, "lo')
    resumed = StepLogger(tmp_path, 1000, 100, progress=Progress(io.StringIO()))
    resumed.truncate_after(200)
    assert path.read_text() == "".join(whole[:4])
    resumed.training(record_at(300, 1000))
    resumed.close()
    assert path.read_text() == "".join(whole[:5])


def test_not_a_number_is_null_in_the_metrics(tmp_path):
    steps = StepLogger(tmp_path, 10, 1, progress=Progress(io.StringIO()))
    steps.training(record_at(1, 10, loss=float("nan"), grad_norm=float("inf")))
    steps.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_other_processes_write_nothing(tmp_path, capsys):
    setup_logging(tmp_path, main_process=False)
    steps = StepLogger(tmp_path, 10, 1, main_process=False)
    steps.training(record_at(1, 10))
    steps.evaluation(evaluation_at(1))
    steps.progress(10)
    steps.truncate_after(0)
    steps.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_an_error_is_one_message_on_the_console_and_its_traceback_is_in_the_file(tmp_path, capsys):
    setup_logging(tmp_path)
    for error in (UserError("got 3, expected 4: write 4"), RuntimeError("a fault")):
        try:
            raise error
        except Exception as caught:
            logging.getLogger("train").error("%s", caught, exc_info=True)
    shown, kept = capsys.readouterr().out, (tmp_path / "train.log").read_text()
    assert "Traceback (" not in shown and kept.count("Traceback (") == 2
    assert "got 3, expected 4: write 4" in shown and "a fault" in shown
    assert shown.count(str(tmp_path / "train.log")) == 1


def test_without_a_file_an_unexpected_failure_has_its_traceback_on_the_console(capsys):
    setup_logging(None)
    for error in (UserError("a mistake"), RuntimeError("a fault")):
        try:
            raise error
        except Exception as caught:
            logging.getLogger("train").error("%s", caught, exc_info=True)
    shown = capsys.readouterr().out
    assert shown.count("Traceback (") == 1 and shown.index("a mistake") < shown.index("Traceback (")


def test_the_traceback_that_a_data_worker_sends_along_is_not_shown(tmp_path, capsys):
    setup_logging(tmp_path)
    try:
        next(iter(DataLoader(_Broken(), num_workers=1)))
    except ValueError as caught:
        logging.getLogger("train").critical("%s: %s", type(caught).__name__, caught, exc_info=True)
    shown = capsys.readouterr().out
    assert "Traceback (" not in shown and "broken window" in shown and "DataLoader worker process 0" in shown
    assert "Original Traceback (" in (tmp_path / "train.log").read_text()


def test_libraries_repeat_themselves_three_times_at_most(tmp_path, capsys):
    setup_logging(tmp_path)
    for step in range(100):
        logging.getLogger("some.library").warning("deprecated, seen at step %d", step)
        logging.getLogger("some.library").info("chatter")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"python warning {step}", stacklevel=1)
    kept = (tmp_path / "train.log").read_text()
    assert kept.count("deprecated") == kept.count("UserWarning") == console.REPEATS
    assert "chatter" not in kept and capsys.readouterr().out.count("deprecated") == console.REPEATS


def test_long_lines_and_square_brackets_reach_a_captured_console_unchanged(tmp_path, capsys):
    setup_logging(None)
    message = "[KD] " + "word " * 60 + "[red]not markup[/red]"
    logging.getLogger("utils.logs.step_logger").info(message)
    assert capsys.readouterr().out.count("\n") == 1
    logging.getLogger("utils.logs.step_logger").info(message)
    assert message in capsys.readouterr().out


def test_setting_up_again_moves_the_log(tmp_path):
    for name in ("a", "b"):
        setup_logging(tmp_path / name)
        logging.getLogger("utils.x").info("run %s", name)
    assert "run b" not in (tmp_path / "a" / "train.log").read_text()
    assert (tmp_path / "b" / "train.log").read_text().count("run b") == 1


def test_an_evaluation_is_found_by_its_step_and_a_training_step_is_none(tmp_path):
    steps = StepLogger(tmp_path, total_steps=2, every=1, progress=Progress(io.StringIO()))
    assert not steps.has_evaluation(1)
    steps.training(record_at(1, 2))
    assert not steps.has_evaluation(1)
    steps.evaluation({"step": 1, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0, "tokens": 5, "bytes": 5})
    assert steps.has_evaluation(1) and not steps.has_evaluation(2)
    steps.close()


def test_what_is_learned_is_shown_run_by_run_and_in_a_few_lines():
    letters = "what is read|learned\nhere|read"
    ids = [ord(letter) for letter in letters if letter != "|"]
    learned = [n for n, part in enumerate(letters.split("|")) for _ in part]
    lines = learned_lines(ids, [part == 1 for part in learned], lambda run: "".join(map(chr, run)))
    assert lines[0] == f"what is learned from: 12 of {len(ids)} tokens of the student's first window"
    assert lines[1:] == ["[read]    what is read", "[learned] learned\\nhere", "[read]    read"]
    many = learned_lines([65] * 500, [n // 5 % 2 for n in range(500)], lambda run: "long " * 100)
    assert len(many) == 12 and many[-1] == "and 90 more such parts" and max(map(len, many)) < 180


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_on_a_full_disk_metrics_end_the_run_in_one_sentence_and_the_log_is_silent(tmp_path, capsys):
    for name in ("metrics.jsonl", "train.log"):
        (tmp_path / name).symlink_to("/dev/full")
    setup_logging(tmp_path)
    logging.getLogger("train").info("a line that the file cannot take")
    said = capsys.readouterr()
    assert "a line that" in said.out and said.err == ""
    logger = StepLogger(tmp_path, 10, 1)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: No space left"):
        logger.evaluation({"step": 0, "split": "eval", "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0})


def own_text(step: int) -> dict:
    """The record of a round of the student's own text."""
    figures = {"texts": 40, "ended": 0.4, "given_ended": 0.5, "tokens": 61.2, "tokens_95": 128.0}
    opinion = {"repeated_4grams": 0.012, "teacher_bits_per_byte": 1.2342, "kl_nats_per_token": None, "seconds": 2.0}
    return {"step": step, "split": "own_text", "share": 0.5, **figures, **opinion}


def test_a_round_of_own_text_is_one_record_and_line_and_no_evaluation(tmp_path, caplog):
    logger = StepLogger(tmp_path, 10)
    with caplog.at_level("INFO"):
        for step in (4, 4, 8):
            logger.own_text(own_text(step))
    logger.close()

    assert read_metrics(tmp_path / "metrics.jsonl") == [own_text(4), own_text(8)]
    assert not logger.has_evaluation(4)
    assert caplog.text.count("[own text] step 4 40 texts, 40% end, given 50%, 61 tokens, 95 % below 128") == 1
    assert own_text_line(own_text(4), 70) == "[own text] step 4 40 texts, 40% end, 61 tokens, teacher 1.234 bits/byte"

    logger.truncate_after(5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [own_text(4)]
