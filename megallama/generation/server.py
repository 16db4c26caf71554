"""An HTTP server in the shape of OpenAI's completions and chat completions, so that its clients can talk to a run."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import typer
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megallama.errors import UserError
from megallama.generation.batch import Ended, Row
from megallama.generation.chat import STOP, transcript
from megallama.generation.generate import not_finite
from megallama.generation.load import Loaded
from megallama.generation.protocol import Asked, ChatCompletion, Completion, parse
from megallama.generation.text import Stripped
from megallama.generation.worker import RefusedError, Worker
from megallama.text.surrogates import without_surrogates

MOST_BODY = 16 << 20
"""Bytes of a request."""
DEFAULT_TOKENS = 16
"""OpenAI's, of a completion that does not say."""
GRACE_SECONDS = 20.0
"""The time that texts have to end once the server is asked to."""


Events = asyncio.Queue[tuple[int, str, Ended | None]]
"""The number of a choice, its new text, and how it ended, if it has."""


@dataclass(frozen=True)
class Job:
    """A request that has been accepted: a row for each choice, and how its answer looks."""

    rows: list[Row]
    heads: list[str]
    """What each choice begins with: the prompt, where the client wants it echoed."""
    prompt_tokens: int
    chat: bool
    asked: Asked
    id: str
    created: int


class Service:
    """The routes, over one worker."""

    def __init__(self, loaded: Loaded, max_prompt: int | None, max_waiting: int, max_batch: int) -> None:
        self.loaded, self.window = loaded, loaded.config.max_position_embeddings
        self.max_prompt = max_prompt or self.window
        self.worker = Worker(loaded, max_batch, max_waiting)
        self.most_rows = max_waiting + max_batch
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            ],
            exception_handlers={404: _not_found, 405: _not_found},
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 as long as texts are written."""
        written, waiting = self.worker.load
        return JSONResponse({"status": "ok", "model": self.loaded.name, "writing": written, "waiting": waiting})

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        model = {"id": self.loaded.name, "object": "model", "created": 0, "owned_by": "megallama"}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, self._completion_job)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions: the same transcript as `megallama chat`."""
        return await self._answer(request, self._chat_job)

    async def _answer(self, request: Request, make: Callable[[bytes], Job]) -> Response:
        try:
            # Another page in a browser of this machine cannot send JSON without being asked first.
            if not request.headers.get("content-type", "").startswith("application/json"):
                raise UserError("the body is not declared as JSON; send content-type: application/json")
            job = await asyncio.to_thread(make, await _body(request))
            queue = self._submit(job)
        except UserError as error:
            return _error(400, "invalid_request_error", str(error))
        except RefusedError as error:
            return _error(503, "overloaded_error", str(error))
        except ClientDisconnect:
            return Response(status_code=499)
        if job.asked.stream:
            return _Stream(self._stream(job, queue), partial(self.worker.cancel, job.rows))
        return await self._whole(job, queue, request)

    def _completion_job(self, content: bytes) -> Job:
        asked = parse(Completion, content)
        prompts = asked.prompts
        if not prompts:
            raise UserError("prompt: an empty list; give a text, a list of texts, or of ids")
        ids = [self.loaded.encode(prompt) if isinstance(prompt, str) else self._own(prompt) for prompt in prompts]
        texts = [without_surrogates(p) if isinstance(p, str) else self.loaded.tokenizer.decode(p) for p in prompts]
        most = asked.max_tokens or DEFAULT_TOKENS
        return self._job(asked, ids, texts if asked.echo else [""] * len(ids), most, asked.stops, chat=False)

    def _own(self, ids: Sequence[int]) -> list[int]:
        """A prompt of ids; UserError for one that the model has no token for."""
        size = min(self.loaded.tokenizer.vocab_size, self.loaded.config.vocab_size)
        wrong = next((i for i in ids if i >= size), None)
        if wrong is not None:
            raise UserError(f"prompt: the id {wrong} is not below {size}, the size of the vocabulary")
        return list(ids) or self.loaded.encode("")

    def _chat_job(self, content: bytes) -> Job:
        asked = parse(ChatCompletion, content)
        ids = self.loaded.encode(transcript([(each.role, each.content) for each in asked.messages]))
        most = asked.max_completion_tokens or asked.max_tokens or max(1, self.window - len(ids))
        return self._job(asked, [ids], [""], most, [*STOP, *asked.stops], chat=True)

    def _job(
        self,
        asked: Asked,
        prompts: Sequence[list[int]],
        heads: Sequence[str],
        max_tokens: int,
        stop: Sequence[str],
        *,
        chat: bool,
    ) -> Job:
        longest = max(map(len, prompts))
        if longest > self.max_prompt:
            raise UserError(f"the prompt has {longest} tokens, and at most {self.max_prompt} are taken; shorten it")
        if asked.model not in ("", self.loaded.name):
            raise UserError(f"model: {asked.model[:80]!r} is not served here; use {self.loaded.name!r}")
        choices, sampling = asked.n or 1, asked.sampling(secrets.randbits(62))
        if len(prompts) * choices > self.most_rows:
            raise UserError(
                f"the request asks for {len(prompts) * choices} texts, and at most {self.most_rows} are taken at once"
            )
        rows = [
            Row(self.loaded, ids, max_tokens, sampling, stop, number) for ids in prompts for number in range(choices)
        ]
        kind = "chatcmpl" if chat else "cmpl"
        return Job(
            rows,
            [head for head in heads for _ in range(choices)],
            sum(map(len, prompts)),
            chat,
            asked,
            f"{kind}-{secrets.token_hex(12)}",
            int(time.time()),
        )

    def _submit(self, job: Job) -> Events:
        """Hand the rows of a job to the worker, which fills the queue. RefusedError where it has no room."""
        loop, queue = asyncio.get_running_loop(), Events()
        numbers = {row: number for number, row in enumerate(job.rows)}
        stripped = [Stripped() for _ in job.rows]

        def tell(row: Row, text: str) -> None:
            number = numbers[row]
            said = stripped[number].push(text) if job.chat else text
            with suppress(RuntimeError):  # a server that has ended has no loop
                loop.call_soon_threadsafe(queue.put_nowait, (number, said, row.ended))

        self.worker.submit(job.rows, tell)
        return queue

    async def _whole(self, job: Job, queue: Events, request: Request) -> Response:
        collecting = asyncio.create_task(self._collect(job, queue))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            return collecting.result() if collecting.done() else Response(status_code=499)
        finally:
            collecting.cancel()
            leaving.cancel()
            self.worker.cancel(job.rows)

    async def _collect(self, job: Job, queue: Events) -> Response:
        texts, ends = list(job.heads), [""] * len(job.rows)
        async for number, text, ended in _until_all_end(job, queue):
            texts[number] += text
            ends[number] = ended or ""
        if "error" in ends:
            return _error(500, "server_error", self._why())
        choices = [self._choice(job, n, texts[n], ends[n], whole=True) for n in range(len(texts))]
        kind = "chat.completion" if job.chat else "text_completion"
        return JSONResponse(self._frame(job, kind, choices) | {"usage": _usage(job)})

    async def _stream(self, job: Job, queue: Events) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if job.chat else "text_completion"
        begun = [job.chat or bool(head) for head in job.heads]
        for number, head in enumerate(job.heads):
            if begun[number]:
                yield _event(self._frame(job, kind, [self._choice(job, number, head, "", first=True)]))
        async for number, text, ended in _until_all_end(job, queue):
            if ended == "error":
                yield _event(_error_body("server_error", self._why()))
                return
            yield _event(self._frame(job, kind, [self._choice(job, number, text, ended or "")]))
        if job.asked.stream_options is not None and job.asked.stream_options.include_usage:
            yield _event(self._frame(job, kind, []) | {"usage": _usage(job)})
        yield "data: [DONE]\n\n"

    def _frame(self, job: Job, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": job.id, "object": kind, "created": job.created, "model": self.loaded.name, "choices": choices}

    def _choice(
        self, job: Job, number: int, text: str, end: str, *, whole: bool = False, first: bool = False
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "logprobs": None, "finish_reason": end or None}
        if not job.chat:
            return choice | {"text": text}
        if whole:
            return choice | {"message": {"role": "assistant", "content": text}}
        return choice | {"delta": {"role": "assistant", "content": ""} if first else {"content": text}}

    def _why(self) -> str:
        return "the server has ended before this text" if self.worker.closing else not_finite(self.loaded)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # which names the address again
        raise UserError(f"cannot listen on {host}, port {port} ({why}); use another --host or --port") from None


def serve_forever(
    loaded: Loaded, door: socket.socket, max_prompt: int | None, max_waiting: int, max_batch: int
) -> None:
    """Answer until SIGTERM or SIGINT; then texts have GRACE_SECONDS to end."""
    service = Service(loaded, max_prompt, max_waiting, max_batch)
    server = _Server(service)
    # uvicorn raises the signal again once it has ended in order: that is no reason to die of it.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    host, port = door.getsockname()[:2]
    if host.startswith("127."):
        # A page of another site could give its own name the address of this machine.
        service.app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", host])
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{loaded.name} ({loaded.source}) answers at http://{shown}:{port}/v1; Ctrl-C ends it", err=True)
    try:
        server.run(sockets=[door])
    finally:
        service.worker.close(0.0)
        service.worker.join()


class _Stream(StreamingResponse):
    """Server-sent events; `after` is called in any case once nobody listens any more."""

    def __init__(self, events: AsyncIterator[str], after: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


class _Server(uvicorn.Server):
    def __init__(self, service: Service) -> None:
        grace = int(GRACE_SECONDS) + 5
        config = uvicorn.Config(
            service.app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=grace
        )
        super().__init__(config)
        self._worker = service.worker

    async def on_tick(self, counter: int) -> bool:
        """End as well where the worker has failed."""
        return await super().on_tick(counter) or self._worker.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more texts, and let those that are under way end."""
        self._worker.close(GRACE_SECONDS)
        super().handle_exit(sig, frame)


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BODY:
            raise UserError(f"the body has more than {MOST_BODY} bytes; shorten the prompt")
    return bytes(content)


async def _until_all_end(job: Job, queue: Events) -> AsyncIterator[tuple[int, str, Ended | None]]:
    missing = len(job.rows)
    while missing:
        number, text, ended = await queue.get()
        missing -= ended is not None
        yield number, text, ended


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(job: Job) -> dict[str, int]:
    written = sum(row.new_tokens for row in job.rows)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": job.prompt_tokens + written,
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error_body(kind: str, sentence: str) -> dict[str, Any]:
    return {"error": {"message": sentence, "type": kind, "param": None, "code": None}}


def _error(status: int, kind: str, sentence: str) -> Response:
    return JSONResponse(_error_body(kind, sentence), status)


def _not_found(request: Request, _: Exception) -> Response:
    routes = "GET /health, GET /v1/models, POST /v1/completions and POST /v1/chat/completions"
    return _error(404, "invalid_request_error", f"{request.method} {request.url.path} is not here; there are {routes}")
