"""The application: routes, keys, bodies, and requests that end when their clients go."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from iqlite.serving.answer import Answer, Done, Event, Settings
from iqlite.serving.asked import ChatAsked, CompletionAsked, parsed
from iqlite.serving.batcher import Batcher
from iqlite.serving.faults import ApiError
from iqlite.serving.page import headers, page
from iqlite.serving.voices import Voice, Voices
from iqlite.serving.wire import ChatForm, TextForm, Whole, sse

LARGEST = 2 * 2**20  # bytes of a body
BODY_S = 30.0  # seconds that a body may take to arrive
LOCAL = ("127.0.0.1", "localhost", "::1")
RETRY_S = "1"


def make_app(voices: Voices, batcher: Batcher, key: str | None, name: str) -> FastAPI:
    """The server of these voices. Without a key only requests that name a local host are answered: a page elsewhere can't borrow the browser's way in."""
    app = FastAPI(title="iqlite", docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    html = page(name)

    def guard(request: Request) -> None:
        if key is None:
            if request.url.hostname not in LOCAL:
                raise ApiError(403, "without a key this server answers on this computer only: start it with --key.")
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the key is wrong or missing: send it as Authorization: Bearer KEY.", code="invalid_api_key")

    @app.get("/")
    def root() -> HTMLResponse:
        return HTMLResponse(html, headers=headers(html))

    @app.get("/v1/models", dependencies=[Depends(guard)])
    def models() -> dict[str, Any]:
        return {"object": "list", "data": voices.listed(created)}

    @app.get("/v1/models/{model:path}", dependencies=[Depends(guard)])
    def model(model: str) -> dict[str, Any]:
        voices.get(model)
        return next(one for one in voices.listed(created) if one["id"] == model)

    @app.post("/v1/chat/completions", dependencies=[Depends(guard)])
    async def chat(request: Request) -> Response:
        asked = parsed(ChatAsked, await _body(request))
        voice, choices = voices.get(asked.model), asked.n or 1
        if asked.rewards and voices.speaker.session is None:
            raise ApiError(400, "rewards: there are no descriptions here to reward by.", param="rewards")
        turns = asked.turns()
        make = partial(ChatForm, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), asked.model, told=asked.top is not None)
        more: dict[str, Any] = {"turns": turns, "rewards": asked.rewards, "top": asked.top}
        return await _answered(request, batcher, voices, voice, asked, [lambda: voices.chat_ids(voice, turns)], choices, make, more)

    @app.post("/v1/completions", dependencies=[Depends(guard)])
    async def complete(request: Request) -> Response:
        asked = parsed(CompletionAsked, await _body(request))
        voice, choices = voices.get(asked.model), asked.n or 1
        make = partial(TextForm, f"cmpl-{secrets.token_hex(12)}", int(time.time()), asked.model, told=asked.logprobs is not None)
        prompts = [partial(voices.raw_ids, voice, prompt) for prompt in asked.prompts]
        more: dict[str, Any] = {"echo": bool(asked.echo), "top": asked.logprobs}
        return await _answered(request, batcher, voices, voice, asked, prompts, choices, make, more)

    @app.exception_handler(ApiError)
    def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, {"Retry-After": RETRY_S} if error.status == 429 else None)

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        fault = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}.")
        return JSONResponse(fault.body(), error.status_code)

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "the server failed at this; its terminal says more.").body(), 500)

    return app


async def _body(request: Request) -> bytes:
    """A JSON body of bounded size; ApiError 413, 415 or 408."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json.")
    too_long = ApiError(413, f"the body is larger than {LARGEST // 2**20} MiB: send less.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > LARGEST:
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body didn't arrive within {BODY_S:.0f} seconds.") from None
    return b"".join(parts)


async def _answered(
    request: Request, batcher: Batcher, voices: Voices, voice: Voice, asked: ChatAsked | CompletionAsked, prompts: Sequence[Callable[[], dict[str, list[int]]]],
    choices: int, make: Callable[..., ChatForm | TextForm], more: dict[str, Any],
) -> Response:  # fmt: skip
    """Queues `choices` answers to each of the prompts, and gives them as they come or when all are there."""
    rows = choices * len(prompts)
    batcher.enter(rows)
    try:
        ids = await asyncio.to_thread(lambda: [one() for one in prompts])
    except BaseException:
        batcher.leave(rows)
        raise
    talk = Talk(asyncio.get_running_loop())
    settings = Settings(
        voice.name,
        1.0 if asked.temperature is None else asked.temperature,
        1.0 if asked.top_p is None else asked.top_p,
        asked.strength,
        1.0 if asked.scale is None else asked.scale,
    )
    seed = secrets.randbits(40) if asked.seed is None else asked.seed
    answers = [
        Answer(
            settings,
            ids[number // choices],
            choice=number,
            number=((seed << 16) + number) % 2**64,
            longest=min(asked.longest, voices.context - max(map(len, ids[number // choices].values()))),
            stops=asked.stops,
            emit=talk.emit,
            gone=lambda: talk.gone,
            decode=partial(voices.chat.tokenizer.decode, skip_special_tokens=True),
            **more,
        )
        for number in range(rows)
    ]
    form = make(sum(len(next(iter(one.values()))) for one in ids))
    watching = asyncio.create_task(talk.watch(request))
    batcher.put(answers)
    if asked.stream:
        stream = _streamed(talk, form, rows, asked.wants_usage, watching)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    wholes = [Whole() for _ in answers]
    try:
        async for event in talk.events(rows):
            wholes[event.choice].add(event)
    finally:
        talk.gone = True
        watching.cancel()
    return JSONResponse(form.whole(wholes))


async def _streamed(
    talk: Talk, form: ChatForm | TextForm, rows: int, wants_usage: bool, watching: asyncio.Task[None]
) -> AsyncIterator[str]:
    completion_tokens = 0
    try:
        for chunk in form.first(rows):
            yield sse(chunk)
        async for event in talk.events(rows):
            completion_tokens += event.completion_tokens if isinstance(event, Done) else 0
            for chunk in form.chunks(event):
                yield sse(chunk)
        if wants_usage:
            yield sse(form.last(completion_tokens))
        yield sse("[DONE]")
    except ApiError as error:
        yield sse(error.body())
    finally:
        talk.gone = True
        watching.cancel()


class Talk:
    """One request between the model's thread, which emits, and the client, who may go."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.gone = loop, False
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(self, event: Event | None) -> None:
        """Another event, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def watch(self, request: Request) -> None:
        """Notes that the client has gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.emit(None)

    async def events(self, rows: int) -> AsyncIterator[Any]:
        """What comes of so many answers, until all are done; raises what refuses them, and ends early when the client has gone."""
        left = rows
        while left:
            event = await self._queue.get()
            if event is None:
                raise ApiError(499, "the client has gone.")
            if isinstance(event, ApiError):
                raise event
            yield event
            left -= isinstance(event, Done)
