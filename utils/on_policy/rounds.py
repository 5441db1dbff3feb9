"""Rounds: every so many optimizer steps the student writes the texts that it learns from in all of them.

    slots --prompts--> engine --ids--> file --windows--> batches of the round's steps

A text is a function of the student's weights at the beginning of the round, the seed, the step and the slot. It is on
the disk before anything is learned from it, so a run that goes on in mid-round learns from the same.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..config.settings import OnPolicyConfig
from ..data.batch_order import Pacing, order_of_epoch
from ..data.batch_source import OwnWindows, StepPlan
from ..interfaces import Collator, OwnPrompt, Pair
from ..logs.progress import Progress
from ..logs.records import OWN_TEXT
from ..machine import device_memory
from ..machine.stop_signals import Interrupted
from ..parallel.processes import on_main_process
from ..spread import spread
from .figures import SlotText, describe, teachers_opinion
from .round_files import RoundFiles, WrittenText
from .sampling import Engine, GenerateEngine, Prompt, SamplingRule, checked_rows, uniforms
from .slots import own_slots
from .warning_signs import WarningSigns

log = logging.getLogger(__name__)

SHOWN_TEXTS = 3
"""Texts of the last round in the report."""


class RoundPlan(StepPlan, Protocol):
    """Division of a run into optimizer steps."""

    @property
    def total_steps(self) -> int: ...


@dataclass(frozen=True)
class RoundMaterial:
    """Everything that the texts of a run are made of."""

    pair: Pair
    windows: Sequence[Mapping[str, Any]]
    """Given ones, by index."""
    collate: Collator
    module: Any
    """The framework that is trained, with `student`, `teacher` and `compare`."""
    share: Callable[[int], float]
    """Optimizer step, counted from 0 -> share of its windows that the student writes."""
    seed: int
    accelerator: Accelerator
    pacing: Pacing | None = None
    """Of windows that are not all open from the first step on."""


class Slot(NamedTuple):
    """A place for a text of the student."""

    step: int
    """Optimizer step that learns from it."""
    number: int
    """In the order of the step's windows."""
    window: int
    """Index of the given window in this place."""


@dataclass(frozen=True)
class Round:
    """Texts that the student has written, as the loop learns from them."""

    first: int
    """Optimizer steps done when it began."""
    windows: OwnWindows
    record: dict[str, Any] | None = None
    """For metrics.jsonl; None where there is nothing new to log."""
    signs: Sequence[str] = ()
    """Warning signs that the texts show."""


class Rounds:
    """Writes and keeps the texts of a run's rounds.

    Args:
        config: lengths and sampling.
        material: what texts are made of.
        engine: writes; None: `GenerateEngine`.
        files: where texts are kept; None: in memory, so that a run that goes on in mid-round writes them anew.
        kept_steps: steps from which the run may go on: those of its checkpoints.
        progress: the display; None: none.
        warn: where red flags go; None: the log.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        material: RoundMaterial,
        *,
        engine: Engine | None = None,
        files: RoundFiles | None = None,
        kept_steps: Callable[[], Iterable[int]] = tuple,
        progress: Progress | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.material = material
        self.engine = GenerateEngine() if engine is None else engine
        self.files = files
        self.kept_steps = kept_steps
        self.progress = Progress(shown=False) if progress is None else progress
        self.signs = WarningSigns(warn)
        self._rule = SamplingRule(material.pair.stop_ids, config.temperature, config.top_p)
        self._current: Round | None = None
        self._shown: tuple[int, list[dict[str, Any]]] | None = None

    @property
    def ends_on_collapse(self) -> bool:
        """A round that shows a warning sign ends the run."""
        return self.config.stop_on_collapse

    def begin(self, plan: RoundPlan, step: int) -> Round:
        """Return the round that a step lies in; its texts are written if that has not been done yet.

        Call it in every process, with the student whole, on its device, and with the weights of this step.

        Raises:
            Interrupted: a signal came while the student wrote, or the hours of the run were over.
            RunError: the texts cannot be written to disk.
            UserError: another engine has written no texts.
        """
        first = step - step % self.config.every
        if self._current is not None and self._current.first == first:
            return self._current

        end = min(first + self.config.every, plan.total_steps)
        slots = self.slots(plan, first, end)
        if not slots:
            return Round(first, OwnWindows(end, {}))

        begun = self._texts_of(slots, first, step)
        windows: dict[tuple[int, int], Any] = {}
        for slot, text in zip(slots, begun.texts, strict=True):
            windows[slot.step, slot.number] = None if text.own is None else text.own.window

        # what a session before this one has measured is in its log
        record = None
        signs: list[str] = []
        if begun.seconds is not None or step == first:
            record = self._record(plan, begun, step, len(slots) / self._places(plan, first, end))
            signs = self.signs.check(record)

        # a round that is taken up again, in smaller micro-batches, is not logged again
        self._current = Round(first, OwnWindows(end, windows))
        return Round(first, self._current.windows, record, signs)

    def truncate_after(self, step: int | None) -> None:
        """Remove the texts of rounds that begin behind a step, where the run goes on; None: it begins."""
        if self.files is not None:
            files = self.files
            on_main_process(self.material.accelerator, lambda: files.remove_after(step))

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, for a checkpoint."""
        return self.signs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.signs.load_state_dict(state)

    def slots(self, plan: RoundPlan, first: int, end: int) -> list[Slot]:
        """Return the places for the student's texts in some steps."""
        orders: dict[int, np.ndarray] = {}
        slots = []
        for step in range(first, end):
            epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
            if epoch not in orders:
                orders[epoch] = order_of_epoch(
                    plan.windows,
                    self.material.seed,
                    epoch,
                    global_batch=plan.global_batch,
                    pacing=self.material.pacing,
                )

            start = step_of_epoch * plan.global_batch
            indices = orders[epoch][start : start + plan.global_batch].tolist()
            for number in own_slots(self.material.share(step), step, len(indices)):
                slots.append(Slot(step, number, indices[number]))
        return slots

    def texts_left(self, plan: RoundPlan, step: int) -> int:
        """Return how many texts each process writes from a step on, about."""
        return len(self.slots(plan, step, plan.total_steps)) // self.material.accelerator.num_processes

    def examples(self, teacher: nn.Module | None) -> dict[str, Any]:
        """Return texts of the last round, beside what the teacher writes behind the same prompts: `step` and `texts`.

        Args:
            teacher: its model; None where that is not in this process.
        """
        newest = self._shown or (None if self.files is None else self.files.newest_shown())
        if newest is None:
            return {}
        step, texts = newest

        chosen = spread(texts, SHOWN_TEXTS)
        others = [None] * len(chosen) if teacher is None else self._teachers_texts(teacher, chosen)
        examples = []
        for shown, other in zip(chosen, others, strict=True):
            examples.append({"prompt": shown["prompt"], "student": shown["text"], "teacher": other})
        return {"step": step, "texts": examples}

    def _teachers_texts(self, teacher: nn.Module, chosen: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """Return what the teacher writes behind the prompts of some texts, drawn by the same rule."""
        pair = self.material.pair
        slots = [Slot(shown["step"], shown["number"], shown["window"]) for shown in chosen]
        prompts = []
        for slot in slots:
            prompt = self._prompt(slot)
            assert prompt is not None, "a text was written behind it"
            prompts.append(Prompt(prompt.teacher.ids.tolist(), self._draws(slot)[1:]))

        end = pair.encoder.end_of_text[1]
        rule = SamplingRule([] if end is None else [end], self.config.temperature, self.config.top_p)
        rows = GenerateEngine()(teacher, prompts, rule, lambda count: None)
        return [pair.tokenizers["teacher"].decode(row, skip_special_tokens=True) for row in rows]

    # --- slots ------------------------------------------------------------------------------------------------------

    def _places(self, plan: RoundPlan, first: int, end: int) -> int:
        """Return the windows of some steps, given or not."""
        places = 0
        for step in range(first, end):
            start = step % plan.steps_per_epoch * plan.global_batch
            places += min(plan.global_batch, plan.windows - start)
        return places

    # --- texts ------------------------------------------------------------------------------------------------------

    def _texts_of(self, slots: Sequence[Slot], first: int, step: int) -> "_RoundTexts":
        """Return the texts of a round: read, or written now by the student of `step`."""
        prompts = [self._prompt(slot) for slot in self._mine(slots)]
        stored = self._stored(slots, first)
        if stored is not None:
            return _RoundTexts(self._slot_texts(slots, prompts, stored), None)

        if step != first:
            log.warning(
                "the student's texts of the round from step %d on are not there: it writes them anew, as it is after "
                "step %d",
                first,
                step,
            )
        start = time.monotonic()
        ids = self._written(slots, prompts)
        seconds = time.monotonic() - start
        texts = self._slot_texts(slots, prompts, ids)
        self._keep(first, slots, ids, texts)
        return _RoundTexts(texts, seconds)

    def _stored(self, slots: Sequence[Slot], first: int) -> list[list[int] | None] | None:
        """Return the ids of every slot as they were kept; None where they are not, or are those of other slots."""
        if self.files is None:
            return None
        files = self.files
        texts = on_main_process(self.material.accelerator, lambda: files.read(first))
        if texts is None or [(text.step, text.slot, text.window) for text in texts] != slots:
            return None
        return [None if text.ids is None else list(text.ids) for text in texts]

    def _mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return this process's share of the items of a round."""
        accelerator = self.material.accelerator
        return items[accelerator.process_index :: accelerator.num_processes]

    def _gathered(self, mine: Sequence[Any]) -> list[Any]:
        """Return the items of all processes in the order of the round, from each one's share."""
        accelerator = self.material.accelerator
        numbers = range(accelerator.process_index, 2**62, accelerator.num_processes)
        pairs = gather_object(list(zip(numbers, mine, strict=False)))
        return [item for _, item in sorted(pairs, key=lambda pair: pair[0])]

    def _draws(self, slot: Slot) -> np.ndarray:
        """Return the random numbers of a slot: one for the prompt, then one for each token."""
        return uniforms(self.material.seed, slot.step, slot.number, 1 + self.config.new_tokens)

    def _prompt(self, slot: Slot) -> OwnPrompt | None:
        """Return what the student goes on from in a slot."""
        window = self.material.windows[slot.window]
        return self.material.pair.own_prompt(window, self.config.prompt_tokens, float(self._draws(slot)[0]))

    def _limit(self, prompt: OwnPrompt) -> int:
        """Return the most tokens that fit behind a prompt."""
        room = self.material.pair.encoder.max_length - len(prompt.student_ids)
        return max(0, min(self.config.new_tokens, room))

    def _written(self, slots: Sequence[Slot], prompts: Sequence[OwnPrompt | None]) -> list[list[int] | None]:
        """Return the ids of every slot, written now; `prompts` are those of this process."""
        material = self.material
        places = [number for number, prompt in enumerate(prompts) if prompt is not None]
        mine = self._mine(slots)
        beginnings = []
        for number in places:
            prompt = prompts[number]
            assert prompt is not None
            draws = self._draws(mine[number])[1 : 1 + self._limit(prompt)]
            beginnings.append(Prompt(prompt.student_ids, draws))

        rows = self._rows(beginnings)
        texts = checked_rows(rows, beginnings, material.pair.encoder.tables[0].rows)
        if material.accelerator.device.type == "cuda":
            device_memory.release()

        ids: list[list[int] | None] = [None] * len(prompts)
        for number, text in zip(places, texts, strict=True):
            ids[number] = text
        return self._gathered(ids)

    def _rows(self, beginnings: Sequence[Prompt]) -> Any:
        """Return what the engine writes behind the prompts of this process.

        Raises:
            Interrupted: in every process, if something ended the writing in one of them.
        """
        ended_by = None
        rows = None
        try:
            with self.progress.over("the student's own text", len(beginnings), "own text", unit="text") as note:
                rows = self.engine(self.material.module.student, beginnings, self._rule, note)
        except Interrupted as interrupted:
            ended_by = str(interrupted)

        # Each has written as much as it could; from here on they wait for one another.
        reasons = [reason for reason in gather_object([ended_by]) if reason is not None]
        if reasons:
            raise Interrupted(reasons[0])
        return rows

    def _slot_texts(
        self, slots: Sequence[Slot], prompts: Sequence[OwnPrompt | None], ids: Sequence[list[int] | None]
    ) -> list[SlotText]:
        """Return the texts of every slot, with their windows."""
        tokenizer = self.material.pair.tokenizers["student"]
        texts = []
        for slot, prompt, row in zip(self._mine(slots), prompts, self._mine(ids), strict=True):
            if prompt is None or row is None:
                texts.append(SlotText(None, [], given_ends=False, prompt=""))
                continue
            own = self.material.pair.own_window(prompt, row)
            shown = tokenizer.decode(prompt.student_ids, skip_special_tokens=True)
            texts.append(SlotText(own, row, given_ends=self._given_ends(slot, prompt), prompt=shown))
        return self._gathered(texts)

    def _given_ends(self, slot: Slot, prompt: OwnPrompt) -> bool:
        """Return whether the given text ends within as many tokens as the student may write."""
        ids = np.asarray(self.material.windows[slot.window]["student_ids"])
        before = np.asarray(prompt.student_ids)
        for start in np.flatnonzero(ids[: len(ids) - len(before) + 1] == before[0]).tolist():
            behind = start + len(before)
            if np.array_equal(ids[start:behind], before):
                return bool(np.isin(ids[behind : behind + self._limit(prompt)], self._rule.stop_ids).any())
        return False

    def _keep(
        self, first: int, slots: Sequence[Slot], ids: Sequence[list[int] | None], texts: Sequence[SlotText]
    ) -> None:
        """Write the texts to disk, and remove those that no checkpoint needs any more."""
        shown = [_shown(slot, text) for slot, text in zip(slots, texts, strict=True) if text.own is not None]
        self._shown = first, shown
        if self.files is None:
            return
        files = self.files
        written = [WrittenText(slot.step, slot.number, slot.window, row) for slot, row in zip(slots, ids, strict=True)]

        def keep() -> None:
            files.write(first, written, shown)
            oldest = min(self.kept_steps(), default=0)
            files.remove_before(oldest - oldest % self.config.every)

        on_main_process(self.material.accelerator, keep)

    # --- figures ----------------------------------------------------------------------------------------------------

    def _record(self, plan: RoundPlan, begun: "_RoundTexts", step: int, share: float) -> dict[str, Any]:
        """Return the record of a round for metrics.jsonl."""
        material = self.material
        windows = [text.own.window for text in begun.texts if text.own is not None and text.own.window is not None]
        opinion = teachers_opinion(
            material.module,
            windows,
            material.collate,
            material.accelerator,
            batch_size=plan.micro_batch,
        )

        speed = None
        if begun.seconds:
            speed = sum(len(text.ids) for text in begun.texts) / begun.seconds
        return {
            "step": step,
            "split": OWN_TEXT,
            "share": share,
            **describe(begun.texts),
            **opinion,
            "seconds": begun.seconds,
            "written_tokens_per_second": speed,
        }


class _RoundTexts(NamedTuple):
    """The texts of a round that begins, or is taken up again."""

    texts: list[SlotText]
    """Of every slot."""
    seconds: float | None
    """That the writing took; None: they were read."""


def _shown(slot: Slot, text: SlotText) -> dict[str, Any]:
    """Return a text as people read it."""
    assert text.own is not None
    return {**slot._asdict(), "prompt": text.prompt, "text": text.own.text, "ended": text.own.ended}
