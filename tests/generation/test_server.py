"""The routes of the server in this process: what they answer, refuse, and do when a client or the server goes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from megallama.cli import app
from megallama.generation.batch import Row
from megallama.generation.generate import generate, write
from megallama.generation.load import Loaded
from megallama.generation.sampling import Sampling
from megallama.generation.server import Service
from megallama.generation.worker import RefusedError, Worker
from tests.generation.tiny import GREEDY, WINDOW, loaded, without_cache


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded()


@pytest.fixture(scope="module")
def client(model: Loaded) -> Iterator[TestClient]:
    service = Service(model, None, 6, 4)
    yield TestClient(service.app)
    service.worker.close(0.0)
    service.worker.join()


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": "tiny", **body})


def test_a_completion_is_what_generate_writes(client: TestClient, model: Loaded) -> None:
    answer = complete(client, prompt="abc", max_tokens=12, temperature=0).json()
    text = generate(model, "abc", 12, GREEDY)
    assert answer["choices"] == [{"index": 0, "text": text[3:], "finish_reason": "length", "logprobs": None}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert complete(client, prompt="abc", max_tokens=12, temperature=0, echo=True).json()["choices"][0]["text"] == text
    ids = [model.tokenizer.encode("abc"), model.tokenizer.encode("d")]
    two = complete(client, prompt=ids, max_tokens=12, temperature=0).json()["choices"]
    assert [choice["text"] for choice in two] == [text[3:], generate(model, "d", 12, GREEDY)[1:]]


def test_choices_are_the_samples_of_a_seed(client: TestClient, model: Loaded) -> None:
    body: dict[str, Any] = {"prompt": ["a", "b"], "max_tokens": 9, "temperature": 0.9, "seed": 4, "n": 2, "stop": "e"}
    choices = complete(client, **body).json()["choices"]
    expected = ["", "", "", ""]
    for piece in write(model, ["a", "b"], 9, Sampling(0.9, seed=4), stop=["e"], samples=2):
        expected[2 * piece.prompt + piece.sample] += piece.text
    assert [choice["text"] for choice in choices] == expected
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


def test_a_stream_holds_the_same_text_in_pieces(client: TestClient) -> None:
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "echo": True}
    lines = complete(client, **body, stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *events, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    whole = complete(client, **body).json()
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_a_chat_is_the_transcript_up_to_the_next_speaker(client: TestClient, model: Loaded) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    text = generate(model, "User: hi\nAssistant:", 7, GREEDY).removeprefix("User: hi\nAssistant:")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text.strip()}
    assert answer["object"] == "chat.completion"


def test_a_chat_in_pieces_is_the_whole_without_white_space_at_its_ends(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = iter(2 * ["  ", "\n so ", " it", " is\n", "\t", " "])
    take = Row.take
    monkeypatch.setattr(Row, "take", lambda *asked: (take(*asked), next(written))[1])
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta["content"] for delta in deltas) == whole == "so  it is"


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt: field required; mend the request"),
    ({"prompt": []}, "prompt: an empty list; give a text, a list of texts, or of ids"),
    ({"prompt": "x" * (WINDOW + 1)}, f"the prompt has 25 tokens, and at most {WINDOW} are taken; shorten it"),
    ({"prompt": [1, 299]}, "prompt: the id 299 is not below 257, the size of the vocabulary"),
    ({"prompt": "a", "model": "gpt-4"}, "model: 'gpt-4' is not served here; use 'tiny'"),
    ({"prompt": "a", "n": 11}, "the request asks for 11 texts, and at most 10 are taken at once"),
    ({"prompt": "a", "logprobs": 3}, "logprobs: input should be null, not '3'; mend the request"),
    ({"prompt": "a", "tools": []}, "tools is not known here; leave it out"),
]
BOUNDS: dict[str, object] = {"temperature": -1, "top_p": 2, "n": 0, "max_tokens": 0, "stop": [""], "seed": -1}


@pytest.mark.parametrize(("body", "sentence"), BAD, ids=[sentence[:30] for _, sentence in BAD])
def test_a_bad_request_is_told_in_one_sentence(client: TestClient, body: dict[str, Any], sentence: str) -> None:
    answer = complete(client, **body)
    expected = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (400, {"error": expected})


@pytest.mark.parametrize("key", BOUNDS)
def test_values_out_of_bounds_are_named(client: TestClient, key: str) -> None:
    answer = complete(client, **{"prompt": "a", key: BOUNDS[key]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(key)


def test_what_is_no_json_is_refused(client: TestClient) -> None:
    for content, kind in ((b"{", "application/json"), (b'{"prompt": "a"}', "text/plain")):
        answer = client.post("/v1/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == 400
    assert client.get("/v2").status_code == client.get("/v1/completions").status_code == 404


def test_an_empty_prompt_begins_a_document_and_a_lone_surrogate_is_no_json(client: TestClient, model: Loaded) -> None:
    answer = complete(client, prompt="", temperature=0, max_tokens=5, echo=True)
    assert answer.json()["choices"][0]["text"] == generate(model, "", 5, GREEDY)
    broken = rb'{"prompt": "a\ud800b"}'
    answer = client.post("/v1/completions", content=broken, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body: invalid json")


Events = list[tuple[Row, str]]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Rows of the batch advance by one token for each release."""
    steps, step = threading.Semaphore(0), Row.take

    def waiting(row: Row, token: int, ends: frozenset[int]) -> str:
        steps.acquire()
        return step(row, token, ends)

    monkeypatch.setattr(Row, "take", waiting)
    yield steps
    steps.release(10_000)


def listener() -> tuple[Events, Callable[[Row, str], None], threading.Event]:
    told: Events = []
    ended = threading.Event()

    def tell(row: Row, text: str) -> None:
        told.append((row, text))
        if row.ended:
            ended.set()

    return told, tell, ended


def test_rows_beyond_the_queue_are_refused_and_a_cancelled_one_makes_room(
    model: Loaded, gate: threading.Semaphore
) -> None:
    worker = Worker(model, 1, 2)
    rows = [Row(model, [n], 6, GREEDY) for n in range(1, 5)]
    _, tell, ended = listener()
    worker.submit(rows[:3], tell)  # one is written, two wait
    with pytest.raises(RefusedError, match="texts wait for their turn, of at most 2; try again later"):
        worker.submit([rows[3]], tell)
    worker.cancel(rows[:2])
    gate.release(7)  # the token in hand of the first, and all of the third
    assert ended.wait(30)
    assert (rows[2].ids[1:], rows[2].ended) == (without_cache(model, [3], 6), "length")
    assert rows[1].new_tokens == 0
    assert rows[0].new_tokens <= 1
    worker.close(30.0)
    worker.join()


def test_a_worker_that_closes_finishes_what_it_can_and_tells_the_others(
    model: Loaded, gate: threading.Semaphore
) -> None:
    worker, row = Worker(model, 1, 2), Row(model, [5], 4, GREEDY)
    _, tell, ended = listener()
    worker.submit([row], tell)
    worker.close(30.0)
    with pytest.raises(RefusedError, match="the server is shutting down"):
        worker.submit([Row(model, [5], 4, GREEDY)], tell)
    gate.release(4)
    worker.join()
    assert ended.is_set()
    assert row.ended == "length"
    late, cut = Worker(model, 1, 2), Row(model, [5], 1000, GREEDY)
    _, tell, ended = listener()
    late.submit([cut], tell)
    late.close(0.0)
    gate.release(1)
    late.join()
    assert ended.is_set()
    assert cut.ended == "error"


def test_a_failure_of_the_writer_is_told_and_raised(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Row, "take", lambda *_: 1 / 0)
    worker = Worker(model, 1, 2)
    _, tell, ended = listener()
    worker.submit([Row(model, [5], 4, GREEDY)], tell)
    assert ended.wait(30)
    with pytest.raises(ZeroDivisionError):
        worker.join()


def test_a_library_that_is_missing_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "megallama.generation.server")
    outcome = CliRunner().invoke(app, ["serve", "nowhere"])
    assert str(outcome.exception) == "megallama serve needs uvicorn; pip install 'megallama[serve]'"
