"""Conversations: learned text is the assistant's text, markers are no targets, each model reads its own template."""

import copy
import json
import pickle
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from models.chat import PLAIN_TEMPLATE, ChatEncoder, ConversationError, chat_tokenizer, ends_turns
from models.outputs import IGNORE
from models.pairing import PairCollator, PairEncoder
from models.vocabulary import END, MARKER, VocabularyMap
from tests.models.tiny import Pair, byte_bpe, metaspace, plain_bytes, tiny_llama

SIDES = ("student", "teacher")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HEADED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

SNIPPETS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "</s>",
    " ",
    "\n",
    "\n\n",
    "\t",
    "e\u0301",
    "🎉👩‍👩‍👧",
]
SNIPPETS += [
    "def f(x):\n    return x + 1\n",
    "User:",
    "Assistant:\n",
    "The little girl.",
    "ﬁ",
    "\u0130",
    "한국어",
    "[INST]",
    "0",
]
SPELT = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])
"""SmolLM has no token for some of the other bytes."""
CONTENTS = st.lists(st.sampled_from(SNIPPETS) | st.text(SPELT, max_size=12), max_size=5).map("".join)
CONVERSATIONS = st.tuples(
    st.sampled_from([[], ["system"]]), st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3), CONTENTS
).map(lambda drawn: messages(*(text for turn in drawn[1] for text in turn), system=drawn[2] if drawn[0] else None))


def messages(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    lead = [] if system is None else [{"role": "system", "content": system}]
    return lead + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")], True)
    tokenizer.chat_template = template
    return chat_tokenizer(tokenizer)


def tiny_encoder(
    max_length: int = 4000, student: str | None = CHATML, teacher: str = WITH_SYSTEM, **kind
) -> ChatEncoder:
    pair = with_template(byte_bpe(300), student), with_template(byte_bpe(400), teacher)
    return ChatEncoder(*pair, max_length, **kind)


def encode(encoder: ChatEncoder, *conversations: list[dict[str, str]]) -> list[dict]:
    return encoder.windows([json.dumps(conversation) for conversation in conversations])


def answers(conversation: list[dict[str, str]], roles: tuple[str, ...] = ("assistant",)) -> list[str]:
    return [message["content"] for message in conversation if message["role"] in roles]


def learned(window: dict, side: str, tokenizer: PreTrainedTokenizerFast) -> list[bytes | int]:
    """The bytes of each learned stretch, and the ids of the ends behind them."""
    spelling, found = plain_bytes(tokenizer), []
    for i, role in zip(window[f"{side}_ids"].tolist(), window[f"{side}_roles"].tolist(), strict=True):
        if role == END:
            found.append(i)
        elif role != MARKER:
            if not found or isinstance(found[-1], int):
                found.append(b"")
            found[-1] += spelling[i]
    return found


def expected(texts: list[str], end: int) -> list[bytes | int]:
    return [part for text in texts for part in ([text.encode(), end] if text else [end])]


def check(encoder: ChatEncoder, conversation: list[dict[str, str]], texts: list[str]) -> dict:
    (window,) = encode(encoder, conversation)
    for side, of in zip(SIDES, encoder.sides, strict=True):
        end = of.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert learned(window, side, of.tokenizer) == expected(texts, end)
    assert window["bytes"] == sum(len(text.encode()) for text in texts) and window["left_out"] == 0
    return window


@given(conversation=CONVERSATIONS)
def test_learned_text_is_what_the_assistant_says_and_the_end_of_its_turns(conversation):
    check(tiny_encoder(), conversation, answers(conversation))


@settings(max_examples=1000)
@given(conversation=CONVERSATIONS)
def test_learned_text_of_real_tokenizers_is_what_the_assistant_says(real_encoder, conversation):
    """Qwen's tokenizer reads NFC."""
    texts = [unicodedata.normalize("NFC", text) for text in answers(conversation)]
    check(real_encoder, conversation, texts)


@pytest.fixture(scope="module")
def real_encoder(real_tokenizer) -> ChatEncoder:
    pair = with_template(real_tokenizer("smollm"), CHATML), with_template(real_tokenizer("qwen2.5"), WITH_SYSTEM)
    return ChatEncoder(*pair, 4000)


@given(conversation=CONVERSATIONS)
def test_all_messages_are_learned_if_asked_for(conversation):
    texts = answers(conversation, ("system", "user", "assistant"))
    check(tiny_encoder(learn_from="all"), conversation, texts)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_that_a_tokenizer_cannot_spell_is_read_and_ends_at_the_same_place(text):
    student, teacher = with_template(metaspace(), HEADED), with_template(byte_bpe(400), CHATML)
    (window,) = ChatEncoder(student, teacher, 4000).windows([json.dumps(messages("Hello", text, "Go", "girl"))])
    assert window["bytes"] == len((text + "girl").encode())
    for side in SIDES:
        ends = window[f"{side}_ends"][window[f"{side}_roles"] == END]
        assert ends.tolist() == [len(text.encode()) + 2, len((text + "girl").encode()) + 4]


REAL = [("qwen2.5", WITH_SYSTEM), ("smollm", CHATML), ("mistral-v0.1", INST), ("mistral-v0.1", HEADED)]
REAL += [("gpt-neox", HEADED), ("llama2c-tok4096", INST), ("gpt2", PLAIN_TEMPLATE), ("smollm", INST)]


@pytest.mark.parametrize(("name", "template"), REAL)
def test_a_model_reads_what_transformers_makes_of_its_template(real_tokenizer, name, template):
    tokenizer = copy.deepcopy(real_tokenizer(name))
    tokenizer.chat_template = template
    tokenizer = chat_tokenizer(tokenizer)
    encoder = ChatEncoder(tokenizer, tokenizer, 400)
    for last in ("Hi! How are you?", "Once upon a time, x = 1.\n\n- Mädchen", "{", "", "123"):
        conversation = messages("Hello there", "General Kenobi.", "Tell me  a story.\nNow", last)
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        (window,) = encode(encoder, conversation)
        assert window["student_ids"].tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("content", ["(<|im_end|>)", "<|im_start|>system", "x<|endoftext|>"])
def test_control_tokens_in_contents_are_read_as_transformers_reads_them_as_text(real_encoder, content):
    tokenizer = real_encoder.sides[1].tokenizer
    conversation = messages(content, content)
    try:
        reference = tokenizer.apply_chat_template(conversation, sanitize_control_tokens=True, return_dict=False)
    except TypeError:
        pytest.skip("this version of transformers cannot do that")
    (window,) = encode(real_encoder, conversation)
    found = window["teacher_ids"].tolist()
    assert tokenizer.decode(found) == tokenizer.decode(reference)
    # transformers reads a control token's text apart from its neighbours
    controls = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert [i for i in found if i in controls] == [i for i in reference if i in controls]


def test_what_stands_before_an_answer_is_what_a_model_is_asked_with(real_encoder):
    conversation = messages("Hello", "Hi.", "And <|im_end|> now?", "No.")
    for side, of in zip(SIDES, real_encoder.sides, strict=True):
        shown, ids = real_encoder.prompt(json.dumps(conversation), side)
        asked = of.tokenizer.apply_chat_template(conversation[:3], tokenize=False, add_generation_prompt=True)
        assert shown == "And <|im_end|> now?" and of.tokenizer.decode(ids) == asked
        ends = [i for i in ids if i == of.tokenizer.eos_token_id]
        assert len(ends) == asked.count("<|im_end|>") - 1


def test_a_prompt_may_be_empty(real_encoder):
    shown, ids = real_encoder.prompt(json.dumps([{"role": "assistant", "content": "Hi"}]), "student")
    assert shown == "" and real_encoder.sides[0].tokenizer.decode(ids) == "<|im_start|>assistant\n"


# ---------------------------------------------------------------- batches


def batch_of(encoder: ChatEncoder, windows: list[dict]):
    tokenizers = [side.tokenizer for side in encoder.sides]
    return PairCollator(VocabularyMap.build(*tokenizers), encoder.end_of_text, 16)(windows)


@given(conversation=CONVERSATIONS)
def test_markers_are_neither_learned_nor_targets_of_the_teacher(conversation):
    encoder = tiny_encoder()
    windows = encode(encoder, conversation)
    batch = batch_of(encoder, windows)
    for side, labels in (("student", batch.labels), ("teacher", batch.teacher_labels)):
        roles = windows[0][f"{side}_roles"]
        assert np.flatnonzero(labels[0].numpy() != IGNORE).tolist() == (np.flatnonzero(roles != MARKER) - 1).tolist()
    assert (batch.labels.flatten()[batch.row_student] != IGNORE).all()
    assert (batch.teacher_labels.flatten()[batch.row_teacher] != IGNORE).all()
    for side, spans in (("student", batch.student_spans), ("teacher", batch.teacher_spans)):
        assert (windows[0][f"{side}_roles"][1:][spans[0, :-1].numpy() >= 0] != MARKER).all()


def test_the_end_of_a_turn_is_distilled_from_the_teachers_own_end_of_turn():
    """One model ends turns with <|im_end|>, the other, which has no template, with its end of text."""
    encoder = tiny_encoder(student=None)
    student, teacher = (side.tokenizer for side in encoder.sides)
    assert (student.eos_token, teacher.eos_token) == ("<|endoftext|>", "<|im_end|>")
    batch = batch_of(encoder, encode(encoder, messages("Hello", "Hi there.")))
    rows = batch.labels.flatten()[batch.row_student] == student.eos_token_id
    assert rows.sum() == 1 and batch.depth[rows] == 0
    assert (batch.teacher_labels.flatten()[batch.row_teacher[rows]] == teacher.eos_token_id).all()
    segments = VocabularyMap.build(student, teacher).segments
    assert segments[teacher.eos_token_id].tolist()[0] == student.eos_token_id


@given(conversation=CONVERSATIONS)
def test_with_equal_tokenizers_and_templates_every_learned_position_is_distilled(conversation):
    tokenizer = with_template(byte_bpe(300), CHATML)
    encoder = ChatEncoder(tokenizer, tokenizer, 4000)
    batch = batch_of(encoder, encode(encoder, conversation))
    assert torch.equal(batch.row_student, batch.supervised) and torch.equal(batch.row_teacher, batch.supervised)
    assert (batch.depth == 0).all()


def test_both_sides_score_the_same_bytes_and_no_ends_of_turns():
    encoder = tiny_encoder()
    windows = encode(encoder, messages("Hello", "Hi there.", "", "Es geht über die Straße."))
    batch = batch_of(encoder, windows)
    for side, of in zip(SIDES, encoder.sides, strict=True):
        _, labels = batch.scored(side)
        spelt = b"".join(plain_bytes(of.tokenizer)[int(i)] for i in labels[labels != IGNORE])
        assert spelt == "Hi there.Es geht über die Straße.".encode() and len(spelt) == batch.bytes.sum()


def test_losses_do_not_depend_on_padding():
    encoder = tiny_encoder()
    student, teacher = (side.tokenizer for side in encoder.sides)
    models = tiny_llama(len(student), 1), tiny_llama(len(teacher), 2)
    pair = Pair(*models, encoder, VocabularyMap.build(student, teacher))
    conversations = [messages("Hello", "Hi there."), messages("Who?", "The little girl went to the park. " * 4)]
    windows = [encode(encoder, conversation)[0] for conversation in conversations]
    framework, collate = pair.framework({"kd": 1.0, "lm": 1.0, "span": 1.0}), pair.collator()
    together, *alone = (framework(collate(of), 0).terms for of in (windows, windows[:1], windows[1:]))
    for name, term in together.items():
        torch.testing.assert_close(term.sum, sum(one[name].sum for one in alone))
        assert term.count == sum(one[name].count for one in alone) > 0


# ---------------------------------------------------------------- windows


@given(conversations=st.lists(CONVERSATIONS, min_size=1, max_size=4), max_length=st.integers(20, 150))
def test_what_does_not_fit_is_cut_at_the_end_and_counted(conversations, max_length):
    encoder = tiny_encoder(max_length)
    windows = encode(encoder, *conversations)
    size = sum(len(text.encode()) for conversation in conversations for text in answers(conversation))
    for window in windows:
        one, other = (learned(window, side, of.tokenizer) for side, of in zip(SIDES, encoder.sides, strict=True))
        assert max(len(window[f"{side}_ids"]) for side in SIDES) <= max_length
        assert [part for part in one if isinstance(part, bytes)] == [part for part in other if isinstance(part, bytes)]
        assert len(one) == len(other) and sum(len(p) for p in one if isinstance(p, bytes)) == window["bytes"]
    if windows:
        assert sum(window["bytes"] + window["left_out"] for window in windows) == size


def test_conversations_share_windows():
    windows = encode(tiny_encoder(100), *[messages("Hello", "Hi.")] * 4)
    assert len(windows) < 4 and sum(window["bytes"] for window in windows) == 12


def test_names_travel_and_a_conversation_without_answer_gives_no_window():
    encoder = tiny_encoder()
    texts = [json.dumps(messages("Hello")), json.dumps(messages("Hello", "Hi."))]
    (window,) = encoder.windows(texts, ["a", "b"])
    assert window["documents"] == "b"


# ---------------------------------------------------------------- templates


def test_a_template_that_trims_makes_both_sides_read_trimmed_text():
    check(tiny_encoder(teacher=TRIMMED), messages(" Hello ", "\n Hi there. \n"), ["Hi there."])


@pytest.mark.parametrize("tokenizer", [metaspace(), byte_bpe(300)])
@pytest.mark.parametrize("template", [INST, HEADED, None])
@pytest.mark.parametrize("text", ["girl", " girl", "\ngirl ", "", "girl\n"])
def test_wherever_a_space_belongs_the_text_lies_on_its_bytes(tokenizer, template, text):
    """Contents that a template puts behind a space, behind a letter, or before more text."""
    student, teacher = with_template(tokenizer, template), with_template(byte_bpe(400), CHATML)
    (window,) = ChatEncoder(student, teacher, 400).windows([json.dumps(messages("there", text, "little", "girl"))])
    (found,) = [window["student_roles"] != MARKER]
    ends = window["teacher_ends"][window["teacher_roles"] != MARKER]
    assert set(window["student_ends"][found].tolist()) & set(ends.tolist()) >= {ends[-1]}
    spelt = "".join(student.convert_ids_to_tokens(window["student_ids"][found].tolist()))
    spelt = spelt.replace("\u2581", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("<unk>", "\n")
    assert spelt.replace(student.eos_token, "").replace(" ", "") == text.replace(" ", "") + "girl"
    assert window["bytes"] == len(text) + len("girl")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML.replace("message['content']", "message['content'] | upper"), "changes what is said"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses a conversation of user, assistant: Roles must"),
        (CHATML.replace("messages %}", "messages[::-1] %}"), "leaves out, repeats or moves"),
        (CHATML.replace("messages %}", "messages[:3] %}"), "leaves out, repeats or moves"),
    ],
)
def test_a_template_that_cannot_be_followed_is_told(template, told):
    encoder = tiny_encoder()
    encoder.sides[1].tokenizer.chat_template = template
    with pytest.raises(ConversationError, match="the teacher's chat template") as error:
        encode(encoder, messages("Hello", "Hi.", "Bye", "Then.") if "\n" in template else messages("Hello", "Hi."))
    assert told in str(error.value) and "begins: 'Hello" in str(error.value)


def test_a_tokenizer_without_a_template_speaks_plainly_and_keeps_its_end_of_text():
    tokenizer = byte_bpe(300)
    chat = chat_tokenizer(tokenizer)
    assert tokenizer.chat_template is None and chat.eos_token == "<|endoftext|>" and ends_turns(chat)
    rendered = chat.apply_chat_template(messages("Hello", "Hi."), tokenize=False)
    assert rendered == "User:\nHello\n\nAssistant:\nHi.<|endoftext|>\n\n"


def test_a_template_without_an_end_of_turn_is_noticed():
    tokenizer = with_template(byte_bpe(300), "{% for message in messages %}{{ '\n' + message['content'] }}{% endfor %}")
    assert not ends_turns(tokenizer) and tokenizer.eos_token == "<|endoftext|>"


def test_fingerprints_tell_templates_and_settings_apart():
    encoders = [tiny_encoder(), tiny_encoder(student=HEADED), tiny_encoder(learn_from="all"), tiny_encoder(99)]
    plain = PairEncoder(*(side.tokenizer for side in encoders[0].sides), 4000)
    assert len({encoder.fingerprint for encoder in [*encoders, plain]}) == 5
    assert tiny_encoder().fingerprint == encoders[0].fingerprint


def test_an_encoder_survives_pickling():
    encoder = tiny_encoder()
    conversation = messages("Hello", "Hi <|im_end|>.")
    (before,), (after,) = encode(encoder, conversation), encode(pickle.loads(pickle.dumps(encoder)), conversation)
    assert all(np.array_equal(before[key], after[key]) for key in before)
