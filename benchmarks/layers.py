"""Times whole layers on this machine's GPU, beside their expert blocks alone, and writes one JSON file.

    python -m benchmarks.layers --models qwen3-30b-a3b deepseek-v3-tp8 --tokens 1 16 64 --out layers.json

Each time is that of a layer in a jitted chain of `--repeats`, each fed by the one before, called again and again:
`block_us` the routed experts alone, of the ids and weights that the layers choose; `composed_us` the layer of `route`,
`fused_moe` and the shared expert by itself; `layer_us` the layer in one call. Rows are brought back to unit length
after every third layer, in all of them alike.
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.chain import chain_microseconds
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


def compile_ahead(layers: list[jmm.MoELayer], shape: ModelShape, tokens: list[int], dtype) -> None:
    """Compiles the kernels of all forms, several at a time."""

    def compile_one(form, count: int) -> None:
        slots = [jax.ShapeDtypeStruct((count, shape.top_k), kind) for kind in (jnp.float32, jnp.int32)]
        jax.jit(form).lower(jax.ShapeDtypeStruct((count, shape.hidden), dtype), layers[0], *slots)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: compile_one(*job), [(form, count) for form in FORMS.values() for count in tokens]))


def chosen(x: jax.Array, layers: list[jmm.MoELayer], count: int) -> tuple[list[jax.Array], np.ndarray]:
    """Weights and ids of so many layers in a row."""
    call = jax.jit(lambda x, layer: (layer.route(x), layer(x, implementation="cuda")))
    weights, ids = [], []
    for number in range(count):
        (w, i), x = call(x, layers[number % len(layers)])
        weights.append(w)
        ids.append(i)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
        x = (x * scale).astype(x.dtype)
    return weights, np.stack(ids)


def row(layers: list[jmm.MoELayer], shape: ModelShape, tokens: int, args) -> dict:
    """Times one configuration."""
    repeats = args.repeats if tokens <= 256 else 6
    x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), jnp.dtype(args.dtype))
    weights, ids = chosen(x, layers, repeats)
    times = {
        name: statistics.median(chain_microseconds(form, x, layers, weights, ids, args.samples, args.pause))
        for name, form in FORMS.items()
    }
    return {
        "model": shape.name,
        "M": tokens,
        "format": args.format,
        "shared": layers[0].shared is not None,
        **times,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(RULES), choices=list(RULES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=24, help="layers of the chain, at 256 tokens and fewer")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of rest before each sample")
    parser.add_argument("--commit", help="of the code, where the machine has no checkout")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        shape = MODELS[name]
        layers = make_layers(shape, args.format, jnp.dtype(args.dtype))
        compile_ahead(layers, shape, args.tokens, jnp.dtype(args.dtype))
        for tokens in args.tokens:
            rows.append(row(layers, shape, tokens, args))
            block_us, composed_us, layer_us = (rows[-1][form] for form in FORMS)
            print(
                f"{name:16s} M={tokens:<5d} block {block_us:8.1f} us, composed {composed_us - block_us:+6.1f}, "
                f"one call {layer_us - block_us:+6.1f}",
                flush=True,
            )
            args.out.write_text(json.dumps({**recorded_run("benchmarks.layers", args.commit), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
