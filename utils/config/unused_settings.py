"""Settings that a run was given and that change nothing in it: they are told before anything is loaded."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import shorten
from .plain import flatten, to_plain
from .protocols import RunConfig, is_zero_between, points_of, values_of
from .schema import settings_of

LONGEST_VALUE = 60
"""Characters of a setting that are quoted."""

READ_BY = (
    (
        (
            "curriculum.select",
            "curriculum.sample_weights",
            "loss.select_by",
            "loss.temperature",
            "loss.tail",
            "loss.interpolation",
            "loss.correction",
            "loss.min_prefix_mass",
        ),
        ("kd",),
    ),
    (("loss.divergence", "loss.skew"), ("kd", "span")),
    (("loss.span_temperature",), ("span",)),
    (("router.",), ("feat", "rel", "attn", "layer", "contr")),
    (("router.positions", "router.heads"), ("rel", "attn")),
    (("router.gate", "router.prior_width", "router.prior_weight"), ("layer",)),
    (("router.span", "router.contrastive_temperature"), ("contr",)),
)
"""Settings, or beginnings of their keys, and the terms of the loss that alone read them."""


class Unread(NamedTuple):
    """Settings that nothing reads in a run."""

    keys: tuple[str, ...]
    """Dotted, or beginnings of them."""

    reason: str
    """Another setting, with its value."""


def unused_settings(config: RunConfig) -> list[str]:
    """Return a line for each reason for which settings of this run change nothing that is learned.

    Only those are named that somebody has set: that differ from their defaults.
    """
    left = _changed_settings(config)
    lines = []
    for unread in [*_unread_by_terms(config), *_unread_beside_others(config)]:
        named = {key: value for key, value in left.items() if key.startswith(unread.keys)}
        left = {key: value for key, value in left.items() if key not in named}
        if named:
            settings = ", ".join(f"{key} {_in_words(value)}" for key, value in named.items())
            lines.append(f"without effect, since {unread.reason}: {settings}")

    if "kd" in config.curriculum.used() and values_of(config.loss.interpolation)[-1] == 0:
        lines.append(
            f"KD teaches ever less: loss.interpolation {_in_words(to_plain(config.loss.interpolation))} ends where the "
            "student is compared with itself; to lead it to the teacher let the ramp end at 1"
        )
    return lines + _own_text_in_vain(config)


def _own_text_in_vain(config: RunConfig) -> list[str]:
    """Return a line if there is a time at which the student writes text that no term learns from."""
    curriculum = config.curriculum
    # lm does not learn from the student's own text
    teaching = [getattr(curriculum, name).weight for name in curriculum.used() - {"lm"}]
    schedules = [curriculum.on_policy, *teaching]

    turns = {0.0, 1.0}
    for schedule in schedules:
        turns.update(progress for progress, _ in points_of(schedule))

    for start, end in pairwise(sorted(turns)):
        writes = not is_zero_between(curriculum.on_policy, start, end)
        if writes and all(is_zero_between(weight, start, end) for weight in teaching):
            return [
                f"from {start:.0%} to {end:.0%} of the training the student's own text (curriculum.on_policy) teaches "
                "nothing, since all terms but lm weigh 0 there: let the share be 0 too, or keep a weight of kd"
            ]
    return []


def _changed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults, by dotted key."""
    settings = settings_of(type(config))
    values = flatten(to_plain(config))
    return {key: value for key, value in values.items() if key in settings and value != settings[key].default}


def _unread_by_terms(config: RunConfig) -> Iterator[Unread]:
    """Yield the settings of terms whose weight is 0 throughout."""
    used = config.curriculum.used()
    for keys, readers in READ_BY:
        if used.isdisjoint(readers):
            verb = "weighs" if len(readers) == 1 else "weigh"
            yield Unread(keys, f"{', '.join(readers)} {verb} 0 in curriculum")


def _unread_beside_others(config: RunConfig) -> Iterator[Unread]:
    """Yield the settings that another one has switched off."""
    curriculum, loss = config.curriculum, config.loss
    if min(values_of(curriculum.select)) == 1:
        yield Unread(("loss.select_by",), "KD is learned at all positions (curriculum.select 1)")
    if not loss.reads_skew:
        yield Unread(("loss.skew",), f"loss.divergence {loss.divergence} does not read it")
    if len(curriculum.used()) < 2:
        yield Unread(("curriculum.balance",), "there is no second term to balance (curriculum)")
    if config.evaluation.without_teacher and not config.compares_without_teacher:
        reason = "all terms but lm weigh 0 (curriculum), so that the run beside it is the same"
        yield Unread(("evaluation.without_teacher",), reason)
    if not curriculum.uses_own_text:
        yield Unread(("on_policy.",), "the student writes no text to learn from (curriculum.on_policy 0)")

    teachers = config.several_teachers or [config.teacher]
    if config.teacher.name is None:
        yield Unread(("teacher.dtype", "teacher.device"), "there is no teacher (teacher.name null)")
    if not any(teacher.is_served for teacher in teachers):
        yield Unread(("served.",), "no teacher is behind a server (teacher.name)")
    if len(teachers) < 2:
        yield Unread(("mix",), "there are no several teachers (teachers)")
    if config.cache.folder is None:
        yield Unread(("cache.",), "there is no teacher cache (cache.folder null)")

    if not config.student.lora.enabled:
        yield Unread(("student.lora.",), "there is no adapter (student.lora.enabled false)")
    if not config.data.streaming:
        yield Unread(("data.block_bytes", "data.remembered_documents"), "data.streaming is false")
    if not config.evaluation.tasks:
        yield Unread(("evaluation.tasks_",), "there are no tasks (evaluation.tasks)")
    if config.hub.repository is None:
        yield Unread(("hub.private",), "nothing is uploaded (hub.repository null)")


def _in_words(value: Any) -> str:
    """Return the value of a setting: a ramp by its values, another as JSON, cut where it is long."""
    if isinstance(value, dict) and "points" in value:
        return " to ".join(f"{level:g}" for _, level in value["points"])
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shorten(text, LONGEST_VALUE)
