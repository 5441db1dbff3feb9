"""A server of the tests' own that scores a text with a tiny model, as vLLM or SGLang would; on the loopback interface.

Its answers have the shape of those recorded from real servers (vllm_answer.json and sglang_answer.json in
tests/utils/served).
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

SGLANG_SPARE = 6
"""Tokens by which SGLang's longest text is shorter than the model's context, and one more."""
OWNERS = {"vLLM": "vllm", "SGLang": "sglang", "llama.cpp": "llamacpp", "Ollama": "library"}


class PretendedServer:
    """Answers of one model; `fault(number, body)` may return (status, text) in place of an answer, or None.

    Args:
        kind: the server that it is like.
        delay: seconds for each window, one window at a time.
    """

    def __init__(self, model, tokenizer, kind: str = "vLLM", **options: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.kind = kind
        self.name = options.pop("name", "tiny")
        self.owner = options.pop("owner", OWNERS.get(kind))
        self.context = options.pop("context", 128)
        self.max_logprobs = options.pop("max_logprobs", 1000)
        self.delay = options.pop("delay", 0.0)
        self.key = options.pop("key", "")
        self.tokenizes = options.pop("tokenizes", kind in ("vLLM", "SGLang"))
        assert not options, options

        self.fault: Callable[[int, Mapping[str, Any]], tuple[int, str] | None] = lambda number, body: None
        self.scored = 0
        """Requests for lists."""
        self.answered = 0
        """Those of them that were worked on to the end."""
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0

    # --- the server's life ------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def is_up(self) -> bool:
        return self._http is not None

    def start(self) -> None:
        """Listen; after a stop on the same port."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._write(*server.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._write(*server.post(self.path, body, self.headers.get("Authorization", "")))

            def _write(self, status: int, text: str) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)
                # As a server that is gone: no connection stays open.
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Say nothing of clients that are gone."""

        self._http = Quiet(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def hold(self) -> threading.Event:
        """Answer no request for lists until the event that is returned is set."""
        may_answer = threading.Event()
        self.fault = lambda number, body: None if may_answer.wait(60) else (500, "held for too long")
        return may_answer

    # --- its answers ------------------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, str]:
        if path == "/v1/models":
            root = self.name if self.kind == "SGLang" else f"/models/{self.name}"
            entry = {"id": self.name, "object": "model", "owned_by": self.owner, "root": root}
            return 200, json.dumps({"object": "list", "data": [{**entry, "max_model_len": self.context}]})

        own: dict[str, dict[str, Any]] = {
            "vLLM": {"/version": {}},
            "SGLang": {
                "/model_info": {"model_path": f"/models/{self.name}"},
                "/server_info": {"max_req_input_len": self.context - SGLANG_SPARE},
                # It takes itself for an Ollama, too.
                "/api/tags": {},
            },
            "llama.cpp": {"/props": {}},
            "Ollama": {"/api/tags": {}},
        }

        facts = own[self.kind].get(path)
        return (404, '{"detail":"Not Found"}') if facts is None else (200, json.dumps(facts))

    def post(self, path: str, body: Mapping[str, Any], authorization: str) -> tuple[int, str]:
        if self.key and authorization != f"Bearer {self.key}":
            return 401, json.dumps({"error": f"Unauthorized: got {authorization}"})
        if path == "/tokenize" and self.tokenizes:
            ids = self.tokenizer(body["prompt"], add_special_tokens=False).input_ids
            return 200, json.dumps({"count": len(ids), "tokens": ids})
        if path not in ("/v1/completions", "/generate"):
            return 404, '{"detail":"Not Found"}'

        with self._lock:
            self.scored += 1
            number = self.scored
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.fault(number, body) or self._score(path, body)
        finally:
            with self._lock:
                self.at_once -= 1
                self.answered += 1

    def _score(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        ids = body.get("prompt") or body["input_ids"]
        k = body.get("prompt_logprobs") or body["top_logprobs_num"]
        if k > self.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, json.dumps({"error": {"message": message, "code": 400}})
        if self.kind == "SGLang" and (refusal := self._sglang_refusal(ids, k, body)) is not None:
            return refusal
        if max(ids) >= self.model.config.vocab_size:
            return 400, json.dumps({"error": {"message": f"Token id {max(ids)} is out of vocabulary", "code": 400}})

        with self._lock, torch.no_grad():
            time.sleep(self.delay)
            log_probs = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        top = log_probs.topk(k)
        write = self._sglang if path == "/generate" else self._vllm
        return 200, json.dumps(write(ids, log_probs, top.values.tolist(), top.indices.tolist()))

    def _sglang_refusal(self, ids, k, body: Mapping[str, Any]) -> tuple[int, str] | None:
        """Refuse as SGLang does, which ends at tokens that it does not have."""
        size = self.model.config.vocab_size
        longest = self.context - SGLANG_SPARE
        message = None
        if len(ids) >= longest:
            message = f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({longest} tokens)."
        named = body.get("token_ids_logprob")
        if named and max(named) >= size:
            message = f"token_ids_logprob contains out-of-vocabulary token id {max(named)}; valid range is [0, {size})."
        if message is not None:
            return 400, json.dumps({"error": {"message": message}})

        if max(ids) >= size or k > size:
            self.stop()
            raise ConnectionResetError
        return None

    def _vllm(self, ids, log_probs, values, indices) -> dict[str, Any]:
        positions: list[Any] = [None]
        for at, real in enumerate(ids[1:]):
            rank = int((log_probs[at] > log_probs[at, real]).sum()) + 1
            entries = {str(real): self._entry(real, float(log_probs[at, real]), rank)}
            for place, (token, value) in enumerate(zip(indices[at], values[at], strict=True), start=1):
                entries[str(token)] = self._entry(token, value, place)
            positions.append(entries)
        choice = {"index": 0, "text": "", "logprobs": None, "prompt_logprobs": positions}
        return {"id": "cmpl-0", "object": "text_completion", "model": self.name, "choices": [choice]}

    def _entry(self, token: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": value, "rank": rank, "decoded_token": self.tokenizer.decode([token])}

    def _sglang(self, ids, log_probs, values, indices) -> dict[str, Any]:
        real: list[Any] = [[None, ids[0], self.tokenizer.decode([ids[0]])]]
        tops: list[Any] = [None]
        for at, token in enumerate(ids[1:]):
            # As the real one writes the last token of its vocabulary.
            written = token if token < self.model.config.vocab_size - 1 else 0
            real.append([float(log_probs[at, token]), written, self.tokenizer.decode([written])])
            listed = zip(values[at], indices[at], strict=True)
            tops.append([[value, index, self.tokenizer.decode([index])] for value, index in listed])
        return {"text": "", "meta_info": {"input_token_logprobs": real, "input_top_logprobs": tops}}


@contextmanager
def running(server: PretendedServer) -> Iterator[PretendedServer]:
    """Let a server answer meanwhile."""
    server.start()
    try:
        yield server
    finally:
        server.stop()
