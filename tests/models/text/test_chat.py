"""Conversations: learned text is the assistant's text, markers are no targets, each model reads its own template."""

import copy
import functools
import json
import pickle
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from models.teacher.projection import Projection
from models.text.chat import ChatEncoder
from models.text.chat_template import ConversationError
from models.text.chat_turns import PLAIN_TEMPLATE, chat_tokenizer, ends_turns
from models.text.collate import PairCollator
from models.text.tokens import END, MARKER
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import IGNORE, PairedBatch, TeacherSignal
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
SMOLLM_INSTRUCT = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_INSTRUCT = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with \
function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n\
</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".replace("\\\n", "")
"""The templates of SmolLM-Instruct and Qwen2.5-Instruct, whose tokenizers are those of the base models."""
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


@given(conversation=CONVERSATIONS)
def test_learned_text_of_real_tokenizers_is_what_the_assistant_says(real_encoder, conversation):
    """Qwen's tokenizer reads NFC. HYPOTHESIS_PROFILE=thorough tries 1,000 conversations."""
    texts = [unicodedata.normalize("NFC", text) for text in answers(conversation)]
    check(real_encoder, conversation, texts)


@pytest.fixture(scope="module")
def real_encoder(real_tokenizer) -> ChatEncoder:
    student = with_template(real_tokenizer("smollm"), SMOLLM_INSTRUCT)
    pair = student, with_template(real_tokenizer("qwen2.5"), QWEN_INSTRUCT)
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


REAL = [("qwen2.5", QWEN_INSTRUCT), ("smollm", SMOLLM_INSTRUCT), ("mistral-v0.1", INST), ("mistral-v0.1", HEADED)]
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


def test_where_the_assistant_says_nothing_what_anybody_says_last_is_asked_for():
    encoder = tiny_encoder(learn_from="all")
    shown, ids = encoder.prompt(json.dumps(messages("Hello", system="Be kind.")), "student")
    asked = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert shown == "Be kind." and encoder.sides[0].tokenizer.decode(ids) == asked


def test_a_prompt_may_be_empty(real_encoder):
    shown, ids = real_encoder.prompt(json.dumps([{"role": "assistant", "content": "Hi"}]), "student")
    assert shown == "" and real_encoder.sides[0].tokenizer.decode(ids) == "<|im_start|>assistant\n"


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def pairs(request) -> Callable[[str], tuple[ChatEncoder, VocabularyMap]]:
    """Encoder and vocabulary map of `tiny` or `real` tokenizers."""

    @functools.cache
    def made(name: str) -> tuple[ChatEncoder, VocabularyMap]:
        encoder = tiny_encoder() if name == "tiny" else request.getfixturevalue("real_encoder")
        return encoder, VocabularyMap.build(*(side.tokenizer for side in encoder.sides))

    return made


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


@functools.cache
def text_and_markers(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, list[int]]:
    text = {*plain_bytes(tokenizer)}
    return np.array(sorted(text)), sorted({*range(len(tokenizer))} - text)


def says_markers(batch: PairedBatch, teacher: PreTrainedTokenizerFast, seed: int) -> TeacherSignal:
    """A teacher that gives half of its probability to control tokens, everywhere: the end of its turn among them."""
    draw = np.random.default_rng(seed)
    text, markers = text_and_markers(teacher)
    real = batch.teacher_ids.flatten()[batch.row_teacher + 1].tolist()
    rows = [[*markers, *{i, *text[draw.integers(len(text), size=30)].tolist()} - {*markers}] for i in real]
    ids = torch.full((len(rows), len(markers) + 31), -1)
    for row, found in zip(ids, rows, strict=True):
        row[: len(found)] = torch.tensor(found)
    mass = torch.from_numpy(draw.random(ids.shape)).float().masked_fill(ids < 0, 0)
    for half in (slice(len(markers)), slice(len(markers), None)):
        mass[:, half] *= 0.48 / mass[:, half].sum(1, keepdim=True)
    tail = torch.full((len(ids),), 0.04).log()
    realised = torch.full((len(batch.asked),), 0.01).log()
    return TeacherSignal(ids, mass.log(), tail, torch.zeros(len(ids)), realised)


@pytest.mark.parametrize("tokenizers", ["tiny", "real"])
@given(conversation=CONVERSATIONS, correction=st.sampled_from(["none", "span"]), seed=st.integers(0, 2**32 - 1))
def test_nothing_that_a_teacher_gives_to_markers_reaches_the_target(pairs, tokenizers, correction, conversation, seed):
    """By the bytes of the tokens: a token's mass is at most that of the teacher's tokens that begin with its bytes."""
    encoder, vocabulary = pairs(tokenizers)
    student, teacher = (side.tokenizer for side in encoder.sides)
    batch = PairCollator(vocabulary, encoder.end_of_text, 16)(encode(encoder, conversation))
    signal = says_markers(batch, teacher, seed)
    target = Projection(vocabulary, correction, 0.0)(signal, batch)

    ours, theirs = plain_bytes(student), plain_bytes(teacher)
    assert (target.ids == student.eos_token_id).any()

    for row, (ids, probs) in enumerate(zip(target.ids.tolist(), target.probs.tolist(), strict=True)):
        said = dict(zip(signal.ids[row].tolist(), signal.log_probs[row].exp().tolist(), strict=True))
        spelt = {theirs[t]: p for t, p in said.items() if t in theirs}
        ended = said[teacher.eos_token_id] if batch.depth[row] == 0 else 0.0

        got = {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}
        assert got.pop(student.eos_token_id, 0.0) == pytest.approx(ended)
        assert got.keys() <= ours.keys()  # no marker of the student's

        moved = 0.01 if batch.pieces[row] > 1 and correction == "span" else 0.0
        assert sum(got.values()) <= sum(spelt.values()) + moved + 1e-5
        if batch.depth[row] == 0:
            for i, p in got.items():
                assert p <= sum(q for b, q in spelt.items() if b.startswith(ours[i])) + moved + 1e-5


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


@given(CONVERSATIONS)
def test_the_least_window_that_teaches_something_of_a_conversation_is_known(conversation):
    least = tiny_encoder().least_length(json.dumps(conversation))
    if least is None:
        assert not encode(tiny_encoder(10_000), conversation)
        return
    assert encode(tiny_encoder(max(least, 8)), conversation)
    if least > 8:
        assert not encode(tiny_encoder(least - 1), conversation)


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
    assert told in str(error.value) and "begins: 'Hello" in str(error.value) and "Leave such" in str(error.value)


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
