"""Contradictions between the sections of a run's configuration, which no section can notice by itself."""

import re
from collections.abc import Sequence

from .error_messages import Contradiction
from .protocols import RunConfig, values_of
from .quickstart_names import NAMES
from .settings import ModelConfig, StudentConfig


def contradictions(config: RunConfig, heads: Sequence[str]) -> list[Contradiction]:
    """Return every contradiction.

    Args:
        heads: terms on the student's own predictions; one of them is needed to learn from.
    """
    problems = _student_problems(config.student)
    if not config.data.train:
        problems.append(Contradiction("data", "no training data: give --train-data"))

    if config.data.lacks_tokenizer and not config.teacher.is_captured:
        problems.append(Contradiction("data", "captures hold tokens, not text: give their tokenizer, data.tokenizer"))

    # without a weight on a term of its own predictions, the student is never told a next token
    terms = config.curriculum.used()
    if not terms & set(heads):
        message = f"nothing to learn from: the weights of {', '.join(heads)} are 0; raise one of them"
        problems.append(Contradiction("curriculum", message))

    if config.teacher.name is None:
        problems += _problems_without_teacher(config, terms)

    problems += _served_problems(config, terms - set(heads))
    if config.teacher.is_captured:
        problems += _problems_of_captures(config, terms)
    if config.several_teachers:
        problems += _problems_of_several_teachers(config, terms, terms - set(heads))

    if config.curriculum.uses_own_text:
        problems += _own_text_problems(config, terms)
    problems += _stream_problems(config)
    if config.loss.select_by == "first_student":
        problems += _first_student_problems(config, terms)

    problems += _order_problems(config)
    if config.cache.folder is not None and config.cache.top_k == 1 and config.loss.needs_several_tokens:
        message = "cache.top_k 1 leaves KD one outcome of a position under loss.tail renormalise: give 2 or more"
        problems.append(Contradiction("cache", message))

    if config.training.patience and not config.evaluation.every:
        message = "training.patience counts evaluations, and evaluation.every is 0: give --eval-every"
        problems.append(Contradiction("evaluation", message))
    return problems


def _student_problems(student: StudentConfig) -> list[Contradiction]:
    """Return the contradictions between the student's beginning and its adapter."""
    problems: list[str] = []
    if student.name is None:
        problems.append("no student: give --student ID or DIR")

    # an adapter is a small change to weights that are good already
    if student.lora.enabled and student.name in NAMES:
        problems.append("--lora adapts trained weights, and the embedded student has none: give --student ID or DIR")
    if student.lora.enabled and student.init == "random":
        problems.append("lora adapts trained weights, and init is random: leave out --lora or the random start")
    if student.lora.enabled and student.layers is not None:
        problems.append(f"an adapter cannot heal a model of fewer layers: leave out --lora or {student.init}")
    if student.layers is not None and student.name in NAMES:
        problems.append(f"{student.init} takes trained layers, and the embedded student has none: give --student")

    if student.lora.merge and not student.lora.enabled:
        problems.append("lora.merge is for a student with an adapter: give --lora too")
    return [Contradiction("student", problem) for problem in problems]


def _problems_of_several_teachers(config: RunConfig, terms: set[str], state_terms: set[str]) -> list[Contradiction]:
    """Return the settings that do not go with several teachers.

    Args:
        terms: those that weigh more than 0 at some time.
        state_terms: those of them on hidden states.
    """
    problems = []
    if "span" in terms:
        problems.append("span: the spans of text of each differ: give span the weight 0, or one teacher")
    if config.curriculum.uses_own_text:
        problems.append("curriculum.on_policy: the student's own text goes to one teacher: give it 0, or one teacher")

    if config.loss.select_by == "first_student":
        problems.append("loss.select_by first_student chooses for one teacher: choose another, as student_entropy")
    if any(values_of(config.curriculum.sample_weights)):
        problems.append("curriculum.sample_weights: windows are weighed beside one teacher: give it 0, or one teacher")
    served = [str(teacher.name) for teacher in config.several_teachers if teacher.is_served]
    if len(served) > 1:
        problems.append(f"{' and '.join(served)} are behind servers, with one key: name one of them, or local models")
    if captured := [str(teacher.name) for teacher in config.several_teachers if teacher.is_captured]:
        problems.append(f"{' and '.join(captured)} is of captures, which are read alone: name local models")
    devices = {teacher.device for teacher in config.several_teachers} & {"spread", "sharded"}
    if devices:
        problems.append(f"got device {' and '.join(sorted(devices))}, expected auto, cpu or a GPU for each, as cuda:1")
    if NAMES & {teacher.name for teacher in config.several_teachers}:
        problems.append("the embedded teacher is trained for one run alone: name other models")
    if config.loss.correction == "channel" and any(config.routes_of_teachers):
        problems.append("loss.correction channel is counted on all text: give span or none beside only_for")

    # A route that is misspelt would leave its text without a teacher, silently.
    routes = {route for routes_of_one in config.routes_of_teachers for route in routes_of_one}
    known = list(dict.fromkeys([*config.data.train, *([config.data.eval] if config.data.eval else [])]))
    unknown = sorted(routes - {*known})
    if config.route_column is None and unknown:
        problems.append(f"only_for: got {', '.join(unknown)}, expected sources of this run: {', '.join(known)}")
    if config.route_column is not None and config.data.document_start is not None:
        problems.append("only_for: a column is of whole rows, which data.document_start joins: leave out one of both")

    if state_terms and config.routes_of_teachers[0]:
        problems.append(
            f"{' and '.join(sorted(state_terms))} compare with the first teacher, which is for some text alone "
            "(only_for): put one for all text first, or give these terms 0"
        )
    return [Contradiction("teachers", f"several teachers: {problem}") for problem in problems]


def _first_student_problems(config: RunConfig, terms: set[str]) -> list[Contradiction]:
    """Return the settings that contradict positions which the student chooses before training.

    Args:
        terms: those that weigh more than 0 at some time.
    """
    problems = []
    if config.student.init == "random":
        problems.append("a student with random weights is in doubt everywhere")
    if config.curriculum.uses_own_text:
        problems.append("text that the student writes later (curriculum.on_policy) has no positions chosen before")
    if "span" in terms:
        problems.append("span needs the teacher everywhere, and it is asked about the chosen positions alone")
    if any(values_of(config.curriculum.sample_weights)):
        problems.append("curriculum.sample_weights need the teacher everywhere, as span does")
    remedy = "choose another loss.select_by, such as student_entropy"
    return [Contradiction("loss", f"select_by first_student: {problem}; {remedy}") for problem in problems]


def _order_problems(config: RunConfig) -> list[Contradiction]:
    """Return the settings that contradict the order of the training text."""
    problems = []
    order = config.data.order
    if order == "random" and config.curriculum.opens_text:
        problems.append(
            "curriculum.open_text opens the easiest text first, and data.order random knows none: give "
            "data.order length or teacher_loss"
        )
    if order != "random" and not config.curriculum.opens_text:
        problems.append(
            f"data.order {order} changes nothing while curriculum.open_text is 1: give it a ramp, such as "
            "--set 'curriculum.open_text={points: [[0, 0.2], [0.8, 1]]}'"
        )

    if order == "teacher_loss":
        problems += _teacher_loss_problems(config)
    return [Contradiction("data", problem) for problem in problems]


def _teacher_loss_problems(config: RunConfig) -> list[str]:
    """Return what keeps the teacher from putting the training text in order."""
    problems = []
    if config.teacher.name is None:
        problems.append("data.order teacher_loss: there is no teacher: give --teacher, or data.order length")
    if config.several_teachers:
        problems.append("data.order teacher_loss is of one teacher: give data.order length, or one teacher")
    if config.loss.select_by == "first_student":
        problems.append(
            "data.order teacher_loss reads every position, and select_by first_student asks the teacher about chosen "
            "ones alone: give data.order length, or another loss.select_by"
        )
    return problems


def _served_problems(config: RunConfig, state_terms: set[str]) -> list[Contradiction]:
    """Return the settings that contradict a teacher behind a server, or of captures, or that only such a one has.

    Args:
        state_terms: terms on hidden states that weigh more than 0 at some time.
    """
    of_run = config.several_teachers or [config.teacher]
    addresses = [teacher.name for teacher in of_run if re.match(r"[\w.-]+:\d+(/|$)", teacher.name or "")]
    if addresses:
        return [Contradiction("teacher", f"got an address without http://: give --teacher http://{addresses[0]}")]
    if config.teacher.model is not None and not any(teacher.is_elsewhere for teacher in of_run):
        message = "teacher.model names a model at a server: give --teacher http://HOST:PORT/v1"
        return [Contradiction("teacher", message)]

    # Terms on hidden states compare with the first of several.
    problems = []
    for number, teacher in enumerate(of_run):
        if teacher.is_elsewhere:
            problems += _problems_elsewhere(
                teacher, state_terms if number == 0 else set(), is_one_of_several=bool(config.several_teachers)
            )
    return problems


def _problems_elsewhere(teacher: ModelConfig, state_terms: set[str], *, is_one_of_several: bool) -> list[Contradiction]:
    """Return the settings that contradict one teacher that is elsewhere.

    Args:
        state_terms: terms that compare hidden states with its own.
        is_one_of_several: flags of a single teacher do not reach it.
    """
    subject = "captures do" if teacher.is_captured else "a server does"
    problems = []
    if teacher.tokenizer is None:
        remedy = "give --teacher-tokenizer ID or DIR"
        if is_one_of_several:
            remedy = f"give it in a recipe, teachers: [{{name: {teacher.name}, tokenizer: ID or DIR}}, ...]"
        problems.append(f"{subject} not hand out its tokenizer: {remedy}")

    if state_terms:
        names = " and ".join(sorted(state_terms))
        problems.append(
            f"{names} compare hidden states, which {subject} not tell: set them to 0, or give a teacher in this "
            "process (--teacher ID or DIR)"
        )

    if teacher.device != "auto" or teacher.dtype != "auto":
        reason = "captures need neither" if teacher.is_captured else "those of a served teacher are the server's"
        problems.append(f"device and dtype: {reason}: leave teacher.device and teacher.dtype at auto")
    return [Contradiction("teacher", problem) for problem in problems]


def _problems_of_captures(config: RunConfig, terms: set[str]) -> list[Contradiction]:
    """Return the settings that need more than the most probable tokens of a fixed text.

    Args:
        terms: those that weigh more than 0 at some time.
    """
    unlisted = "captures do not have the probability of a real token that is not listed"
    problems = []
    if "span" in terms:
        problems.append(f"span: {unlisted}: set it to 0")
    if any(values_of(config.curriculum.sample_weights)):
        problems.append(f"curriculum.sample_weights: {unlisted}: set it to 0")
    if config.curriculum.uses_own_text:
        problems.append("curriculum.on_policy: captures say nothing of the student's own text: set it to 0")
    return [Contradiction("teacher", f"{config.teacher.name}: {problem}") for problem in problems]


def _own_text_problems(config: RunConfig, terms: set[str]) -> list[Contradiction]:
    """Return the settings that contradict a student that learns from its own text.

    Args:
        terms: those that weigh more than 0 at some time.
    """
    problems = []
    if config.teacher.name is None:
        problems.append("curriculum.on_policy: without a teacher nobody corrects the student's text: give --teacher")
    elif not terms - {"lm"}:
        problems.append("curriculum.on_policy: lm learns nothing from the student's own text: give kd or span a weight")
    if config.teacher.device == "sharded":
        problems.append("curriculum.on_policy: a sharded teacher cannot answer about it: choose another teacher.device")

    prompt_tokens = config.on_policy.prompt_tokens
    if prompt_tokens >= config.data.max_length:
        problems.append(
            f"on_policy.prompt_tokens {prompt_tokens} leaves no room in windows of data.max_length "
            f"{config.data.max_length} tokens: give a smaller one"
        )
    return [Contradiction("on_policy", problem) for problem in problems]


def _stream_problems(config: RunConfig) -> list[Contradiction]:
    """Return the settings that contradict text that comes as a stream, or that only a stream has."""
    data = config.data
    if not data.streaming:
        message = "data.mixture draws from sources that are read as streams: give --set data.streaming=true"
        return [Contradiction("data", message)] if data.mixture is not None else []

    problems = []
    if config.training.max_steps is None:
        problems.append("nobody knows how many windows there are: give --max-steps, which says where training ends")
    if data.max_documents is not None:
        problems.append("data.max_documents ends a text that is read once: leave it out, --max-steps ends training")
    if config.cache.folder:
        problems.append("a teacher cache is of windows that are all known: leave out --cache-teacher")
    if config.curriculum.uses_own_text:
        problems.append("curriculum.on_policy chooses among all windows: give it 0")
    if config.loss.select_by == "first_student":
        problems.append("loss.select_by first_student looks at all windows before: choose another, as student_entropy")
    if data.order != "random":
        problems.append("data.order puts all windows in order before training: leave it at random")
    if any(config.routes_of_teachers):
        problems.append("only_for gives windows of some text to a teacher, and a stream mixes all text: leave it out")

    if data.mixture is not None and {*data.mixture} != {*data.train}:
        named, expected = ", ".join(data.mixture) or "no source", ", ".join(data.train)
        problems.append(f"data.mixture: got weights of {named}, expected one of each source of data.train: {expected}")
    return [Contradiction("data", f"streaming: {problem}") for problem in problems]


def _problems_without_teacher(config: RunConfig, terms: set[str]) -> list[Contradiction]:
    """Return the settings that need a teacher, in a run that has none.

    Args:
        terms: those that weigh more than 0 at some time; all but the language model's need a teacher.
    """
    problems: list[str] = []
    signals = sorted(terms - {"lm"})
    if signals:
        weigh, them = ("weighs", "it") if len(signals) == 1 else ("weigh", "them")
        problems.append(
            f"no teacher, but {' and '.join(signals)} {weigh} more than 0: give --teacher, or set {them} to 0"
        )
    if config.evaluation.without_teacher:
        problems.append("evaluation.without_teacher compares with a run that has a teacher: give --teacher")
    if config.cache.folder:
        problems.append("a teacher cache, but no teacher: give --teacher")
    return [Contradiction("teacher", problem) for problem in problems]
