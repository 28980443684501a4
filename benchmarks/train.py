"""Times what training through packed experts takes on this machine's GPU, and writes one JSON file.

    python -m benchmarks.train --models qwen3-30b-a3b mixtral-8x7b --rows 48 256 1024 --out train.json

For each model, format and mean rows per expert: the first product by `jax_marlin_moe.ragged_dot`, and the product of
its derivative with respect to the rows (`dx`), beside `jax.lax.ragged_dot` on the dequantised weights and its own
derivative. For each model and format: the expert block at `--tokens` tokens, forward and backward, beside the same of
`jax.lax.ragged_dot`, and the memory that XLA reserves for both beyond arguments and results. Times are a user's: the
least of several samples of ten calls that are waited for once. Group sizes are those of a uniform routing.

`--lower` only compiles the kernels, into the cache on disk: several processes may do that at once, before one measures.
"""

import argparse
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.chain import seconds_of_calls
from benchmarks.record import recorded_run
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers

_CALLS = 10


@jax.jit
def dequantized(matrix: jmm.MarlinWeights) -> jax.Array:
    """Dense experts in bfloat16, made one by one."""
    return jax.lax.map(lambda expert: jmm.dequantize(expert).astype(jnp.bfloat16), matrix)


def pulled(product):
    """The derivative of a product of rows with respect to them: (cotangent, rows, *rest) to that of the rows."""
    return lambda cotangent, rows, *rest: jax.vjp(lambda x: product(x, *rest), rows)[1](cotangent)[0]


def dense_block(x, gate_up, down, weights, ids):
    """The block that a JAX user writes: slots sorted by expert, two `jax.lax.ragged_dot`, the weighted sum."""
    tokens, top_k = ids.shape
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=gate_up.shape[0]).astype(jnp.int32)
    h = jax.lax.ragged_dot(x[order // top_k], gate_up, sizes, preferred_element_type=jnp.float32)
    gate, up = jnp.split(h, 2, axis=1)
    y = jax.lax.ragged_dot((jax.nn.silu(gate) * up).astype(x.dtype), down, sizes)
    slots = jnp.zeros_like(y).at[order].set(y).reshape(tokens, top_k, -1)
    return (slots.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


def packed_block(x, gate_up, down, weights, ids):
    """The block of this package."""
    return jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cuda")


def step(block):
    """Gradients of x and of the router weights."""

    def loss(x, weights, gate_up, down, ids, probe):
        return (block(x, gate_up, down, weights, ids).astype(jnp.float32) * probe).sum()

    return jax.grad(loss, (0, 1))


class Bench:
    """Compiles, times, and knows what compiled code needs."""

    def __init__(self, samples: int, only_lowers: bool):
        self.samples, self.only_lowers = samples, only_lowers

    def time(self, function, *arguments, memory: bool = False) -> dict:
        """Microseconds, and with `memory` the megabytes beyond arguments and results."""
        call = jax.jit(function)
        if self.only_lowers:
            call.trace(*arguments).lower(lowering_platforms=("cuda",))
            return {}
        seconds_of_calls(lambda: call(*arguments), 3, 0.0)
        seconds = min(seconds_of_calls(lambda: call(*arguments), _CALLS, 0.05) for _ in range(self.samples))
        found = {"us": seconds * 1e6}
        if memory:
            found["temp_mb"] = call.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 1e6
        return found


def product_row(bench: Bench, shape: ModelShape, matrix, dense, rows: int) -> dict:
    """One product at so many rows per expert."""
    experts, total = shape.num_experts, rows * shape.num_experts
    ids = np.random.default_rng(rows).integers(0, experts, total)
    sizes = jnp.asarray(np.bincount(ids, minlength=experts), jnp.int32)
    x = jax.random.normal(jax.random.key(1), (total, shape.hidden), jnp.bfloat16)
    cotangent = jax.random.normal(jax.random.key(2), (total, 2 * shape.intermediate), jnp.bfloat16)
    row = {"rows_per_expert": rows}
    ours = partial(jmm.ragged_dot, implementation="cuda")
    for name, product, weights in (("packed", ours, matrix), ("dense", jax.lax.ragged_dot, dense)):
        if weights is None:
            continue
        row[f"{name}_us"] = bench.time(product, x, weights, sizes).get("us")
        row[f"{name}_dx_us"] = bench.time(pulled(product), cotangent, x, weights, sizes).get("us")
    if not bench.only_lowers:
        flop = 2 * total * shape.hidden * 2 * shape.intermediate
        row |= {key.replace("_us", "_tflop_s"): flop / us / 1e6 for key, us in row.items() if key.endswith("_us")}
    return row


def block_row(bench: Bench, shape: ModelShape, packed, dense, tokens: int) -> dict:
    """A block and its derivatives at so many tokens."""
    x = jax.random.normal(jax.random.key(1), (tokens, shape.hidden), jnp.bfloat16)
    probe = jax.random.normal(jax.random.key(2), x.shape)
    logits = jax.random.normal(jax.random.key(3), (tokens, shape.num_experts))
    weights, ids = jmm.route(logits, top_k=shape.top_k)
    row = {"tokens": tokens, "two_hidden_buffers_mb": 2 * ids.size * 2 * shape.intermediate * 2 / 1e6}
    for name, block, matrices in (("packed", packed_block, packed), ("dense", dense_block, dense)):
        if matrices is None:
            continue
        forward = bench.time(block, x, *matrices, weights, ids, memory=True)
        backward = bench.time(step(block), x, weights, *matrices, ids, probe, memory=True)
        row |= {f"{name}_{key}": value for key, value in forward.items()}
        row |= {f"{name}_step_{key}": value for key, value in backward.items()}
    return row


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--formats", nargs="+", default=["int4", "nvfp4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[48, 256, 1024])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--lower", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    bench = Bench(args.samples, args.lower)
    run = recorded_run("benchmarks.train", args.commit) | {"products": [], "blocks": []}
    for model in args.models:
        for weight_format in args.formats:
            shape = MODELS[model].grouped(get_format(weight_format))
            (packed,) = random_layers(shape, weight_format, jnp.bfloat16, 1)
            peers = not (args.no_peers or args.lower)
            dense = [dequantized(matrix) for matrix in packed] if peers else None
            head = {"model": model, "format": weight_format}
            for rows in args.rows:
                row = head | product_row(bench, shape, packed[0], dense and dense[0], rows)
                run["products"].append(row)
                print(json.dumps(row), flush=True)
            for tokens in args.tokens:
                row = head | block_row(bench, shape, packed, dense, tokens)
                run["blocks"].append(row)
                print(json.dumps(row), flush=True)
            if not args.lower:
                args.out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
