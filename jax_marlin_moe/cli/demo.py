"""Runs a small real checkpoint and a layer of a real size, and prints their errors and times.

Errors are relative to float32 products with the dequantised weights. The time's limit is the packed bytes of the
experts that the tokens hit, read once, at the bandwidth that a sum over a large array reaches on the same device.
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer
from jax_marlin_moe.cli.console import complain, measured_table
from jax_marlin_moe.cli.devices import no_device_reason
from jax_marlin_moe.measure.models import MODELS
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.ops.implementation import unavailable_reason

CHECKPOINT = pathlib.Path(__file__).parent / "demo_checkpoint"

_LARGE_MODEL = "qwen3-30b-a3b"
_TOKENS = (1, 16)  # of either layer
# Blocks in a timed chain, each with a routing of its own, so that caches do not hold the experts; on a GPU enough of
# them to hide the call from Python.
_LINKS = {"cpu": 8, "gpu": 32}
# A call is timed as often as fits these seconds, but at most this many times.
_TIMED_SECONDS, _MOST_TIMED = 1.0, 100
_ERROR_LIMIT = {"float16": 5e-3, "bfloat16": 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(_ERROR_LIMIT), help="type of the tokens")
    parser.add_argument("--small", action="store_true", help="only the checkpoint that the package ships")


@dataclasses.dataclass(frozen=True)
class _Case:
    """One block: `ids` and `weights` have a row of routings per link of the chain."""

    name: str
    x: Float[Array, "tokens H"]
    gate_up: jmm.MarlinWeights
    down: jmm.MarlinWeights
    weights: Float[Array, "links tokens top_k"]
    ids: np.ndarray  # int32 [links, tokens, top_k]

    def bytes_per_block(self) -> float:
        """Packed bytes of the distinct experts of a routing, averaged over the links."""
        per_expert = (self.gate_up.nbytes + self.down.nbytes) / self.gate_up.num_experts
        return per_expert * float(np.mean([len(np.unique(ids)) for ids in self.ids]))


def run(options: argparse.Namespace) -> int:
    """Prints the table; returns 1 if any result is wrong, or the platform's kernels cannot be used."""
    no_device = no_device_reason()
    if no_device:
        complain(f"cannot run: {no_device}")
        return 1
    dtype = jnp.dtype(options.dtype)
    device = jax.devices()[0]
    native_name = {"gpu": "cuda", "cpu": "cpu"}.get(device.platform)
    reason = None if native_name is None else unavailable_reason(native_name)
    names = ["xla"] if native_name is None or reason else [native_name, "xla"]
    print(f"jax_marlin_moe {jmm.__version__}, JAX {jax.__version__}, {device.device_kind} ({device.platform})")
    bandwidth = None if options.small else _read_bandwidth(device.platform)
    if bandwidth is not None:
        print(f"reads {bandwidth / 1e9:.1f} GB/s (sum over a large array, measured now)")
    if native_name is None:
        print(f"no kernels for platform {device.platform}: the reference runs alone")
    print()
    wrong = False
    count = len(_TOKENS) * (1 if options.small else 2)
    headers = ("layer", "tokens", "runs on", "error", "time", "of limit")
    with measured_table("layers", count * len(names), *headers) as add_row:
        for case in _cases(dtype, options.small, _LINKS.get(device.platform, 1)):
            expected = _float32_block(case)
            for name in names:
                error, seconds = _measure(case, name, expected)
                wrong |= not error <= _ERROR_LIMIT[options.dtype]
                # The shipped layer is so small that caches hold it: a share of the memory's bandwidth says nothing.
                share = "-"
                if bandwidth is not None and len(case.ids) > 1:
                    share = f"{case.bytes_per_block() / seconds / bandwidth:.0%}"
                time_text = f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.0f} ms"
                add_row(case.name, str(case.x.shape[0]), name, f"{error:.1e}", time_text, share)
    print()
    print("runs on: xla is the reference in plain JAX; the first of each group is what a call uses by itself")
    print("error: relative L2 against float32 on the dequantised weights; of limit: hit experts' bytes / time / read")
    if wrong:
        complain(f"WRONG: an error exceeds {_ERROR_LIMIT[options.dtype]}")
    if reason:
        complain(f"only the reference ran: {native_name} cannot be used: {reason}")
    return int(wrong or reason is not None)


def _cases(dtype: jnp.dtype, small: bool, links: int) -> Iterator[_Case]:
    layer = load_moe_layer(CHECKPOINT, layer=0)
    for tokens in _TOKENS:
        x = jax.random.normal(jax.random.key(tokens), (tokens, layer.gate_up.k), dtype)
        weights, chosen = layer.route(x)
        name = f"AWQ checkpoint, E={layer.gate_up.num_experts} H={layer.gate_up.k}"
        yield _Case(name, x, layer.gate_up, layer.down, weights[None], np.asarray(chosen)[None])
    if small:
        return
    shape = MODELS[_LARGE_MODEL]
    ((gate_up, down),) = random_layers(shape, "int4", dtype, count=1)
    for tokens in _TOKENS:
        ids = random_routings(shape.num_experts, shape.top_k, tokens, links, seed=tokens)
        weights = jnp.full(ids.shape, 1 / shape.top_k, jnp.float32)
        x = jax.random.normal(jax.random.key(tokens), (tokens, shape.hidden), dtype)
        yield _Case(f"{shape.name}, random weights", x, gate_up, down, weights, ids)


def _float32_block(case: _Case) -> np.ndarray:
    """The first link's block in float32 numpy, expert by expert; nothing is rounded."""

    @jax.jit
    def dense(weights: jmm.MarlinWeights, e: Array) -> Array:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, e, 1), weights)
        return jmm.dense_weights(one)[0]

    x = np.asarray(case.x, np.float32)
    ids, weights = case.ids[0], np.asarray(case.weights[0])
    out = np.zeros_like(x)
    for e in np.unique(ids):
        token, slot = np.nonzero(ids == e)
        gate, up = np.split(x[token] @ np.asarray(dense(case.gate_up, e)), 2, axis=1)
        y = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(dense(case.down, e))
        np.add.at(out, token, y * weights[token, slot][:, None])
    return out


def _measure(case: _Case, implementation: str, expected: np.ndarray) -> tuple[float, float]:
    """Relative L2 error of the first link, and seconds per block."""
    ids = jnp.asarray(case.ids)
    # The reference dequantises whole experts: one block of it is enough.
    links = 1 if implementation == "xla" else len(ids)

    @jax.jit
    def chain(x: Array, gate_up: jmm.MarlinWeights, down: jmm.MarlinWeights, weights: Array, ids: Array) -> Array:
        for i in range(len(ids)):
            x = jmm.fused_moe(x, gate_up, down, weights[i], ids[i], implementation=implementation)
        return x

    def block(count: int) -> Callable[[], Array]:
        routing = case.weights[:count], ids[:count]
        return lambda: chain(case.x, case.gate_up, case.down, *routing)

    actual = np.asarray(block(1)(), np.float32)
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return error, statistics.median(_wall_seconds(block(links))) / links


def _wall_seconds(call: Callable[[], Array]) -> list[float]:
    """Wall times of a call after a warm-up: at least one."""
    jax.block_until_ready(call())
    times: list[float] = []
    while not times or (sum(times) < _TIMED_SECONDS and len(times) < _MOST_TIMED):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def _read_bandwidth(platform: str) -> float:
    """Bytes per second of a sum over an array that no cache holds."""
    data = jnp.ones((1 << 29 if platform == "gpu" else 1 << 26,), jnp.int32)
    total = jax.jit(jnp.sum)
    return data.nbytes / min(_wall_seconds(lambda: total(data)))
