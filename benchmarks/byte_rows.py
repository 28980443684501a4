"""Times the whole expert block with activations of 8 bits, beside rows of bfloat16 and a peer, in one process.

    python -m benchmarks.byte_rows --models qwen3-30b-a3b --tokens 1024 4096 --peer --out byte_rows.json

Times are those of `benchmarks.blocks`: device times of CUDA graphs of `--repeats` blocks, each with a routing of its
own and the next layer's weights. `kernels_us` has each kernel's time in a graph of its own. `tflop_s` counts the
products of the rows that routing chose, over the block's time; `products_tflop_s` over that of the two products.
`rel_l2` is the error of the rows of a few tokens against float64 of the dequantised weights and of x, nothing of which
is rounded.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.peer_humming import humming_block
from benchmarks.peer_humming_weights import WEIGHT_FORMATS
from benchmarks.record import recorded_run
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.measure.replay import replayed_block

_CHECKED_TOKENS = 8
_LAYERS = 2
_NAMES = {"none": None} | {name: name for name in get_args(ByteDtype)}


@jax.jit
def _expert_rows(rows: jax.Array, layer: tuple[jmm.MarlinWeights, jmm.MarlinWeights], expert: jax.Array) -> jax.Array:
    """Rows of float64 through one expert."""
    gate_up, down = (jmm.dequantize(matrix.expert(expert))[0].astype(rows.dtype) for matrix in layer)
    gate, up = jnp.split(rows @ gate_up, 2, axis=-1)
    return gate / (1 + jnp.exp(-gate)) * up @ down


def exact_rows(x: jax.Array, layer: Any, weights: jax.Array, ids: np.ndarray) -> np.ndarray:
    """The block of the first tokens in float64."""
    ids, weights = ids[:_CHECKED_TOKENS], np.asarray(weights[:_CHECKED_TOKENS], np.float64)
    out = np.zeros((_CHECKED_TOKENS, x.shape[1]))
    with jax.enable_x64(True):
        rows = x[:_CHECKED_TOKENS].astype(jnp.float64)
        for expert in np.unique(ids):
            factors = np.where(ids == expert, weights, 0).sum(-1, keepdims=True)
            out += factors * np.asarray(_expert_rows(rows, layer, jnp.int32(expert)))
    return out


def our_row(shape: ModelShape, layers: list, tokens: int, activation_dtype: ByteDtype | None, args) -> dict:
    """One block of this package."""
    ids = random_routings(shape.num_experts, shape.top_k, tokens, args.repeats)
    weights = jax.random.uniform(jax.random.key(7), (args.repeats, tokens, shape.top_k), jnp.float32, 0.5, 1.5)
    weights /= weights.sum(-1, keepdims=True)
    x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), jnp.bfloat16)
    block = replayed_block(x, layers, weights, ids, activation_dtype=activation_dtype)
    times = block.microseconds(samples=args.samples, pause_seconds=args.pause)
    y = np.asarray(block.results()[0][:_CHECKED_TOKENS], np.float64)
    alone = {
        kernel.name: statistics.median(block.microseconds([i], samples=5, pause_seconds=args.pause))
        for i, kernel in enumerate(block.plan.kernels)
    }
    products = sum(time for name, time in alone.items() if "_gate_up_" in name or "_down_" in name)
    block.close()
    error = None
    if args.errors:
        exact = exact_rows(x, layers[0], weights[0], ids[0])
        error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return {
        "block_us": statistics.median(times),
        "block_p10_us": times[len(times) // 10],
        "block_p90_us": times[-1 - len(times) // 10],
        "kernels_us": alone,
        "products_tflop_s": flops / products / 1e6,
        "rel_l2": error,
        "implementation": f"jax_marlin_moe {jmm.__version__}",
    }


def peer_row(shape: ModelShape, tokens: int, activation_dtype: ByteDtype | None, args) -> dict | None:
    """One block of the peer, on the same routings; None where it is not installed, lacks the format or fails."""
    if args.format not in WEIGHT_FORMATS:
        return None
    ids = random_routings(shape.num_experts, shape.top_k, tokens, args.repeats)
    try:
        return humming_block(
            shape,
            tokens,
            ids,
            samples=args.samples,
            pause_seconds=args.pause,
            activation_dtype=activation_dtype,
            weight_format=args.format,
        )
    except Exception as error:  # a line in the log, not the end of the run
        print(f"the peer failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 4096, 16384])
    parser.add_argument("--activation-dtypes", nargs="+", default=list(_NAMES), choices=list(_NAMES))
    parser.add_argument("--format", default="int4")
    parser.add_argument("--repeats", type=int, default=3, help="routings, each a block of a replay")
    parser.add_argument("--samples", type=int, default=15, help="replays that are timed")
    parser.add_argument("--pause", type=float, default=0.01, metavar="SECONDS", help="before each of them")
    parser.add_argument("--errors", action="store_true", help="compare some rows with float64")
    parser.add_argument("--peer", action="store_true", help="also time humming-kernels")
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    document = recorded_run("benchmarks.byte_rows", args.commit) | {"rows": []}
    for name in args.models:
        shape = MODELS[name].grouped(get_format(args.format))
        layers = random_layers(shape, args.format, jnp.bfloat16, _LAYERS)
        for tokens in args.tokens:
            flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
            for rows in args.activation_dtypes:
                found = [our_row(shape, layers, tokens, _NAMES[rows], args)]
                found += [peer_row(shape, tokens, _NAMES[rows], args)] if args.peer else []
                for row in filter(None, found):
                    about = {"model": name, "M": tokens, "format": args.format, "activation_dtype": _NAMES[rows]}
                    document["rows"].append(about | {"tflop_s": flops / row["block_us"] / 1e6} | row)
                    error = "" if row["rel_l2"] is None else f", error {row['rel_l2']:.1e}"
                    spread = f"{row['block_p10_us']:.1f} - {row['block_p90_us']:.1f}"
                    print(
                        f"{name:16s} M={tokens:<5d} {rows:13s} block {row['block_us']:8.1f} us ({spread}), "
                        f"{flops / row['block_us'] / 1e6:.0f} TFLOP/s{error}, "
                        f"{row['implementation']}",
                        flush=True,
                    )
                args.out.write_text(json.dumps(document, indent=1) + "\n")  # a run that is cut short keeps its rows
        del layers


if __name__ == "__main__":
    main()
