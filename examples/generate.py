"""Generates text with a Qwen3-MoE, gpt-oss or DeepSeek-V3 checkpoint, or times random weights of Qwen3-MoE's sizes.

python -m examples.generate path/to/Qwen3-30B-A3B-AWQ --prompt "Grouped products are"
python -m examples.generate --random qwen3-30b-a3b --batch 1 16 64
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

import jax_marlin_moe as jmm
from examples.decoder import Cache, Decoder, Reader
from examples.models import add_options, load_for
from examples.qwen3_moe import Sizes
from examples.rotary import Rotary
from jax_marlin_moe.random_experts import random_experts

NEVER = -1  # a token that no model has

# Models of random weights: sizes, then experts, experts per token and their intermediate size.
RANDOM = {
    "qwen3-30b-a3b": (Sizes(48, 2048, 151936, 1e-6, False, 32, 4, 128, Rotary.of({}, 128, theta=1e6)), (128, 8, 768)),
    "tiny": (Sizes(2, 128, 256, 1e-6, False, 4, 2, 32, Rotary.of({}, 32, theta=1e4)), (8, 2, 64)),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: the likeliest at temperature 0, else from the smallest set of mass `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0

    def draw(self, logits: Float[Array, "batch vocabulary"], key: Array) -> Int32[Array, " batch"]:
        """One token for each sequence."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_p < 1:
            logits = within_mass(logits, self.top_p)
        return jax.random.categorical(key, logits).astype(jnp.int32)


def within_mass(
    logits: Float[Array, "batch vocabulary"], top_p: float | Float[Array, "batch 1"]
) -> Float[Array, "batch vocabulary"]:
    """The logits of the smallest set of tokens of that mass; -inf for the others."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """Sequences that are being written: the last token of each, which have ended, and what `steps` need."""

    last: Int32[Array, " batch"]
    ended: Array
    cache: Cache
    key: Array


@partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="cache")
def prefill(
    graph: Any, state: Any, tokens: Int32[Array, "batch tokens"], cache: Cache, key: Array, *, sampling: Sampling
) -> Progress:
    """Reads the prompts, all of one length, and draws the first token behind each."""
    logits, cache = nnx.merge(graph, state)(tokens, cache)
    key, draw = jax.random.split(key)
    return Progress(sampling.draw(logits[:, -1], draw), jnp.zeros(len(tokens), bool), cache, key)


@partial(jax.jit, static_argnames=("graph", "steps", "sampling"), donate_argnames="progress")
def decode(
    graph: Any, state: Any, progress: Progress, ends: Int32[Array, " ends"], *, steps: int, sampling: Sampling
) -> tuple[Progress, Int32[Array, "batch steps"], Int32[Array, ""]]:
    """Up to `steps` tokens under one loop, which ends early once all sequences have come to one of `ends`.

    Returns:
        The progress, the tokens, and how many steps were taken.
    """
    model = nnx.merge(graph, state)
    written = jnp.zeros((progress.last.shape[0], steps), jnp.int32)

    def more(carry: tuple[Progress, Array, Array]) -> Array:
        return (carry[2] < steps) & ~carry[0].ended.all()

    def step(carry: tuple[Progress, Array, Array]) -> tuple[Progress, Array, Array]:
        now, written, count = carry
        logits, cache = model(now.last[:, None], now.cache)
        key, draw = jax.random.split(now.key)
        token = sampling.draw(logits[:, -1], draw)
        token = jnp.where(now.ended, ends[0], token)
        ended = now.ended | (token[:, None] == ends).any(axis=1)
        written = jax.lax.dynamic_update_slice_in_dim(written, token[:, None], count, axis=1)
        return Progress(token, ended, cache, key), written, count + 1

    return jax.lax.while_loop(more, step, (progress, written, jnp.zeros((), jnp.int32)))


def generate(
    model: Decoder,
    prompts: Int32[np.ndarray, "batch tokens"],
    *,
    new_tokens: int,
    sampling: Sampling = Sampling(),
    ends: Sequence[int] = (),
    seed: int = 0,
    chunk: int = 8,
) -> Iterator[np.ndarray]:
    """Yields the new tokens of all sequences, [batch, up to `chunk`] at a time, as they are written.

    Args:
        model: the decoder.
        prompts: token ids, all of one length.
        new_tokens: how many at most.
        sampling: how they are drawn.
        ends: tokens that end a sequence, which goes on with the first of them while others are not at their end.
        seed: of the draws.
        chunk: tokens under one compiled loop; the first one comes by itself.
    """
    batch, length = prompts.shape
    graph, state = nnx.split(model)
    cache = Cache.empty(model.sizes, batch, length + new_tokens, model.dtype)
    progress = prefill(graph, state, jnp.asarray(prompts), cache, jax.random.key(seed), sampling=sampling)
    yield np.asarray(progress.last)[:, None]
    ends_with = jnp.asarray(ends or [NEVER], jnp.int32)
    progress = dataclasses.replace(progress, ended=(progress.last[:, None] == ends_with).any(axis=1))
    left = new_tokens - 1
    while left > 0 and not bool(progress.ended.all()):
        steps = min(chunk, left)
        progress, written, count = decode(graph, state, progress, ends_with, steps=steps, sampling=sampling)
        yield np.asarray(written)[:, : int(count)]
        left -= steps


def random_decoder(
    name: str, key: Array, *, layers: int | None = None, weight_format: str = "int4", dtype: Any = jnp.bfloat16
) -> Decoder:
    """A decoder of random weights: experts and attention packed, embedding, head, norms and routers dense."""
    sizes, (experts, top_k, intermediate) = RANDOM[name]
    sizes = dataclasses.replace(sizes, layers=layers or sizes.layers)
    widths = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}

    def draw(text: str) -> Array:
        return jax.random.fold_in(key, zlib.crc32(text.encode()))

    def tensor(text: str) -> Array:
        if "norm" in text:
            return jnp.ones(sizes.head_dim if "q_norm" in text or "k_norm" in text else sizes.hidden)
        return jax.random.normal(draw(text), (sizes.vocabulary, sizes.hidden), dtype)

    def packed(text: str, number: int, k: int, n: int) -> jmm.MarlinWeights:
        return random_experts(
            draw(text), num_experts=number, k=k, n=n, weight_format=weight_format, group_size="customary",
            scale_dtype=dtype,
        )  # fmt: skip

    def linear(text: str) -> jmm.MarlinWeights | Array:
        if text == "lm_head":
            return (jax.random.normal(draw(text), (sizes.hidden, sizes.vocabulary)) * sizes.hidden**-0.5).astype(dtype)
        part = text[-len("q_proj")]
        if part == "o":
            return packed(text, 1, sizes.heads * sizes.head_dim, sizes.hidden)
        return packed(text, 1, sizes.hidden, widths[part] * sizes.head_dim)

    def layer(number: int) -> jmm.MoELayer:
        return jmm.MoELayer(
            packed(f"gate_up {number}", experts, sizes.hidden, 2 * intermediate),
            packed(f"down {number}", experts, intermediate, sizes.hidden),
            (jax.random.normal(draw(f"router {number}"), (sizes.hidden, experts)) * sizes.hidden**-0.5).astype(dtype),
            jmm.Routing(top_k),
        )

    return Decoder(Reader(tensor, linear, dtype), layer, sizes)


def measure(model: Decoder, batch: int, steps: int) -> dict[str, float]:
    """Tokens per second of all sequences together, over `steps` steps under one loop behind one compiled before."""
    graph, state = nnx.split(model)
    cache = Cache.empty(model.sizes, batch, 3 * steps + 1, model.dtype)
    first = jnp.arange(batch, dtype=jnp.int32) * 97 % model.sizes.vocabulary
    progress = Progress(first, jnp.zeros(batch, bool), cache, jax.random.key(0))
    never, seconds = jnp.asarray([NEVER], jnp.int32), []
    for _ in range(3):
        start = time.perf_counter()
        progress, written, _ = decode(graph, state, progress, never, steps=steps, sampling=Sampling())
        jax.block_until_ready(written)
        seconds.append(time.perf_counter() - start)
    best = min(seconds[1:])
    return {
        "layers": model.sizes.layers,
        "batch": batch,
        "tokens_per_s": round(batch * steps / best, 1),
        "ms_per_step": round(1e3 * best / steps, 3),
        "first_call_s": round(seconds[0], 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", help="folder of a checkpoint, or of the packed form")
    parser.add_argument("--prompt", default="Grouped products are", help="text; needs the tokenizers package")
    parser.add_argument("--tokens", type=int, nargs="+", help="token ids in place of the prompt's text")
    parser.add_argument("--new-tokens", type=int, default=64, help="how many at most (with --random: per loop)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="mass of the tokens that are drawn from")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    add_options(parser)
    parser.add_argument("--random", choices=sorted(RANDOM), help="times random weights in place of a checkpoint")
    parser.add_argument("--layers", type=int, help="with --random: the first layers alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences at once, with --random")
    options = parser.parse_args(arguments)
    if options.random:
        dtype = jnp.dtype(options.dtype)
        model = random_decoder(options.random, jax.random.key(0), layers=options.layers, dtype=dtype)
        for batch in options.batch:
            row = measure(model, batch, options.new_tokens)
            print(
                f"{row['layers']} layers, batch {batch:3d}: {row['tokens_per_s']:9.1f} tokens/s, "
                f"{row['ms_per_step']:7.3f} ms per step ({row['first_call_s']:.1f} s with compilation)",
                flush=True,
            )
        return 0
    if options.path is None:
        parser.error("a path is missing; pass the folder of a checkpoint, or --random")
    folder = pathlib.Path(options.path)
    if not options.tokens and folder.is_dir() and not (folder / "tokenizer.json").is_file():
        parser.error(f"{options.path} has no tokenizer.json to read the prompt with; pass token ids, as --tokens 5 17")
    model = load_for(
        parser, folder,
        dtype=options.dtype, quantize=options.quantize, activation_dtype=options.activation_dtype,
    )  # fmt: skip
    sampling = Sampling(options.temperature, options.top_p)
    if options.tokens:
        prompt, ends = options.tokens, []

        def text(ids: list[int]) -> str:
            return "".join(f"{token} " for token in ids)

    else:
        from tokenizers import Tokenizer  # which nothing else here needs

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        prompt, ends = tokenizer.encode(options.prompt).ids, ends_of(options.path)
        before = tokenizer.decode(prompt)

        def text(ids: list[int]) -> str:
            # Behind the prompt: many tokenizers drop the space before the first token that they decode.
            return tokenizer.decode(prompt + ids).removeprefix(before)

        sys.stdout.write(options.prompt)
    shown, ids = "", []
    for chunk in generate(
        model, np.asarray([prompt], np.int32), new_tokens=options.new_tokens, sampling=sampling, ends=ends,
        seed=options.seed,
    ):  # fmt: skip
        ids += [token for token in chunk[0].tolist() if token not in ends]
        whole = text(ids)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a character, which the next tokens complete
            sys.stdout.write(whole.removeprefix(shown))
            sys.stdout.flush()
            shown = whole
    print(text(ids).removeprefix(shown))
    return 0


def ends_of(path: str) -> list[int]:
    """The tokens that end a text, by generation_config.json where there is one, else by config.json."""
    from jax_marlin_moe.checkpoint import Checkpoint

    file = pathlib.Path(path) / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    end = settings.get("eos_token_id", Checkpoint(path).config.get("eos_token_id"))
    return [] if end is None else end if isinstance(end, list) else [end]


if __name__ == "__main__":
    sys.exit(main())
