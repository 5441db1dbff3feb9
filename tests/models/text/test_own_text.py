"""Text that the student writes itself: exact tokens, the bytes that the teacher reads, and what is left of no text."""

import copy
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text.chat import ChatEncoder
from models.text.chat_turns import tokenizers_for_chat
from models.text.collate import PairCollator
from models.text.encoder_decoder import SourceEncoder
from models.text.own_text import own_prompt, own_window, require_own_text, stop_ids
from models.text.tokens import END, MARKER, TEXT
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from tests.models.tiny import STORIES, byte_bpe, metaspace, t5_like, wordpiece

STUDENT, TEACHER = byte_bpe(300), byte_bpe(400)


def encoder(student=STUDENT, teacher=TEACHER, length=64) -> PairEncoder:
    return PairEncoder(student, teacher, length)


def prompt_of(pair: PairEncoder, tokens: int = 6, draw: float = 0.0, texts=STORIES[:1]):
    prompt = own_prompt(pair, pair.windows(texts)[0], tokens, draw)
    assert prompt is not None
    return prompt


def ids_of(text: str, tokenizer=STUDENT) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def bytes_of(pair: PairEncoder, side: int, ids) -> bytes:
    return b"".join(pair.tables[side].bytes[token] or b"" for token in ids)


def learned(window: dict, side: str) -> np.ndarray:
    return window[f"{side}_ids"][window[f"{side}_roles"] == TEXT]


@functools.cache
def spellings(teacher) -> VocabularyMap:
    return VocabularyMap.build(STUDENT, teacher)


def collator(pair: PairEncoder, teacher) -> PairCollator:
    return PairCollator(spellings(teacher), pair.end_of_text, max_depth=8)


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("teacher", [TEACHER, metaspace()], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("tokens", [1, 3, 9, 1000])
def test_a_prompt_is_the_begin_of_a_document_up_to_a_byte_where_both_begin_a_token(teacher, tokens):
    pair = encoder(teacher=teacher, length=200)
    window = pair.windows(STORIES[:1])[0]
    prompt = own_prompt(pair, window, tokens, 0.5)
    if tokens == 1:
        # At most the start of a text, and nothing of it.
        assert prompt is None or prompt.student_ids == [STUDENT.bos_token_id]
        return
    student = bytes_of(pair, 0, prompt.student_ids)
    assert student and STORIES[0].encode().startswith(student)
    assert bytes_of(pair, 1, prompt.teacher.ids).lstrip(b" ") == student.lstrip(b" ")
    length = len(window["student_ids"])
    assert len(prompt.student_ids) <= min(tokens, length // 2)
    assert (prompt.student.roles == MARKER).all() and (prompt.teacher.roles == MARKER).all()


def test_a_prompt_ends_with_a_whole_character():
    """Tokens of both models begin in the middle of characters."""
    text = "Жили-были дед да баба. 你好世界 " * 4
    pair = encoder(teacher=STUDENT, length=200)
    window = pair.windows([text])[0]
    ids = window["student_ids"].tolist()
    for tokens in range(3, 40):
        prompt = own_prompt(pair, window, tokens, 0.0)
        if prompt is not None:
            begin = len(prompt.student_ids)
            own = own_window(pair, prompt, ids[begin : begin + 12])
            assert bytes_of(pair, 0, prompt.student_ids).decode() and own.window is not None and not own.broken


def test_every_document_of_a_window_can_be_gone_on_with():
    texts = [f"{story[:40]}." for story in STORIES[:3]]
    pair = encoder(length=400)
    [window] = pair.windows(texts)
    begins = {bytes_of(pair, 0, own_prompt(pair, window, 5, draw).student_ids) for draw in (0.0, 0.4, 0.7, 0.99)}
    assert len(begins) == 3
    assert all(any(text.encode().startswith(begin) for text in texts) for begin in begins)
    for draw in (0.0, 0.4, 0.99):
        assert own_prompt(pair, window, 5, draw).student_ids[0] == STUDENT.eos_token_id  # what each starts with


def test_a_window_without_room_has_no_prompt():
    pair = encoder(length=8)
    window = pair.windows(["ab"])[0]
    assert own_prompt(pair, window, 1, 0.0) is None or len(window["student_ids"]) > 2


# ------------------------------------------------------------------------------------------ what was written


def test_the_tokens_stay_those_that_were_sampled_and_the_teacher_reads_their_bytes():
    """Also where the student's tokenizer would have read its text otherwise."""
    pair = encoder()
    letters = [token for letter in "there was" for token in ids_of(letter)]
    assert ids_of("there was") != letters
    prompt = prompt_of(pair)
    own = own_window(pair, prompt, [*letters, STUDENT.eos_token_id])
    assert own.text == "there was" and own.tokens == len(letters) and own.ended and not own.broken
    window = own.window
    assert window["own"] and window["bytes"] == 9
    assert learned(window, "student").tolist() == letters
    assert learned(window, "teacher").tolist() == ids_of("there was", TEACHER)
    for side, tokenizer in (("student", STUDENT), ("teacher", TEACHER)):
        assert window[f"{side}_ids"][-1] == tokenizer.eos_token_id and window[f"{side}_roles"][-1] == END
    assert window["student_ids"][: len(prompt.student_ids)].tolist() == prompt.student_ids


def test_the_limit_leaves_a_text_without_an_end():
    own = own_window(encoder(), prompt_of(encoder()), ids_of(" a girl"))
    assert not own.ended and not own.broken and own.text == " a girl"
    assert (own.window["student_roles"] != END).all() and (own.window["teacher_roles"] != END).all()


def test_an_empty_text_is_learned_from_where_it_ends_by_itself():
    pair = encoder()
    own = own_window(pair, prompt_of(pair), [STUDENT.eos_token_id, *ids_of("more")])
    assert own.ended and own.text == "" and own.tokens == 0 and own.window["student_roles"][-1] == END
    nothing = own_window(pair, prompt_of(pair), [])
    assert nothing.window is None and not nothing.ended and not nothing.broken


def test_a_character_without_its_last_bytes_is_cut_off():
    pair = encoder()
    whole = [token for byte in "aß".encode() for token in pair.tables[0].spell([bytes([byte])])[0]]
    own = own_window(pair, prompt_of(pair), whole[:-1])
    assert own.text == "a" and own.tokens == 1 and not own.broken
    ended = own_window(pair, prompt_of(pair), [*whole[:-1], STUDENT.eos_token_id])
    assert ended.text == "a" and ended.broken and not ended.ended
    assert own_window(pair, prompt_of(pair), whole).text == "aß"


def test_bytes_that_are_no_text_end_it():
    pair = encoder()
    [broken] = pair.tables[0].spell([b"\xff"])
    own = own_window(pair, prompt_of(pair), [*ids_of("good"), *broken, *ids_of("bad"), STUDENT.eos_token_id])
    assert own.text == "good" and own.broken and not own.ended
    at_once = own_window(pair, prompt_of(pair), broken)
    assert at_once.broken and at_once.tokens == 0 and at_once.window["student_roles"][-1] == END


def test_what_no_text_can_hold_is_learned_from_as_the_right_end_would_be():
    """The distributions in front of it are compared: the student is told what should have followed there."""
    student = metaspace()
    pair = encoder(student=student, teacher=TEACHER)
    words = ids_of("Once upon", student)
    ended = own_window(pair, prompt_of(pair), [*words, student.eos_token_id])
    wrong = own_window(pair, prompt_of(pair), [*words, student.bos_token_id, *words])
    assert (ended.ended, ended.broken, wrong.ended, wrong.broken) == (True, False, False, True)
    for name, value in ended.window.items():
        np.testing.assert_array_equal(wrong.window[name], value)


def test_a_teacher_without_tokens_for_a_text_reads_no_space_that_is_not_there():
    pair = encoder(teacher=metaspace())
    own = own_window(pair, prompt_of(pair), ids_of("ing ☃ and"))
    behind = own.window["teacher_ids"][len(prompt_of(pair).teacher.ids) :]
    assert metaspace().convert_ids_to_tokens(behind.tolist())[0] != "▁"
    assert own.window["teacher_ends"][-1] == own.window["student_ends"][-1]


def test_a_special_token_in_the_middle_ends_it():
    student = metaspace()
    pair = encoder(student=student, teacher=TEACHER)
    start = student.bos_token_id
    own = own_window(pair, prompt_of(pair), [*ids_of("Once upon", student), start, *ids_of("a time", student)])
    assert own.broken and not own.ended and own.text == " Once upon"
    beyond = own_window(pair, prompt_of(pair), [*ids_of("Once", student), len(student) + 5])
    assert beyond.broken and beyond.text == " Once"  # a row of the head that no token has


def test_a_window_is_full_where_it_is_full():
    pair = encoder(length=16)
    prompt = prompt_of(pair)
    many = ids_of(STORIES[1])
    own = own_window(pair, prompt, [*many, STUDENT.eos_token_id])
    assert len(own.window["student_ids"]) == 16 and not own.ended and not own.broken
    # A teacher that needs more tokens reads the begin alone, and the rest of the student's has no anchor.
    longer = encoder(student=TEACHER, teacher=STUDENT, length=16)
    text = own_window(longer, prompt_of(longer), ids_of(STORIES[1], TEACHER)[:9])
    assert len(text.window["teacher_ids"]) <= 16


@given(st.lists(st.integers(0, 299), max_size=20), st.sampled_from([TEACHER, metaspace(), wordpiece()]))
@settings(max_examples=60, deadline=None)
def test_whatever_is_sampled_is_learned_on_the_bytes_that_both_read(ids, teacher):
    pair = encoder(teacher=teacher)
    own = own_window(pair, prompt_of(pair, tokens=8), ids)
    if own.window is None:
        assert own.tokens == 0
        return
    assert learned(own.window, "student").tolist() == ids[: own.tokens]
    starts = own.window["student_starts"]
    assert bytes_of(pair, 0, ids[: own.tokens]) == own.text.encode() and (np.diff(starts) >= 0).all()
    batch = collator(pair, teacher)([own.window])
    assert batch.counts["lm"] == 0 and batch.counts["own"] == own.tokens + (own.ended or own.broken)
    assert batch.given is not None and not batch.given.any()


# ------------------------------------------------------------------------------------------ conversations


def conversation_pair(length: int = 200) -> ChatEncoder:
    tokenizers, _ = tokenizers_for_chat({"student": STUDENT, "teacher": TEACHER})
    return ChatEncoder(tokenizers["student"], tokenizers["teacher"], length)


def test_a_conversation_is_gone_on_with_where_an_answer_begins():
    talk = '[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Lily."}, ' * 1
    talk += '{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]'
    pair = conversation_pair()
    [window] = pair.windows([talk])
    texts = [STUDENT.decode(own_prompt(pair, window, 4, draw).student_ids) for draw in (0.0, 0.9)]
    assert texts[0].endswith("Who?\n\nAssistant:\n") and texts[1].endswith("Where?\n\nAssistant:\n")
    assert "Lily" not in texts[0] and "Lily" in texts[1]

    own = own_window(pair, own_prompt(pair, window, 4, 0.9), [*ids_of("In the park."), *stop_ids(pair)])
    assert own.ended and own.text == "In the park."
    asked = TEACHER.decode(own.window["teacher_ids"])
    assert asked.endswith("Where?\n\nAssistant:\nIn the park.<|endoftext|>")
    assert learned(own.window, "student").tolist() == ids_of("In the park.")


USER_WITHOUT_END = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + END }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("end", "places"),
    [("eos_token", ["[/INST]", "[/INST]"]), ("'!'", ["[INST] ", "[/INST]", "[INST] ", "[/INST]"])],
)
def test_where_all_messages_are_learned_the_student_writes_those_that_its_end_of_turn_ends(end, places):
    """Behind a user's message of this template no end stands; where none ends with one, all are gone on with."""
    tokenizers = {"student": copy.deepcopy(STUDENT), "teacher": copy.deepcopy(TEACHER)}
    for tokenizer in tokenizers.values():
        tokenizer.chat_template = USER_WITHOUT_END.replace("END", end)
    pair = ChatEncoder(tokenizers["student"], tokenizers["teacher"], 200, "all")
    turns = [("user", "Who?"), ("assistant", "Lily."), ("user", "Where?"), ("assistant", "There.")]
    [window] = pair.windows([json.dumps([{"role": role, "content": text} for role, text in turns])])

    prompts = [own_prompt(pair, window, 4, draw) for draw in np.arange(0, 1, 1 / len(places))]
    texts = [STUDENT.decode(prompt.student_ids, skip_special_tokens=True) for prompt in prompts]
    assert all(text.endswith(place) for text, place in zip(texts, places, strict=True)), texts


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ':BREAK' + m.content + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("breaks", list(itertools.product([" ", "\\n"], repeat=2)))
def test_a_space_of_the_template_in_the_first_token_of_an_answer_stays_on_its_side(breaks):
    """The same answer, given or written, has the same tokens, behind each model's own template."""
    tokenizers = {"student": copy.deepcopy(TEACHER), "teacher": copy.deepcopy(STUDENT)}
    for tokenizer, gap in zip(tokenizers.values(), breaks, strict=True):
        tokenizer.chat_template = TEMPLATE.replace("BREAK", gap)
    chat, _ = tokenizers_for_chat(tokenizers)
    pair = ChatEncoder(chat["student"], chat["teacher"], 64)
    [window] = pair.windows(['[{"role": "user", "content": "Who"}, {"role": "assistant", "content": "the park."}]'])

    prompt = own_prompt(pair, window, 4, 0.0)
    sampled = window["student_ids"][len(prompt.student_ids) :].tolist()
    own = own_window(pair, prompt, sampled)
    assert own.ended and own.text.strip() == "the park."
    for side in ("student", "teacher"):
        ids = own.window[f"{side}_ids"].tolist()
        assert ids == window[f"{side}_ids"].tolist()[: len(ids)]
    assert own.window["student_ends"][-1] == own.window["teacher_ends"][-1]

    # nothing is taken away that the student has not written
    assert own_window(pair, prompt, ids_of("Lily.", TEACHER)).text == "Lily."


# ------------------------------------------------------------------------------------------ refusals


def test_pairs_that_cannot_learn_from_their_own_text_are_refused():
    require_own_text(encoder())
    with pytest.raises(ValueError, match="drops spaces"):
        require_own_text(encoder(student=wordpiece()))
    seq2seq = SourceEncoder.__new__(SourceEncoder)
    with pytest.raises(ValueError, match="encoder-decoder"):
        require_own_text(seq2seq)
    assert t5_like().eos_token_id is not None and stop_ids(encoder()) == (STUDENT.eos_token_id,)


def test_both_kinds_of_windows_share_a_batch():
    pair = encoder()
    windows = pair.windows(STORIES[:1])[:1]
    own = own_window(pair, prompt_of(pair), [*ids_of(" a girl"), STUDENT.eos_token_id]).window
    collate = collator(pair, TEACHER)
    alone, both = collate(windows), collate([*windows, own])
    assert alone.given is None and alone.counts["own"] == 0
    assert both.counts["lm"] == alone.counts["lm"] and both.counts["own"] == len(ids_of(" a girl")) + 1
    assert both.counts["kd"] > alone.counts["kd"]
    assert torch.equal(both.given, both.supervised // both.student_ids.shape[1] == 0)
