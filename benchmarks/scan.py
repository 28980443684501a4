"""Times a block for token counts from one on, finely, and says where a block of more tokens takes less time.

    python -m benchmarks.scan --models qwen3-30b-a3b --out scan.json

Token counts are those at which another program or another tile may begin: a few up to 64, where every number has a
program of its own, then the first, the middle and the last of each range that shares one. Times are device times, as
`block_us` of `benchmarks.blocks`, and the rows have its columns, so `benchmarks.plot` draws them. A *cliff* is a pair
of neighbouring counts of which the larger takes less time by more than both spreads; the largest ones are printed and
recorded. Programs are compiled while others are timed.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.ceilings import measure_bf16_products, measure_read_bandwidth
from benchmarks.record import recorded_run, with_rows
from benchmarks.roofline import block_limit
from jax_marlin_moe.cuda.compiler import compile_cubin, target_architecture
from jax_marlin_moe.cuda.token_ranges import most_tokens
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.measure.replay import plan_block, replayed_block

_EXACT = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_SLOWER = 1.0  # percent; clocks differ by so much between two runs of the same


def token_counts(most: int) -> list[int]:
    """Where programs begin and end, and the middle between: ascending, up to `most`."""
    ends = sorted({end for tokens in range(_EXACT[-1] + 1, most + 1) if (end := most_tokens(tokens)) is not None})
    counts = {tokens for tokens in _EXACT if tokens <= most}
    for first, last in zip([_EXACT[-1], *ends], ends, strict=False):
        counts |= {first + 1, (first + 1 + last) // 2, last}
    return sorted(tokens for tokens in counts if tokens <= most)


def cliffs(rows: list[dict]) -> list[dict]:
    """Neighbouring counts of which the larger takes less time, beyond both spreads and a percent; largest first."""
    rows = sorted(rows, key=lambda row: row["M"])
    found = []
    for before, after in itertools.pairwise(rows):
        percent = 100 * (before["block_us"] / after["block_us"] - 1)
        if percent > _SLOWER and before["block_p10_us"] > after["block_p90_us"]:
            found.append({"from": before["M"], "to": after["M"], "percent": percent})
    return sorted(found, key=lambda one: -one["percent"])


def count_of(row: dict) -> tuple:
    """What a row has timed; the number of tokens is last."""
    return row["model"], row["format"], row["routing"], row["M"]


class Scan:
    """A model's weights, rows and routings on the card, and its programs on the way."""

    def __init__(self, shape: ModelShape, args: argparse.Namespace, pool: concurrent.futures.Executor) -> None:
        self._shape, self._args = shape, args
        ((gate_up, down),) = jax.eval_shape(lambda: random_layers(shape, args.format, jnp.bfloat16, 1))
        sources = {}
        for tokens in reversed(args.tokens):  # those for many tokens compile longest
            most = most_tokens(tokens) or tokens
            if most in sources:
                continue
            plan = plan_block(
                jax.ShapeDtypeStruct((most, gate_up.padded_k), jnp.bfloat16),
                gate_up,
                down,
                top_k=shape.top_k,
                activation="silu",
                scheme=None,
            )
            sources[most] = pool.submit(compile_cubin, plan.source, target_architecture())
        self._programs = sources
        self._layers = random_layers(shape, args.format, jnp.bfloat16)
        most = max(args.tokens)
        # On the host: cutting an array of the device is a program for each number of tokens.
        self._x = np.asarray(jax.random.normal(jax.random.key(8), (most, shape.hidden), jnp.bfloat16))
        self._ids = random_routings(shape.num_experts, shape.top_k, most, 2, zipf=args.routing == "zipf")
        self._weights = np.random.default_rng(7).uniform(0.5, 1.5, self._ids.shape).astype(np.float32)

    def row(self, tokens: int, ceilings: tuple[float, float]) -> dict:
        """One number of tokens, timed."""
        shape, args = self._shape, self._args
        self._programs[most_tokens(tokens) or tokens].result()
        repeats = max(2, min(args.repeats, 16384 // tokens))
        # Parts of the same routings: larger counts have the choices of smaller ones, as far as there are so many.
        flat = self._ids.reshape(-1, shape.top_k)
        starts = [i * tokens % (len(flat) - tokens + 1) for i in range(repeats)]
        ids = np.stack([flat[start : start + tokens] for start in starts])
        weights = self._weights.reshape(-1, shape.top_k)
        router = np.stack([weights[start : start + tokens] for start in starts])
        x = jax.device_put(self._x[:tokens])
        block = replayed_block(x, self._layers, [jax.device_put(one) for one in router], ids, activation="silu")
        times = block.microseconds(samples=args.samples, pause_seconds=args.pause)
        block.close()
        gate_up, down = self._layers[0]
        expert_bytes = (gate_up.nbytes + down.nbytes) / shape.num_experts
        read_tb_s, bf16_tflop_s = ceilings
        limit = block_limit(shape, ids, expert_bytes=expert_bytes, read_tb_s=read_tb_s, bf16_tflop_s=bf16_tflop_s)
        return {
            "model": shape.name,
            "M": tokens,
            "format": args.format,
            "group_size": shape.group_size,
            "dtype": "bfloat16",
            "routing": args.routing,
            "implementation": f"jax_marlin_moe {jmm.__version__}",
            "block_us": statistics.median(times),
            "block_p10_us": times[len(times) // 10],
            "block_p90_us": times[-1 - len(times) // 10],
            "limit_us": limit.microseconds,
        }


def main() -> None:
    """Runs the scan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--most", type=int, default=16384, help="tokens")
    parser.add_argument("--tokens", nargs="+", type=int, help="these counts alone")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--repeats", type=int, default=12, help="routings, fewer where tokens are many")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.005, metavar="SECONDS", help="rest before each sample")
    parser.add_argument("--add", type=pathlib.Path, metavar="FILE", help="an earlier result, whose rows stay")
    parser.add_argument("--commit", help="recorded instead of git's HEAD")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.tokens = sorted(set(args.tokens)) if args.tokens else token_counts(args.most)
    earlier = [] if args.add is None else json.loads(args.add.read_text())["rows"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        scans = {name: Scan(MODELS[name].grouped(get_format(args.format)), args, pool) for name in args.models}
        ceilings = measure_read_bandwidth(), max(measure_bf16_products().values())
        document = recorded_run("benchmarks.scan", args.commit) | {
            "read_tb_s": ceilings[0],
            "bf16_tflop_s": ceilings[1],
            "cliffs": {},
            "rows": with_rows(earlier, [], count_of),
        }
        for name, scan in scans.items():
            for tokens in reversed(args.tokens):
                row = scan.row(tokens, ceilings) | {"commit": document["commit"]}
                print(f"{name} M={tokens}: {row['block_us']:.1f}", flush=True)
                document["rows"] = with_rows(document["rows"], [row], count_of)
                alike = [other for other in document["rows"] if count_of(other)[:-1] == count_of(row)[:-1]]
                document["cliffs"][name] = cliffs(alike)
                args.out.write_text(json.dumps(document, indent=1) + "\n")
            for one in document["cliffs"][name]:
                print(f"{name}: {one['from']} to {one['to']} tokens: {one['percent']:.1f} % faster")


if __name__ == "__main__":
    main()
