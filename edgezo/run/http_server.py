"""HTTP for ``edgezo serve``: Starlette and uvicorn speak it on a thread, and the main thread answers (serving.py).

A program on this machine is answered without a key. A page in a browser is not: it can send no JSON to another address
than its own, and a name of its own that leads to here is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edgezo.run.openai_form import (
    AnswerPart,
    ChatQuestion,
    CompletionQuestion,
    Question,
    Refused,
    Reply,
    model_entry,
    read,
)
from edgezo.run.serving import Desk, Job

MOST_BODY_BYTES = 1 << 20
_JSON = "application/json"
_END_S = 2  # what requests have to end in

_Parts = asyncio.Queue[AnswerPart | Refused | None]


@contextmanager
def serving(
    desk: Desk, listening: socket.socket, hosts: Sequence[str], api_key: str | None
) -> Iterator[None]:
    """Inside, a thread speaks HTTP at ``listening`` for ``desk``, whose ``work`` answers. Then every request ends.

    ``hosts``: the names by which programs without a key may ask.
    """
    config = uvicorn.Config(
        _Pages(desk, tuple(hosts), api_key).application(),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_END_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        desk.close()
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class _Pages:
    """What is answered at each path."""

    desk: Desk
    hosts: tuple[str, ...]
    api_key: str | None

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={Refused: _refused, HTTPException: _unknown},
        )

    async def _models(self, request: Request) -> Response:
        self._check_allowed(request)
        entry = model_entry(self.desk.name, self.desk.since)
        return JSONResponse({"object": "list", "data": [entry]})

    async def _model(self, request: Request) -> Response:
        self._check_allowed(request)
        name = request.path_params["name"]
        if name != self.desk.name:
            raise Refused(404, f"there is no model {name}: this is {self.desk.name}", "model")
        return JSONResponse(model_entry(name, self.desk.since))

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionQuestion)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatQuestion)

    def _check_allowed(self, request: Request) -> None:
        """Raises Refused for who has not the key, or where there is none, has led another name to this machine."""
        if self.api_key:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        elif urlsplit(f"//{request.headers.get('host', '')}").hostname not in self.hosts:
            raise Refused(403, "asked by a name that is not this machine's: start with --api-key")

    async def _answer(self, request: Request, kind: type[Question]) -> Response:
        """The answer to a request, whole or as a stream. Raises Refused where there is none."""
        self._check_allowed(request)
        question = read(await _body(request), kind)
        loop, parts = asyncio.get_running_loop(), _Parts()

        def give(part: AnswerPart | Refused | None) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        job = Job(question, give)
        self.desk.add(job)
        reply, part = Reply(question, self.desk.name), await _next(parts)
        if question.stream:
            return StreamingResponse(
                _events(job, reply, part, parts), media_type="text/event-stream"
            )
        every = list[AnswerPart]()
        while part is not None:
            every.append(part)
            if await request.is_disconnected():
                job.gone.set()
                return Response()
            part = await _next(parts)
        return JSONResponse(reply.whole(every, job.usage))


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Refused for one that is too large, or of another type than JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != _JSON:
        raise Refused(415, f"the Content-Type of a request is {_JSON}")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise Refused(413, f"a request has more than {MOST_BODY_BYTES:,} bytes")
    return body


async def _next(parts: _Parts) -> AnswerPart | None:
    """The next part of an answer; None at its end. Raises Refused."""
    part = await parts.get()
    if isinstance(part, Refused):
        raise part
    return part


async def _events(
    job: Job, reply: Reply, part: AnswerPart | None, parts: _Parts
) -> AsyncIterator[bytes]:
    """The events of a stream: its parts, the count of tokens where it is asked for, and the end."""
    try:
        while part is not None:
            yield _event(reply.part(part))
            part = await _next(parts)
        options = job.question.stream_options
        if options is not None and options.include_usage:
            yield _event(reply.end(job.usage))
        yield b"data: [DONE]\n\n"
    except Refused as problem:
        yield _event(problem.body())
    finally:
        job.gone.set()


def _event(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def _refused(request: Request, problem: Any) -> Response:
    return JSONResponse(problem.body(), problem.status)


async def _unknown(request: Request, problem: Any) -> Response:
    """There is no such path, or method."""
    message = f"{request.method} {request.url.path}: {problem.detail}"
    return JSONResponse(Refused(problem.status_code, message).body(), problem.status_code)
