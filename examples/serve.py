"""Offers a checkpoint over HTTP: OpenAI's /v1/completions, streamed or whole, with continuous batching.

python -m examples.serve path/to/Qwen3-30B-A3B-AWQ --port 8000
curl localhost:8000/v1/completions -d '{"prompt": "Grouped products are", "max_tokens": 32, "stream": true}'

Needs the `examples` extra. Prompts are texts, or lists of token ids where the folder has no tokenizer.json.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import queue
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from examples.batching import Engine, Request
from examples.generate import ends_of
from examples.models import add_options, load_for

# Fields of a completion: the type that each must have. `model` and `user` change nothing; what OpenAI has besides is
# refused unless it has the value under which nothing is asked for.
FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str, list), "max_tokens": (int,), "temperature": (int, float), "top_p": (int, float), "seed": (int,),
    "stop": (str, list), "stream": (bool,), "model": (str,), "user": (str,),
}  # fmt: skip
NEUTRAL = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "presence_penalty": 0,
           "frequency_penalty": 0, "logit_bias": None, "stream_options": None}  # fmt: skip


class BadRequest(ValueError):
    """What a client can put right; `param` is the field in question."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclasses.dataclass(frozen=True)
class Texts:
    """Between texts and tokens: by the tokenizer of the checkpoint, or as numbers where it has none."""

    tokenizer: Any = None

    @classmethod
    def of(cls, path: str) -> "Texts":
        """Those of a checkpoint."""
        file = pathlib.Path(path) / "tokenizer.json"
        if not file.exists():
            return cls()
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(file)))

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a text."""
        if self.tokenizer is None:
            raise BadRequest("prompt is a text, and this checkpoint has no tokenizer.json; send token ids", "prompt")
        return self.tokenizer.encode(prompt).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return "".join(f" {token}" for token in tokens) if self.tokenizer is None else self.tokenizer.decode(tokens)


@dataclasses.dataclass
class Writer:
    """The text of one sequence as it grows: whole characters alone, and nothing from a stop sequence on.

    Attributes:
        decode: tokens to text.
        stops: texts at which the sequence ends.
        tokens: so far.
        shown: how many characters were given out.
        stopped: whether a stop sequence was found.
    """

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    shown: int = 0
    stopped: bool = False

    def add(self, token: int) -> str:
        """What may be shown once this token is there."""
        self.tokens.append(token)
        return self._show(last=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._show(last=True)

    def _show(self, last: bool) -> str:
        text = self.decode(self.tokens)
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            end = min(found)
        elif last:
            end = len(text)
        else:  # the end may be a part of a character, or the beginning of a stop sequence
            held = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            end = len(text) - max(held, default=0)
            end = min(end, len(text.rstrip("\ufffd")))
        shown, self.shown = self.shown, max(self.shown, end)
        return text[shown : self.shown]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A completion as a client asked for it."""

    prompts: list[list[int]]
    options: dict[str, Any]
    stops: tuple[str, ...]
    stream: bool

    @classmethod
    def of(cls, body: Any, texts: Texts) -> "Asked":
        """Reads the body of a request; raises BadRequest, which names the field."""
        if not isinstance(body, dict):
            raise BadRequest(f"the body has type {type(body).__name__}; it must be a JSON object")
        for name, value in body.items():
            if name in NEUTRAL:
                if value not in (None, NEUTRAL[name]):
                    raise BadRequest(f"{name} is {value!r}; this server computes {NEUTRAL[name]!r} alone", name)
            elif name not in FIELDS:
                raise BadRequest(f"{name} is no field of a completion; there are {', '.join(FIELDS)}", name)
            elif value is not None and (
                not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and bool not in FIELDS[name])
            ):
                kinds = " or ".join(kind.__name__ for kind in FIELDS[name])
                raise BadRequest(f"{name} is {value!r}; it must be {kinds}", name)
        given = {name: value for name, value in body.items() if value is not None}
        if "prompt" not in given:
            raise BadRequest("prompt is missing; send a text, token ids, or a list of either", "prompt")
        prompt, stop = given["prompt"], given.get("stop", ())
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise BadRequest(f"stop is {stop!r}; it must be a text that is not empty, or a list of such", "stop")
        options = {name: given[name] for name in ("temperature", "top_p", "seed") if name in given}
        return cls(
            [_tokens(one, texts) for one in (prompt if several else [prompt])],
            {"max_tokens": given.get("max_tokens", 16), "temperature": 1.0, **options},
            stops,
            given.get("stream", False),
        )


def _tokens(prompt: Any, texts: Texts) -> list[int]:
    if isinstance(prompt, str):
        return texts.encode(prompt)
    if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
        raise BadRequest("prompt has something that is neither a text nor a list of token ids", "prompt")
    return prompt


class Server:
    """The handlers, over one engine.

    Args:
        engine: decodes.
        texts: of the checkpoint.
        name: of the model, in answers.
    """

    def __init__(self, engine: Engine, texts: Texts, name: str) -> None:
        self.engine, self.texts, self.name = engine, texts, name
        self.app = Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    async def health(self, http: HTTPRequest) -> Response:
        """200 while the engine runs."""
        error = self.engine.error
        return JSONResponse({"status": "ok"}) if error is None else _error(500, str(error), "server_error")

    async def models(self, http: HTTPRequest) -> Response:
        """The one model."""
        entry = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def completions(self, http: HTTPRequest) -> Response:
        """Writes on behind prompts."""
        events: asyncio.Queue[tuple[int, int | None, str | None]] = asyncio.Queue()
        loop, requests = asyncio.get_running_loop(), []
        try:
            asked = Asked.of(await _json(http), self.texts)
            for index, prompt in enumerate(asked.prompts):

                def deliver(token: int | None, reason: str | None, index: int = index) -> None:
                    if not loop.is_closed():
                        loop.call_soon_threadsafe(events.put_nowait, (index, token, reason))

                request = Request(prompt, deliver=deliver, **asked.options)
                self.engine.check(request)
                requests.append(request)
            for request in requests:
                self.engine.submit(request)
        except (BadRequest, ValueError) as error:
            return _error(400, str(error), "invalid_request_error", getattr(error, "param", None))
        except (queue.Full, RuntimeError) as error:
            for request in requests:
                request.cancelled = True
            full = isinstance(error, queue.Full)
            return _error(503, "too many requests wait; try again later" if full else str(error), "server_error")
        parts = self._parts(events, requests, asked.stops)
        if asked.stream:
            return StreamingResponse(self._events(parts), media_type="text/event-stream")
        return await self._whole(parts, requests)

    async def _parts(
        self, events: asyncio.Queue, requests: list[Request], stops: tuple[str, ...]
    ) -> AsyncIterator[tuple[int, str, str | None]]:
        """Index, new text and reason to end of the sequences, as they come; ends with the last of them."""
        writers = [Writer(self.texts.decode, stops) for _ in requests]
        running = set(range(len(requests)))
        try:
            while running:
                index, token, reason = await events.get()
                if index not in running:
                    continue
                writer = writers[index]
                text = writer.finish() if token is None else writer.add(token)
                if writer.stopped:
                    requests[index].cancelled, reason = True, "stop"
                if reason is not None:
                    running.discard(index)
                if text or reason is not None:
                    yield index, text, reason
        finally:  # the client may be gone
            for request in requests:
                request.cancelled = True

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
            "model": self.name,
        }  # fmt: skip

    async def _events(self, parts: AsyncIterator[tuple[int, str, str | None]]) -> AsyncIterator[str]:
        head = self._head()
        async for index, text, reason in parts:
            if reason not in (None, "stop", "length"):
                yield f"data: {json.dumps(_error_body(reason, 'server_error'))}\n\n"
                return
            yield f"data: {json.dumps(head | {'choices': [_choice(index, text, reason)]})}\n\n"
        yield "data: [DONE]\n\n"

    async def _whole(self, parts: AsyncIterator[tuple[int, str, str | None]], requests: list[Request]) -> Response:
        texts, reasons = [""] * len(requests), [""] * len(requests)
        async for index, text, reason in parts:
            texts[index] += text
            reasons[index] = reason or reasons[index]
        failed = [reason for reason in reasons if reason not in ("stop", "length")]
        if failed:
            return _error(500, failed[0], "server_error")
        prompt, written = (
            sum(numbers) for numbers in zip(*((len(r.prompt), r.written) for r in requests), strict=True)
        )
        usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        choices = [_choice(i, text, reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return JSONResponse(self._head() | {"choices": choices, "usage": usage})


async def _json(http: HTTPRequest) -> Any:
    try:
        return json.loads(await http.body())
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _error(status: int, message: str, kind: str, param: str | None = None) -> Response:
    return JSONResponse(_error_body(message, kind, param), status_code=status)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="folder of a checkpoint, or of the packed form")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--slots", type=int, default=8, help="sequences that are decoded at once")
    parser.add_argument("--capacity", type=int, default=2048, help="tokens of a sequence, its prompt included")
    add_options(parser)
    options = parser.parse_args(arguments)
    model = load_for(
        parser, options.path,
        dtype=options.dtype, quantize=options.quantize, activation_dtype=options.activation_dtype,
    )  # fmt: skip
    engine = Engine(model, slots=options.slots, capacity=options.capacity, end=ends_of(options.path))
    server = Server(engine, Texts.of(options.path), pathlib.Path(options.path).resolve().name)
    try:
        uvicorn.run(server.app, host=options.host, port=options.port, log_level="info")
    finally:
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
