"""Continuous batching: sequences enter and leave a batch of fixed size while it is decoded."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from examples.decoder import Cache, Decoder
from examples.generate import within_mass


@dataclasses.dataclass(eq=False)
class Request:
    """A sequence to write.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: how many new ones at most.
        deliver: called by the engine's thread with each new token and None, and at the end with None and the reason:
            "stop" at the token that ends a text, "length" at `max_tokens`, else what went wrong.
        temperature: 0 takes the likeliest token.
        top_p: mass of the tokens that are drawn from.
        seed: of the draws, which do not depend on the other sequences of the batch.
        cancelled: set it, and the sequence leaves the batch before its next token.
    """

    prompt: Sequence[int]
    max_tokens: int
    deliver: Callable[[int | None, str | None], None]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    cancelled: bool = False
    written: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of the batch on the device."""

    cache: Cache
    last: Int32[Array, " slots"]
    temperature: Float32[Array, " slots"]
    top_p: Float32[Array, " slots"]
    keys: Array

    @classmethod
    def empty(cls, model: Decoder, number: int, capacity: int) -> "Slots":
        """No sequence yet."""
        zeros = jnp.zeros(number, jnp.float32)
        cache = Cache.empty(model.sizes, number, capacity, model.dtype)
        return cls(cache, jnp.zeros(number, jnp.int32), zeros, zeros + 1, jax.random.split(jax.random.key(0), number))


def draw(
    logits: Float32[Array, "batch vocabulary"],
    temperature: Float32[Array, " batch"],
    top_p: Float32[Array, " batch"],
    keys: Array,
) -> Int32[Array, " batch"]:
    """A token for each sequence, by its own temperature, mass and key."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
    narrowed = jax.lax.cond(  # sorting a vocabulary takes long, so not unless a sequence asks for it
        ((temperature > 0) & (top_p < 1)).any(), lambda: within_mass(scaled, top_p[:, None]), lambda: scaled
    )
    drawn = jax.vmap(jax.random.categorical)(keys, narrowed)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


@partial(jax.jit, static_argnames="graph", donate_argnames="slots")
def enter(
    graph: Any,
    state: Any,
    slots: Slots,
    number: Int32[Array, ""],
    tokens: Int32[Array, "1 padded"],
    count: Int32[Array, " 1"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    key: Array,
) -> Slots:
    """Reads a prompt of `count` tokens, padded, into a slot, and draws the token behind it."""
    model = nnx.merge(graph, state)
    logits, own = model(tokens, Cache.empty(model.sizes, 1, tokens.shape[1], model.dtype), count)

    def placed(all_slots: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice(all_slots, one, (number, *[0] * (one.ndim - 1)))

    cache = Cache(jax.tree.map(placed, slots.cache.layers, own.layers), slots.cache.lengths.at[number].set(count[0]))
    drawing = jax.random.fold_in(key, count[0])
    token = draw(logits[:, -1], temperature[None], top_p[None], drawing[None])[0]
    return Slots(
        cache,
        slots.last.at[number].set(token),
        slots.temperature.at[number].set(temperature),
        slots.top_p.at[number].set(top_p),
        slots.keys.at[number].set(key),
    )


@partial(jax.jit, static_argnames="graph", donate_argnames="slots")
def advance(graph: Any, state: Any, slots: Slots, active: Bool[Array, " slots"]) -> Slots:
    """One more token for every active slot; the others are computed too and stay as they are."""
    logits, cache = nnx.merge(graph, state)(slots.last[:, None], slots.cache, active.astype(jnp.int32))
    keys = jax.vmap(jax.random.fold_in)(slots.keys, cache.lengths)
    token = draw(logits[:, -1], jnp.where(active, slots.temperature, 0), slots.top_p, keys)
    return dataclasses.replace(slots, cache=cache, last=jnp.where(active, token, slots.last))


class Engine:
    """Decodes requests in a thread of its own: `submit` from any thread, `close` at the end.

    Args:
        model: the decoder.
        slots: how many sequences are decoded at once.
        capacity: tokens of a sequence, its prompt included.
        end: the tokens that end a text.
        waiting: how many requests may wait for a slot.
    """

    def __init__(
        self, model: Decoder, *, slots: int = 8, capacity: int = 2048, end: Sequence[int] = (), waiting: int = 256
    ) -> None:
        self.capacity, self.end, self.vocabulary = capacity, frozenset(end), model.sizes.vocabulary
        self.error: BaseException | None = None
        self._graph, self._state = nnx.split(model)
        self._slots = Slots.empty(model, slots, capacity)
        self._running: list[Request | None] = [None] * slots
        self._waiting: queue.Queue[Request | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raises ValueError where a request cannot be fulfilled; the message names what and its limit."""
        tokens = len(request.prompt)
        if not tokens:
            raise ValueError("prompt is empty; it must have a token at least")
        outside = [token for token in request.prompt if not 0 <= token < self.vocabulary]
        if outside:
            raise ValueError(f"prompt has the token {outside[0]}; it must lie in [0, {self.vocabulary})")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}; it must be positive")
        if tokens + request.max_tokens > self.capacity:
            raise ValueError(
                f"prompt has {tokens} tokens and max_tokens is {request.max_tokens}; together they must be at most "
                f"{self.capacity}"
            )
        if not request.temperature >= 0:
            raise ValueError(f"temperature is {request.temperature}; it must not be negative")
        if not 0 < request.top_p <= 1:
            raise ValueError(f"top_p is {request.top_p}; it must lie in (0, 1]")

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: as `check`.
            queue.Full: too many wait.
            RuntimeError: the engine has failed, or was stopped.
        """
        self.check(request)
        if not self._thread.is_alive():
            raise RuntimeError(f"the engine does not run: {self.error or 'it was stopped'}")
        self._waiting.put_nowait(request)

    def close(self) -> None:
        """Ends the thread; unfinished sequences end with the reason "stopped"."""
        self._waiting.put(None)
        self._thread.join()

    @property
    def running(self) -> list[Request | None]:
        """The sequences in the slots now."""
        return list(self._running)

    def _run(self) -> None:
        reason = "stopped"
        try:
            while self._admit():
                self._step()
        except BaseException as error:  # the thread's end: requests must hear of it, whatever it was
            self.error, reason = error, f"{type(error).__name__}: {error}"
        left = [request for request in self._running if request is not None]
        while not self._waiting.empty():
            left += [request] if (request := self._waiting.get_nowait()) is not None else []
        for request in left:
            request.deliver(None, reason)

    def _admit(self) -> bool:
        """Fills free slots, and waits for a request while all are free; False when it is time to stop."""
        while None in self._running:
            try:
                request = self._waiting.get(block=not any(self._running))
            except queue.Empty:
                return True
            if request is None:
                return False
            if not request.cancelled:
                self._enter(self._running.index(None), request)
        return True

    def _enter(self, number: int, request: Request) -> None:
        count = len(request.prompt)
        padded = min(max(16, 1 << (count - 1).bit_length()), self.capacity)  # few lengths, so few programs
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, :count] = request.prompt
        self._running[number] = request
        self._slots = enter(
            self._graph,
            self._state,
            self._slots,
            np.int32(number),
            tokens,
            np.asarray([count], np.int32),
            np.float32(request.temperature),
            np.float32(request.top_p),
            jax.random.key(request.seed),
        )
        self._hand_out(number, int(self._slots.last[number]))

    def _step(self) -> None:
        for number, request in enumerate(self._running):
            if request is not None and request.cancelled:
                self._running[number] = None
        active = np.asarray([request is not None for request in self._running])
        if active.any():
            self._slots = advance(self._graph, self._state, self._slots, active)
            tokens = np.asarray(self._slots.last)
            for number in np.flatnonzero(active):
                self._hand_out(number, int(tokens[number]))

    def _hand_out(self, number: int, token: int) -> None:
        request = self._running[number]
        request.written += 1
        if token in self.end:
            reason = "stop"
        else:
            request.deliver(token, None)
            reason = "length" if request.written == request.max_tokens else None
        if reason is not None:
            self._running[number] = None
            request.deliver(None, reason)
