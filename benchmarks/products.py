"""Times single products under `jit`: `linear`, `expert_gemm`, and blocks of experts that are not quantised.

    python -m benchmarks.products --out products.json

Each row has the time of one call in a chain of `--chain` calls with weights of their own, beside what JAX has for the
same: a dot of bfloat16 for `linear`, `moe_gemm` over slots that were aligned before for `expert_gemm`, and
`jax.lax.ragged_dot` over sorted rows for a block. Times are those of the host around the chain, the best of three.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import jax_marlin_moe as jmm
from benchmarks.chain import seconds_of_calls
from benchmarks.record import recorded_run

_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


def microseconds(call: Callable[..., Any], *arguments: Any) -> float:
    """Of one call, the best of three means."""
    run = jax.jit(call)
    jax.block_until_ready(run(*arguments))
    return min(seconds_of_calls(lambda: run(*arguments), 10, 0.0) for _ in range(3)) * 1e6


def normal(*shape: int) -> jax.Array:
    """bfloat16 numbers; a product with them keeps the size of rows."""
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16) / shape[-2] ** 0.5


def linears(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """A square product."""
    dense = normal(args.chain, args.width, args.width)
    packed = jmm.quantize(dense, args.format)
    layers = [packed.expert(layer) for layer in range(args.chain)]
    x = jnp.ones((tokens, args.width), jnp.bfloat16)

    def ours(x, layers):
        for weights in layers:
            x = jmm.linear(x, weights, implementation=args.implementation)
        return x

    def dots(x, dense):
        for weights in dense:
            x = x @ weights
        return x

    return {"us": microseconds(ours, x, layers) / args.chain, "dot_us": microseconds(dots, x, dense) / args.chain}


def dispatches(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """As many rows for each expert."""
    rows = max(1, tokens // args.experts)
    stack = jmm.quantize(normal(args.experts, args.width // 2, args.width // 2), args.format)
    x = jnp.ones((rows * args.experts, stack.k), jnp.bfloat16)
    table = jnp.asarray([(e, e * rows, e * rows, rows) for e in range(args.experts)], jnp.int32)
    ids = jnp.repeat(jnp.arange(args.experts, dtype=jnp.int32), rows)[:, None]
    block = next((size for size in (8, 16, 32, 48, 64) if rows <= size), 64)
    lists = jmm.moe_align_block_size(
        ids, block_size=block, num_experts=args.experts, implementation=args.implementation
    )

    def aligned(x, stack, lists):
        return jmm.moe_gemm(x, stack, lists, top_k=1, implementation=args.implementation)

    return {
        "us": microseconds(partial(jmm.expert_gemm, implementation=args.implementation), x, stack, table),
        "moe_gemm_us": microseconds(aligned, x, stack, lists),
    }


def unquantised(args: argparse.Namespace, tokens: int) -> dict[str, float]:
    """A block of bfloat16 experts."""
    hidden, inner, top_k = args.width // 2, args.width // 8, min(8, args.experts)
    dense = normal(args.experts, hidden, 2 * inner), normal(args.experts, inner, hidden)
    gate_up, down = (jmm.quantize(weights, "bf16") for weights in dense)
    x = jnp.ones((tokens, hidden), jnp.bfloat16)
    weights, ids = jmm.route(jax.random.normal(jax.random.key(0), (tokens, args.experts)), top_k=top_k)

    def ragged(x, gate_up, down, weights, ids):
        order = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=args.experts).astype(jnp.int32)
        rows = jnp.repeat(x, top_k, axis=0)[order]
        h = jax.lax.ragged_dot(rows, gate_up, sizes, preferred_element_type=jnp.float32)
        a = (jax.nn.silu(h[:, :inner]) * h[:, inner:]).astype(x.dtype)
        y = jax.lax.ragged_dot(a, down, sizes, preferred_element_type=jnp.float32)
        y *= weights.reshape(-1)[order][:, None]
        return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(y).astype(x.dtype)

    return {
        "us": microseconds(partial(jmm.fused_moe, implementation=args.implementation), x, gate_up, down, weights, ids),
        "ragged_dot_us": microseconds(ragged, x, *dense, weights, ids),
    }


CASES = {"linear": linears, "expert_gemm": dispatches, "bf16 block": unquantised}


def main() -> None:
    """Prints a row for every case, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", nargs="+", type=int, default=_TOKENS)
    parser.add_argument("--width", type=int, default=4096, help="K and N of linear; the others have parts of it")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chain", type=int, default=8, help="linear calls in a row")
    parser.add_argument("--format", default="int4")
    parser.add_argument(
        "--implementation", choices=("cuda", "cpu"), default=jax.default_backend(), help="that is timed"
    )
    parser.add_argument("--commit", default=None, help="of what is measured; by default git's HEAD")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        for tokens in args.tokens:
            rows.append({"case": case, "tokens": tokens, **CASES[case](args, tokens)})
            print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(recorded_run("benchmarks.products", args.commit) | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
