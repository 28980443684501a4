"""All expert layers of a checkpoint over the devices of one host or several, read in shares and called in a loop.

    python -m examples.sharded path/to/checkpoint --expert 4 --tensor 2 --tokens 1024
    python -m examples.sharded path/to/checkpoint --expert 16 --coordinator 10.0.0.1:1234 --processes 2 --process 0

Rows are random and there is no attention: it shows where weights lie, what moves, and how long the experts take.
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_marlin_moe import StackedMoELayer
from jax_marlin_moe.checkpoint import load_moe_layers
from jax_marlin_moe.sharding import MoESharding, parallel_layer

Tokens = tuple[str, ...]


def run(stack: StackedMoELayer, x: jax.Array, sharding: MoESharding, tokens: Tokens, exchange: str) -> jax.Array:
    """Rows through all layers, each with a residual; compiled once for all of them."""

    def layer(h: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(h.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-6)
        rows = (h * scale).astype(h.dtype)
        return h + parallel_layer(stack[index], rows, sharding, tokens=tokens, exchange=exchange), None

    return jax.lax.scan(layer, x, jnp.arange(len(stack)))[0]


def local_bytes(stack: StackedMoELayer) -> int:
    """Of the weights that one device has."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(stack))


def main(arguments: Sequence[str] | None = None) -> jax.Array:
    """The command; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="folder of the checkpoint")
    parser.add_argument("--expert", type=int, default=1, help="devices over which the experts are")
    parser.add_argument("--tensor", type=int, default=1, help="devices over which the intermediate dimension is")
    parser.add_argument("--tokens", type=int, default=256, help="rows of all devices")
    parser.add_argument("--exchange", choices=("all", "gather", "ragged"), default="all",
                        help="all: every device has all rows; else those of the experts have ranges")  # fmt: skip
    parser.add_argument("--quantize", help="the format that plain experts get")
    parser.add_argument("--coordinator", help="address of process 0, where there are several")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, num_processes=args.processes, process_id=args.process)
    mesh = jax.make_mesh((args.expert, args.tensor), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = MoESharding(mesh)
    start = time.perf_counter()
    stack = load_moe_layers(args.path, stacked=True, sharding=sharding, quantize=args.quantize)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(stack))
    print(
        f"{len(stack)} layers, {whole / 1e6:.1f} MB, {local_bytes(stack) / 1e6:.1f} MB on each of {mesh.size} devices, "
        f"read in {time.perf_counter() - start:.1f} s"
    )
    tokens: Tokens = () if args.exchange == "all" else ("expert",)
    rows = NamedSharding(mesh, PartitionSpec(*tokens))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=rows)
    x = draw(jax.random.key(0), (args.tokens, stack.layers.router.shape[1]), jnp.bfloat16)
    exchange = "gather" if args.exchange == "all" else args.exchange
    call = jax.jit(lambda stack, x: run(stack, x, sharding, tokens, exchange))
    y = jax.block_until_ready(call(stack, x))
    start = time.perf_counter()
    jax.block_until_ready(call(stack, x))
    print(f"{args.tokens} tokens in {(time.perf_counter() - start) * 1e3:.2f} ms, rows {y.sharding.spec}")
    return y


if __name__ == "__main__":
    main()
