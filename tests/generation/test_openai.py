"""`megallama serve` as a process, and OpenAI's own client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest

from megallama.generation.generate import generate
from megallama.generation.load import load_model
from megallama.generation.sampling import Sampling
from tests.launching import BIN, ROOT, clean_environment

pytestmark = pytest.mark.peers

GREEDY = Sampling(temperature=0.0)


class Server:
    """The command, from its first line on."""

    def __init__(self, run: Path, home: Path, *words: str) -> None:
        command = [str(BIN / "megallama"), "serve", str(run), "--port", "0", *words]
        environment = clean_environment(home, OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = re.search(r"answers at (http://127.0.0.1:\d+/v1)", self.process.stderr.readline())
        assert found is not None
        self.url = found[1]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def waiting_at(server: Server) -> int:
    with urlopen(server.url.replace("/v1", "/health")) as answer:
        return int(json.load(answer)["waiting"])


@pytest.fixture(scope="module")
def server(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(short_run, tmp_path_factory.mktemp("home"), "--max-batch", "8", "--max-waiting", "40")
    yield started
    assert started.end() == 0


def test_the_client_lists_completes_streams_and_chats(server: Server, short_run: Path) -> None:
    client, run = server.client(), load_model(short_run)
    (listed,) = client.models.list().data
    assert listed.id == "run"
    text = generate(run, "document 7 is", 40, GREEDY)
    whole = client.completions.create(model="run", prompt="document 7 is", max_tokens=40, temperature=0, echo=True)
    assert whole.choices[0].text == text
    stream = client.completions.create(model="run", prompt="document 7 is", max_tokens=40, temperature=0, stream=True)
    pieces = [event.choices[0].text for event in stream]
    assert "document 7 is" + "".join(pieces) == text
    assert len(pieces) > 10
    said = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="run", messages=said, max_tokens=20, temperature=0)  # type: ignore[call-overload]
    continued = generate(run, "User: hi\nAssistant:", 20, GREEDY).removeprefix("User: hi\nAssistant:")
    assert answer.choices[0].message.content == continued.partition("\nUser:")[0].strip()
    streamed = client.chat.completions.create(  # type: ignore[call-overload]
        model="run", messages=said, max_tokens=20, temperature=0, stream=True
    )
    pieces = [event.choices[0].delta.content or "" for event in streamed]
    assert "".join(pieces) == answer.choices[0].message.content


def test_32_requests_at_once_each_get_their_own_text(server: Server, short_run: Path) -> None:
    client, run = server.client(), load_model(short_run)
    prompts = [f"document {number} is " + "x" * (number % 7) for number in range(32)]

    def ask(prompt: str) -> str:
        if len(prompt) % 2:
            stream = client.completions.create(model="run", prompt=prompt, max_tokens=48, temperature=0, stream=True)
            return "".join(event.choices[0].text for event in stream)
        return client.completions.create(model="run", prompt=prompt, max_tokens=48, temperature=0).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, prompts))
    assert found == [generate(run, prompt, 48, GREEDY).removeprefix(prompt) for prompt in prompts]


def test_too_long_a_prompt_is_a_400_of_one_sentence(server: Server, short_run: Path) -> None:
    window = load_model(short_run).config.max_position_embeddings
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().completions.create(model="run", prompt="x" * (window + 1))
    assert refused.value.status_code == 400
    sentence = f"the prompt has {window + 1} tokens, and at most {window} are taken; shorten it"
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["message"] == sentence


def test_a_client_that_leaves_frees_its_place_and_a_full_queue_is_a_503(short_run: Path, tmp_path: Path) -> None:
    server = Server(short_run, tmp_path, "--max-batch", "1", "--max-waiting", "1")
    client = server.client()
    endless = {"model": "run", "prompt": "document 7 is", "max_tokens": 1_000_000, "temperature": 0}
    first = client.completions.create(**endless, stream=True)  # type: ignore[call-overload]
    next(first)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="run", prompt="b", max_tokens=4)
        while waiting_at(server) < 1:
            pass
        with pytest.raises(openai.InternalServerError, match="texts wait for their turn, of at most 1") as refused:
            client.completions.create(model="run", prompt="c")
        assert refused.value.status_code == 503
        first.close()
        assert waiting.result(60).choices[0].finish_reason in ("length", "stop")
    assert server.end() == 0


def test_sigterm_lets_a_text_end_and_leaves_with_0(short_run: Path, tmp_path: Path) -> None:
    server = Server(short_run, tmp_path)
    stream = server.client().completions.create(
        model="run", prompt="document", max_tokens=300, temperature=0.0, stream=True
    )
    pieces = [next(stream).choices[0]]
    leaving = threading.Thread(target=server.process.send_signal, args=(signal.SIGTERM,))
    leaving.start()
    pieces += [event.choices[0] for event in stream]
    assert pieces[-1].finish_reason in ("length", "stop")
    assert server.process.wait(60) == 0
    assert server.process.stderr is not None
    assert server.process.stderr.read() == ""


def test_a_port_that_is_taken_is_told_in_one_sentence(server: Server, short_run: Path, tmp_path: Path) -> None:
    port = server.url.split(":")[2].removesuffix("/v1")
    found = subprocess.run(
        [str(BIN / "megallama"), "serve", str(short_run), "--port", port],
        cwd=ROOT,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    sentence = f"megallama: cannot listen on 127.0.0.1, port {port} ({os.strerror(98)}); use another --host or --port\n"
    assert (found.returncode, found.stderr) == (2, sentence)


def test_a_name_that_is_not_this_machines_is_refused(server: Server) -> None:
    """As a page of another site would have it, whose name its owner points here."""
    with urlopen(Request(server.url + "/models", headers={"Host": "localhost"})) as answer:
        assert answer.status == 200
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(server.url + "/models", headers={"Host": "evil.example"}))
