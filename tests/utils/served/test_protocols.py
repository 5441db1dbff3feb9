"""Answers of servers are read as they were recorded from real ones, and everything else is no answer."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from tests.models.tiny import byte_bpe
from tests.served import PretendedServer, running
from utils.errors import UserError
from utils.served.http_client import BadAnswer
from utils.served.protocols import Sglang, Vllm, recognise

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "vllm_answer.json").read_text(encoding="utf-8"))
IDS, ANSWER = RECORDED["request"]["prompt"], RECORDED["answer"]
LISTED = RECORDED["request"]["prompt_logprobs"]
OF_SGLANG = json.loads((HERE / "sglang_answer.json").read_text(encoding="utf-8"))


@pytest.fixture
def vllm(clients):
    return Vllm(clients("http://127.0.0.1:1/v1"), "teacher")


def test_a_real_answer_is_read_and_its_request_is_ours(vllm):
    url, body = vllm.request(IDS, LISTED)
    assert url == "http://127.0.0.1:1/v1/completions" and body == RECORDED["request"]

    lists = vllm.read(ANSWER, IDS, LISTED)
    assert lists.ids.shape == lists.log_probs.shape == (len(IDS) - 1, LISTED)
    # " na" is not among the three likeliest behind "The"; what follows it is the likeliest there.
    assert lists.ids[0].tolist() == [29, 28, 198] and 46494 in lists.ids[1]
    assert lists.realised[:2] == pytest.approx([-12.4348888, -1.1595438])
    assert lists.texts[0] == " na"
    assert (np.exp(lists.log_probs).sum(1) < 1).all()


def test_the_pretended_server_answers_in_the_shape_of_the_real_one(served, clients):
    """But for what nobody reads."""
    protocol = Vllm(clients(served.address), "tiny")
    url, body = protocol.request([5, 9, 300, 21, 7], 3)
    answer = protocol_answer(clients(served.address), url, body)
    choice, real = answer["choices"][0], ANSWER["choices"][0]
    assert choice.keys() <= real.keys() and answer.keys() <= ANSWER.keys()
    assert choice["prompt_logprobs"][0] is real["prompt_logprobs"][0] is None
    for entries in (*choice["prompt_logprobs"][1:], *real["prompt_logprobs"][1:]):
        assert len(entries) in (3, 4)
        assert {frozenset(entry) for entry in entries.values()} == {frozenset(("logprob", "rank", "decoded_token"))}


def protocol_answer(client, url, body):
    return client.wait(client.begin(url, body, lambda answer: answer))


def changed(change) -> dict:
    answer = copy.deepcopy(ANSWER)
    change(answer["choices"][0]["prompt_logprobs"])
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "of 23 positions, expected 24"),
        (lambda rows: rows[1].pop("15486"), "without its real token 15486"),
        (lambda rows: rows[1].pop("28"), "2 listed tokens, expected 3"),
        (lambda rows: rows.__setitem__(4, None), "without its real token"),
        (lambda rows: rows[1]["28"].pop("logprob"), "no tokens with a logprob"),
        (lambda rows: rows[1]["28"].__setitem__("logprob", 3.5), "are these log-probabilities"),
        (lambda rows: rows[1]["28"].__setitem__("logprob", float("nan")), "are these log-probabilities"),
        (lambda rows: rows[1].__setitem__("-7", rows[1].pop("28")), "a listed token -7"),
        (lambda rows: rows[1].__setitem__("9" * 30, rows[1].pop("28")), "no tokens with a logprob"),
        (lambda rows: rows[1]["15486"].__setitem__("logprob", float("nan")), "which it cannot have"),
        (lambda rows: rows[1]["15486"].__setitem__("logprob", float("-inf")), "which it cannot have"),
        (lambda rows: rows[1]["15486"].__setitem__("logprob", 5.0), "which it cannot have"),
        (lambda rows: rows[1]["15486"].__setitem__("logprob", -0.1), "which it cannot have"),
    ],
)
def test_other_answers_are_told_from_it(vllm, change, message):
    with pytest.raises(BadAnswer, match=message):
        vllm.read(changed(change), IDS, LISTED)


def test_a_server_that_leaves_the_text_out_is_refused(vllm):
    with pytest.raises(UserError, match="of tokens that it generates, not those of a text"):
        vllm.read({"choices": [{"text": "", "prompt_logprobs": None}]}, IDS, LISTED)
    with pytest.raises(BadAnswer, match="without choices"):
        vllm.read({"error": "x"}, IDS, LISTED)


def test_a_real_answer_of_sglang_is_read_and_its_request_is_ours(clients):
    protocol = Sglang(clients("http://127.0.0.1:1/v1"))
    request, answer = OF_SGLANG["request"], OF_SGLANG["answer"]
    url, body = protocol.request(request["input_ids"], 3)
    assert url == "http://127.0.0.1:1/generate" and body == request

    lists = protocol.read(answer, request["input_ids"], 3)
    assert lists.ids.shape == lists.log_probs.shape == (len(request["input_ids"]) - 1, 3)
    # "upon" behind "Once" is the likeliest; the byte 7 behind "was" is not among the listed.
    assert lists.ids[1].tolist() == [407, 383, 261] and 10 not in lists.ids[7]
    assert lists.realised[[1, 7]] == pytest.approx([-0.0175128, -28.561697])
    assert lists.texts[:2] == ["Once", "upon"] and lists.texts[7] == "\x07"
    assert (np.exp(lists.log_probs).sum(1) < 1).all()


def test_the_pretended_sglang_answers_in_the_shape_of_the_real_one(pair, clients):
    with running(PretendedServer(pair.teacher, byte_bpe(400), "SGLang")) as server:
        client = clients(server.address)
        protocol = recognise(client, None).protocol
        pretended = protocol_answer(client, *protocol.request([5, 9, 300, 21, 7], 3))["meta_info"]
        real = OF_SGLANG["answer"]["meta_info"]
        assert pretended.keys() <= real.keys()
        for facts in (pretended, real):
            assert facts["input_token_logprobs"][0][0] is None and facts["input_top_logprobs"][0] is None
            assert {len(entry) for entry in facts["input_token_logprobs"]} == {3}
            assert {len(entry) for top in facts["input_top_logprobs"][1:] for entry in top} == {3}

        # What it says of itself, and how it refuses.
        for path, name in (("/model_info", "model_info"), ("/server_info", "server_info"), ("/api/tags", "tags")):
            assert client.look(client.root + path).content.keys() <= OF_SGLANG[name].keys()
        refused = client.look(*protocol.request_naming(400))
        assert refused.status == 400 and "out-of-vocabulary token id 400; valid range is" in str(refused.content)
        assert "out-of-vocabulary token id 512; valid range is" in str(OF_SGLANG["refusals"]["vocabulary"])


def test_the_last_token_of_a_vocabulary_is_read_as_sglang_writes_it(pair, clients):
    """SGLang writes it as 0; where another token is written so, another text was scored."""
    last, ids = OF_SGLANG["last_token"], OF_SGLANG["last_token"]["request"]["input_ids"]
    with running(PretendedServer(pair.teacher, byte_bpe(400), "SGLang")) as server:
        client = clients(server.address)
        protocol = Sglang(client)
        lists = protocol.read(last["answer"], ids, 3)
        assert lists.realised[-1] == pytest.approx(last["answer"]["meta_info"]["input_token_logprobs"][-1][0])
        assert ids[-1] == 511 and lists.texts == ["Once", None]

        pretended = protocol_answer(client, *protocol.request([5, 9, 399, 21], 3))
        assert pretended["meta_info"]["input_token_logprobs"][2][1] == 0
        assert protocol.read(pretended, [5, 9, 399, 21], 3).texts[1] is None
        with pytest.raises(BadAnswer, match="the token 0 in place of 9"):
            protocol.read(changed_token(pretended, 1), [5, 9, 399, 21], 3)


def changed_token(answer, at: int) -> dict:
    answer = copy.deepcopy(answer)
    answer["meta_info"]["input_token_logprobs"][at][1] = 0
    return answer


def test_an_adapter_of_sglang_is_asked_by_its_name_and_known_by_its_folder(pair, clients, monkeypatch):
    server = PretendedServer(pair.teacher, byte_bpe(400), "SGLang")
    base = OF_SGLANG["models"]["data"][0]
    adapter = {**base, "id": "poems", "root": "/adapters/poems", "parent": base["id"], "max_model_len": None}
    own = server.get
    models = json.dumps({"data": [base, adapter]})
    monkeypatch.setattr(server, "get", lambda path: (200, models) if path == "/v1/models" else own(path))
    with running(server):
        chosen = recognise(clients(server.address), "poems")
        assert (chosen.source, chosen.context) == ("/adapters/poems", 122)
        assert chosen.protocol.request([5, 9], 3)[1]["lora_path"] == "poems"
        assert "lora_path" not in recognise(clients(server.address), base["id"]).protocol.request([5, 9], 3)[1]


def test_both_protocols_tell_the_same(pair, served, clients):
    ids = [5, 9, 300, 21, 7]
    client = clients(served.address)
    protocols = (Vllm(client, "tiny"), Sglang(client))
    first, second = (p.read(protocol_answer(client, *p.request(ids, 8)), ids, 8) for p in protocols)
    for one, other in zip(first[:3], second[:3], strict=True):
        assert np.allclose(np.sort(one), np.sort(other))
    assert first.texts == second.texts


@pytest.mark.parametrize(
    ("real", "top", "message"),
    [
        ([-1.0, 8, "x"], [[-0.5, 3, None], [-2.0, 4, None]], "the token 8 in place of 9"),
        ([-1.0, 9, "x"], [[-0.5, 3, None]], "1 listed tokens, expected 2"),
        ([-1.0, 9, "x"], None, "no .logprob, id, text."),
        ([-1.0, 9, "x"], [[-0.5, 3, None], [-2.0, 10**30, None]], "no .logprob, id, text."),
        ([-1.0, 9, "x"], [[-0.5, 3, None], [-2.0, 4, None]], "which it cannot have"),
    ],
)
def test_other_answers_of_sglang_are_told_from_it(clients, real, top, message):
    protocol = Sglang(clients("http://127.0.0.1:1/v1"))
    answer = {"meta_info": {"input_token_logprobs": [[None, 5, None], real], "input_top_logprobs": [None, top]}}
    with pytest.raises(BadAnswer, match=message):
        protocol.read(answer, [5, 9], 2)


@pytest.mark.parametrize("tells", [True, False], ids=["by its models", "by its paths"])
@pytest.mark.parametrize("kind", ["vLLM", "SGLang", "llama.cpp", "Ollama"])
def test_servers_are_recognised_and_two_refused_with_the_reason(pair, clients, kind, tells):
    options = {} if tells else {"owner": "somebody"}
    with running(PretendedServer(pair.teacher, byte_bpe(400), kind, **options)) as server:
        if kind in ("vLLM", "SGLang"):
            recognised = recognise(clients(server.address), None)
            longest = 128 if kind == "vLLM" else 122
            assert (recognised.protocol.name, recognised.model, recognised.context) == (kind, "tiny", longest)
            assert recognised.source == "/models/tiny"
        else:
            with pytest.raises(UserError, match=f"this is {kind}, which tells the log-probabilities of tokens that it"):
                recognise(clients(server.address), None)


def test_a_model_that_is_not_there_is_refused(served, clients):
    with pytest.raises(UserError, match="got the model other, and the server has: tiny"):
        recognise(clients(served.address), "other")
    served.stop()
    with pytest.raises(UserError, match="Expected a running server"):
        recognise(clients(served.address), None)
