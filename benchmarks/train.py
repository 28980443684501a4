"""Times what training through packed experts needs, and writes one JSON file.

    python -m benchmarks.train --models qwen3-30b-a3b mixtral-8x7b --rows 48 256 1024 --out train.json

For each model, format and mean rows per expert: the first product by `jax_marlin_moe.ragged_dot`, and the product of
its derivative with respect to the rows (`dx`). `kernel_us` is the device time of that product's kernel, beside that of
the first kernel of a block with as many rows (`block_kernel_us`), both replayed with a cold L2. For each model and
format: the expert block at `--tokens` tokens, forward, and forward and backward (`step`), with the memory that they
take beyond arguments and results: `peak_mb` by the statistics of the device, `temp_mb` by XLA's plan.

Peers compute the same in the same process, where they are installed, beside the first of the formats:
`jax.lax.ragged_dot` on the dequantised weights ("lax"), with its own derivative; `tokamax.ragged_dot` on int4
("tokamax", forward) and on the dequantised weights ("tokamax_dense"). "equal" is no peer but the card's limit: XLA's
batched product of dense weights, as if all groups had equally many rows. Blocks of peers dequantise as a part of each
call, but those named "held", whose dense weights exist before. What a peer cannot run, what would take more memory than
the card has, or what follows a call of seconds, has its error instead of a time. They come after all rows of this
package.

Times are a user's: the least of several samples of calls in a row that are waited for once. `device_us` is what of that
the card's kernels take, by the profiler. Group sizes are those of a uniform routing.

XLA tries kernels for the products that `jax.lax.ragged_dot` becomes, over matrices as wide as all experts: that takes
more than a minute; with `XLA_FLAGS=--xla_gpu_enable_triton_gemm=false` it has cuBLAS alone to try.

`--lower` only compiles the kernels, into the cache on disk, which needs no card where `JAX_MARLIN_MOE_CUDA_ARCH` names
one: several processes may do that at once, before one measures.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks import peer_tokamax
from benchmarks.programs import Bench
from benchmarks.record import recorded_run
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_products import plan_grouped_product
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.measure.replay import ReplayedPlan, plan_block, replayed_block
from jax_marlin_moe.operands import weight_operands
from jax_marlin_moe.ops.grouped_product import multiplied

_PEERS = ("tokamax", "tokamax_dense", "lax", "equal")
_MOST_PEER_BYTES = 90e9  # beside packed and dense weights


@jax.jit
def dequantized(matrix: jmm.MarlinWeights) -> jax.Array:
    """Dense experts in bfloat16, made one by one."""
    return jax.lax.map(lambda expert: jmm.dequantize(expert).astype(jnp.bfloat16), matrix)


def pulled(product):
    """The derivative of a product of rows with respect to them: (cotangent, rows, *rest) to that of the rows."""
    return lambda cotangent, rows, *rest: jax.vjp(lambda x: product(x, *rest), rows)[1](cotangent)[0]


def sorted_block(product, x, gate_up, down, weights, ids):
    """The block that a JAX user writes: slots sorted by expert, two grouped products, the weighted sum."""
    tokens, top_k = ids.shape
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=gate_up.shape[0]).astype(jnp.int32)
    h = product(x[order // top_k], gate_up, sizes)
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=1)
    y = product((jax.nn.silu(gate) * up).astype(x.dtype), down, sizes)
    slots = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(tokens, top_k, -1)
    return (slots.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


def dequantized_block(product, x, gate_up, down, weights, ids):
    """The same from packed weights, which are dequantised first."""
    return sorted_block(product, x, dequantized(gate_up), dequantized(down), weights, ids)


def packed_block(x, gate_up, down, weights, ids):
    """The block of this package."""
    return jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cuda")


def step(block):
    """The loss, and the gradients of x and of the router weights."""

    def loss(x, weights, gate_up, down, ids, probe):
        return (block(x, gate_up, down, weights, ids).astype(jnp.float32) * probe).sum()

    return jax.value_and_grad(loss, (0, 1))


def named(prefix: str, found: dict) -> dict:
    """Entries of a row."""
    return {f"{prefix}_{key}": value for key, value in found.items()}


@dataclasses.dataclass
class Product:
    """The rows of one product and of a block with as many, sorted where the product wants them so."""

    bench: Bench
    shape: ModelShape
    rows: int  # per expert

    def __post_init__(self) -> None:
        experts, total = self.shape.num_experts, self.rows * self.shape.num_experts
        self.ids = random_routings(experts, self.shape.top_k, total // self.shape.top_k, 1, seed=self.rows)
        self.sizes = jnp.asarray(np.bincount(self.ids.reshape(-1), minlength=experts), jnp.int32)
        self.x = self.bench.normal(1, (total, self.shape.hidden), jnp.bfloat16)
        self.cotangent = self.bench.normal(2, (total, 2 * self.shape.intermediate), jnp.bfloat16)

    def times(self, found: dict) -> dict:
        """With the speeds that belong to times."""
        flop = 2 * self.x.size * self.cotangent.shape[1]
        return found | {
            key.removesuffix("us") + "tflop_s": flop / us / 1e6 for key, us in found.items() if key.endswith("_us")
        }


def kernel_row(bench: Bench, product: Product, packed) -> dict:
    """Device microseconds of the kernels of both products, the least of several samples."""
    matrix, x = multiplied(packed[0]), product.x
    tokens = jax.ShapeDtypeStruct((product.ids.shape[1], *x.shape[1:]), x.dtype)
    plan = plan_grouped_product(
        x,
        matrix,
        x.shape[0],
        transposed=False,
        dtype=x.dtype,
        architecture=target_architecture(),
        num_groups=matrix.num_experts,
    )
    if bench.plans:
        of_block = plan_block(tokens, *packed, top_k=product.shape.top_k, activation="silu", scheme=None)
        for source in (plan.source, of_block.source):
            bench.compile_kernels(source)
        return {}
    result = jax.ShapeDtypeStruct((x.shape[0], matrix.padded_n), x.dtype)
    kernels = ReplayedPlan(plan, [[x, *weight_operands(matrix), product.sizes, None]] * 2, [result])
    found = {"kernel": plan.kernels[-1].name, "kernel_us": kernels.microseconds(samples=5)[0]}
    kernels.close()
    weights = jnp.full(product.ids.shape, 1 / product.shape.top_k, jnp.float32)
    block = replayed_block(x[: tokens.shape[0]], [packed], weights, product.ids)
    block.microseconds(samples=1)
    first = block.plan.position("gate_up")
    found |= {"block_kernel": block.plan.kernels[first].name}
    found |= {"block_kernel_us": block.microseconds([first], samples=5)[0]}
    block.close()
    return found


def product_row(bench: Bench, shape: ModelShape, packed, rows: int, with_kernels: bool) -> dict:
    """One product at so many rows per expert."""
    product = Product(bench, shape, rows)
    ours = partial(jmm.ragged_dot, implementation="cuda")
    row = named("packed", bench.time(ours, product.x, packed[0], product.sizes, device=True))
    arguments = product.cotangent, product.x, packed[0], product.sizes
    row |= named("packed_dx", bench.time(pulled(ours), *arguments, device=True))
    return product.times(row | (kernel_row(bench, product, packed) if with_kernels else {}))


def product_peers(
    bench: Bench, shape: ModelShape, multiplies: dict[str, Callable], dense, quantised, rows: int
) -> dict:
    """The same of the peers that there are weights for: `multiplies` are those with dense ones."""
    product, row = Product(bench, shape, rows), {}
    run = partial(bench.peer, device=True, most_bytes=_MOST_PEER_BYTES)
    if quantised is not None:
        row |= named("tokamax", run("tokamax", peer_tokamax.quantised_product, product.x, quantised, product.sizes))
    for name, multiply in multiplies.items():
        row |= named(name, run(name, multiply, product.x, dense, product.sizes))
        arguments = product.cotangent, product.x, dense, product.sizes
        row |= named(f"{name}_dx", run(f"{name}_dx", pulled(multiply), *arguments))
    return product.times(row)


def dense_products(against: Collection[str]) -> dict[str, Callable]:
    """Grouped products of dense weights, by the name of the peer."""
    products = peer_tokamax.dense_products() | {"lax": jax.lax.ragged_dot}
    return {name: multiply for name, multiply in products.items() if name in against}


def equal_product(rows, matrix, sizes):
    """The product of groups that have equally many rows, whatever `sizes` are."""
    return jax.lax.batch_matmul(rows.reshape(sizes.shape[0], -1, rows.shape[1]), matrix).reshape(rows.shape[0], -1)


def block_times(run: Callable, name: str, block: Callable, arguments: tuple, matrices: tuple) -> dict:
    """A block and its derivatives, timed by `run`."""
    x, weights, ids, probe = arguments
    row = named(name, run(block, x, *matrices, weights, ids, memory=True))
    return row | named(f"{name}_step", run(step(block), x, weights, *matrices, ids, probe, memory=True))


def block_arguments(bench: Bench, shape: ModelShape, tokens: int) -> tuple:
    """x, router weights, ids, and what the result is multiplied with."""
    x = bench.normal(1, (tokens, shape.hidden), jnp.bfloat16)
    logits = bench.normal(3, (tokens, shape.num_experts), jnp.float32)
    weights, ids = bench.made(partial(jmm.route, top_k=shape.top_k), logits)
    return x, weights, ids, bench.normal(2, x.shape, jnp.float32)


def packed_layer(bench: Bench, shape: ModelShape, weight_format: str) -> tuple:
    """The matrices of a random layer."""
    return bench.made(lambda: random_layers(shape, weight_format, jnp.bfloat16, 1)[0])


def packed_rows(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """Rows of this package: which list they belong to, what they are about, what was found."""
    for model, weight_format in itertools.product(args.models, args.formats):
        shape = MODELS[model].grouped(get_format(weight_format))
        packed = packed_layer(bench, shape, weight_format)
        head = {"model": model, "format": weight_format}
        for tokens in args.tokens:
            hidden = 2 * tokens * shape.top_k * 2 * shape.intermediate * 2 / 1e6
            arguments = block_arguments(bench, shape, tokens)
            found = block_times(bench.time, "packed", packed_block, arguments, packed)
            yield "blocks", head | {"tokens": tokens}, {"two_hidden_buffers_mb": hidden} | found
        for rows in args.rows:
            found = product_row(bench, shape, packed, rows, model in args.kernels)
            yield "products", head | {"rows_per_expert": rows}, found
        del packed


def peer_rows(bench: Bench, args: argparse.Namespace) -> Iterator[tuple[str, dict, dict]]:
    """What peers add to rows of the first format."""
    of_blocks = dense_products(args.against)
    multiplies = of_blocks | ({"equal": equal_product} if "equal" in args.against else {})
    quantises = peer_tokamax.installed() and "tokamax" in args.against
    for model in (model for model in args.models if model in args.peers):
        shape, head = MODELS[model].grouped(get_format(args.formats[0])), {"model": model, "format": args.formats[0]}
        packed = packed_layer(bench, shape, args.formats[0]) if multiplies else ()
        dense = tuple(bench.made(dequantized, matrix) for matrix in packed)
        for tokens, (name, product) in itertools.product(args.tokens, of_blocks.items()):
            run = partial(bench.peer, f"{name}_block", most_bytes=_MOST_PEER_BYTES)
            arguments = block_arguments(bench, shape, tokens)
            found = block_times(run, name, partial(dequantized_block, product), arguments, packed)
            found |= block_times(run, f"{name}_held", partial(sorted_block, product), arguments, dense)
            yield "blocks", head | {"tokens": tokens}, found
        del packed
        dense = dense[0] if multiplies else None
        quantised = bench.made(partial(peer_tokamax.random_gate_up, shape)) if quantises else None
        for rows in args.rows:
            found = product_peers(bench, shape, multiplies, dense, quantised, rows)
            yield "products", head | {"rows_per_expert": rows}, found
        del dense, quantised


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--formats", nargs="+", default=["int4", "nvfp4"])
    parser.add_argument("--rows", nargs="*", type=int, default=[48, 256, 1024])
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=MODELS, help="models that peers are timed with; all by default")
    parser.add_argument("--against", nargs="*", default=_PEERS, choices=_PEERS, help="which peers; all by default")
    parser.add_argument("--kernels", nargs="*", default=MODELS, help="models with device times of the kernels alone")
    parser.add_argument("--threads", type=int, default=8, help="that compile before anything runs")
    parser.add_argument("--lower", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    run: dict = recorded_run("benchmarks.train", args.commit) | {"products": [], "blocks": []}
    if args.lower:
        collections.deque(packed_rows(Bench(args.samples, None), args), maxlen=0)
        return
    with ThreadPoolExecutor(args.threads) as threads:
        bench = Bench(args.samples, threads)
        collections.deque(itertools.chain(packed_rows(bench, args), peer_rows(bench, args)), maxlen=0)
    bench.plans = False
    for kind, head, found in itertools.chain(packed_rows(bench, args), peer_rows(bench, args)):
        row = next((row for row in run[kind] if head.items() <= row.items()), None)
        if row is None:
            row = head
            run[kind].append(row)
        row |= found
        print(json.dumps(head | found), flush=True)
        args.out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
