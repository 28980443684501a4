"""Times whole layers on this machine's GPU, beside their expert blocks alone, and writes one JSON file.

    python -m benchmarks.layers --models qwen3-30b-a3b deepseek-v3-tp8 --tokens 1 16 64 --out layers.json

Each time is that of a layer in a jitted chain of 3 to 12, each fed by the one before, called again and again:
`block_us` the routed experts alone, of the ids and weights that the layers choose; `composed_us` the layer of `route`,
`fused_moe` and the shared expert by itself; `layer_us` the layer in one call. Rows are brought back to unit length
after every third layer, in all of them alike.

Each model has a process of its own. All make their weights and compile at the same time; when the last one is ready,
they time one after the other.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import queue
import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.chain import compile_chain, ends_a_norm, time_chain, unit_rows
from benchmarks.record import recorded_run
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers
from jax_marlin_moe.ops.moe_layer import composition

# How each model routes, and whether it has a correction bias and a shared expert as large as the others.
_V3 = jmm.Routing(8, "sigmoid", num_groups=8, top_groups=4, scale=2.5)
_GPT_OSS = jmm.Routing(4, "identity", softmax_after_topk=True)
RULES: dict[str, tuple[jmm.Routing, bool, bool]] = {
    "mixtral-8x7b": (jmm.Routing(2), False, False),
    "qwen3-30b-a3b": (jmm.Routing(8), False, False),
    "qwen3-235b-a22b": (jmm.Routing(8), False, False),
    "deepseek-v3": (_V3, True, True),
    "deepseek-v3-tp8": (_V3, True, True),
    "gpt-oss-20b": (_GPT_OSS, False, False),
    "gpt-oss-120b": (_GPT_OSS, False, False),
    "kimi-k2": (jmm.Routing(8, "sigmoid", scale=2.827), True, True),
}


def make_layers(shape: ModelShape, weight_format: str, dtype) -> list[jmm.MoELayer]:
    """Layers with random weights; their router is in bfloat16."""
    rule, biased, shared = RULES[shape.name]
    layers = []
    for number, (gate_up, down) in enumerate(random_layers(shape, weight_format, dtype)):
        keys = jax.random.split(jax.random.key(100 + number), 3)
        router = jax.random.normal(keys[0], (shape.hidden, shape.num_experts), dtype) * shape.hidden**-0.5
        bias = jax.random.normal(keys[1], (shape.num_experts,), jnp.float32) / 8 if biased else None
        own_bias = jax.random.normal(keys[2], (shape.num_experts,), dtype) / 8 if "gpt-oss" in shape.name else None
        first = partial(jax.tree.map, lambda leaf: leaf[:1] + 0)
        extra = jmm.SharedExpert(first(gate_up), first(down)) if shared else None
        layers.append(
            jmm.MoELayer(gate_up, down, router, rule, router_bias=own_bias, correction_bias=bias, shared=extra)
        )
    return layers


def block(x, layer, weights, ids):
    """The experts alone."""
    return jmm.fused_moe(x, layer.gate_up, layer.down, weights, ids, implementation="cuda")


def composed(x, layer, weights, ids):
    """The layer of several calls."""
    silu = get_activation("silu")
    parts = (x, layer.router, layer.gate_up, layer.down, layer.shared, layer.router_bias, layer.correction_bias)
    static = {"routing": layer.routing, "activation": silu, "shared_activation": silu, "norm_epsilon": 1e-6}
    return composition(*parts, *[None] * 5, **static, implementation="cuda")[0]


def whole(x, layer, weights, ids):
    """The layer in one call."""
    return layer(x, implementation="cuda")


FORMS = {"block_us": block, "composed_us": composed, "layer_us": whole}


def repeats(tokens: int) -> int:
    """Layers of the chain: what takes long is repeated less."""
    return 12 if tokens <= 16 else 6 if tokens <= 256 else 3


def chosen(x: jax.Array, layers: list[jmm.MoELayer], count: int) -> tuple[list[jax.Array], np.ndarray]:
    """Weights and ids of so many layers in a row."""
    call = jax.jit(lambda x, layer: (layer.route(x), layer(x, implementation="cuda")))
    weights, ids = [], []
    for number in range(count):
        (w, i), x = call(x, layers[number % len(layers)])
        weights.append(w)
        ids.append(i)
        x = unit_rows(x) if ends_a_norm(number, count) else x
    return weights, np.stack(ids)


def prepare(name: str, options: argparse.Namespace) -> tuple[list[jmm.MoELayer], list[tuple]]:
    """Weights of a model, and for each number of tokens what is timed: inputs, and the compiled chains by form."""
    shape, dtype = MODELS[name], jnp.dtype(options.dtype)
    layers = make_layers(shape, options.format, dtype)

    def compiled(tokens: int) -> tuple:
        x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), dtype)
        weights, ids = chosen(x, layers, repeats(tokens))
        chains = {form: compile_chain(FORMS[form], x, layers, weights, ids) for form in options.forms}
        return tokens, (x, layers, weights, ids), chains

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return layers, list(pool.map(compiled, options.tokens))


def rows(name: str, prepared: tuple[list[jmm.MoELayer], list[tuple]], options: argparse.Namespace) -> list[dict]:
    """Times all that was prepared."""
    layers, cases = prepared
    timed = []
    for tokens, (x, _, weights, ids), chains in cases:
        calls = 10 if tokens <= 256 else 4
        sampled = {
            form: time_chain(chain, x, layers, weights, ids, options.samples, options.pause, calls)
            for form, chain in chains.items()
        }
        times = {form: round(statistics.median(samples), 2) for form, samples in sampled.items()}
        shared = layers[0].shared is not None
        timed.append({"model": name, "M": tokens, "format": options.format, "shared": shared, **times})
        first, *others = times
        more = ", ".join(f"{form.removesuffix('_us')} {times[form] - times[first]:+7.1f}" for form in others)
        print(f"{name:16s} M={tokens:<5d} {first.removesuffix('_us')} {times[first]:8.1f} us, {more}", flush=True)
    return timed


def run_model(name: str, options: argparse.Namespace, prepared: Any, turn: Any, results: Any) -> None:
    """One model's process: prepares, waits until all have, and times in its turn."""
    try:
        parts = prepare(name, options)
    except BaseException:
        prepared.abort()
        raise
    prepared.wait()
    with turn:
        results.put(rows(name, parts, options))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--format", default="int4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds of rest before each sample")
    parser.add_argument("--commit", help="of the code, where the machine has no checkout")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    spawn = multiprocessing.get_context("spawn")
    shared = spawn.Barrier(len(options.models)), spawn.Lock(), spawn.Queue()
    processes = [spawn.Process(target=run_model, args=(name, options, *shared)) for name in options.models]
    for process in processes:
        process.start()
    timed: list[dict] = []
    while any(process.is_alive() for process in processes) or not shared[2].empty():
        try:
            timed += shared[2].get(timeout=1)
        except queue.Empty:
            continue
        timed.sort(key=lambda row: options.models.index(row["model"]))
        record = recorded_run("benchmarks.layers", options.commit)
        options.out.write_text(json.dumps({**record, "rows": timed}, indent=1) + "\n")
    if len(timed) < len(options.models) * len(options.tokens):
        raise SystemExit("a model's process failed")


if __name__ == "__main__":
    main()
