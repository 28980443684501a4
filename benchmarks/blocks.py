"""Times the whole expert block on this machine's GPU and writes one JSON file.

    python -m benchmarks.blocks --models qwen3-30b-a3b mixtral-8x7b --tokens 1 4 16 64 --out blocks.json

`block_us`, `gemm1_us` and `gemm2_us` are device times: the call's kernels in a CUDA graph of `--repeats` blocks, each
with a fresh routing and the next layer's weights, so that L2 is cold. `jit_us` is what a user sees: a block inside a
jitted chain of `--repeats` blocks, each fed by the one before, called again and again. `sm_mhz` is the clock of the
multiprocessors right behind the timed blocks: a card that runs into its power limit lowers it. Every timed
configuration is checked against float32 of the dequantised weights.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Container
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.card import MultiprocessorClock
from benchmarks.ceilings import measure_bf16_products, measure_read_bandwidth
from benchmarks.chain import chain_microseconds
from benchmarks.peers import COMPILERS, PEER_FORMATS, PEERS
from benchmarks.record import recorded_run, with_rows
from benchmarks.roofline import block_limit
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.cuda.compiler import compile_cubin, target_architecture
from jax_marlin_moe.formats import FORMATS, get_format
from jax_marlin_moe.measure.models import LAYERS, MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.measure.replay import plan_block, replayed_block

_CHECKED_TOKENS = 64  # of a block, evenly spread
# In all routings of a replay, at most, but for the fewest: a longer one runs into the power limit by itself.
_ROUTED_TOKENS = 1 << 13
_FEWEST_REPEATS = 2


@dataclasses.dataclass
class Case:
    """One configuration with its data on the card."""

    shape: ModelShape
    tokens: int
    dtype: jnp.dtype
    layers: list
    ids: np.ndarray
    weights: list[jax.Array]  # of each routing
    x: jax.Array
    activation: str | Activation = "silu"


def make_layers(name: str, weight_format: str, dtype: jnp.dtype, args, count: int | None = None) -> list:
    """`random_layers` of a model, with biases where the model has them and they are asked for."""
    shape = MODELS[name].grouped(get_format(weight_format), args.group_size)
    layers = random_layers(shape, weight_format, dtype, count)
    if not (args.own_activation and LAYERS[name].biased):
        return layers
    biases = [jax.random.normal(jax.random.key(i), (m.num_experts, m.padded_n)) / 8 for i, m in enumerate(layers[0])]
    return [
        tuple(dataclasses.replace(matrix, bias=bias) for matrix, bias in zip(layer, biases, strict=True))
        for layer in layers
    ]


def make_case(
    shape: ModelShape,
    layers: list,
    tokens: int,
    repeats: int,
    routing: str,
    dtype: jnp.dtype,
    activation: str | Activation = "silu",
) -> Case:
    """Routings and rows for `layers`."""
    ids = _routings(shape, tokens, repeats, routing)
    weights = np.random.default_rng(7).uniform(0.5, 1.5, ids.shape).astype(np.float32)
    weights /= weights.sum(-1, keepdims=True)
    # From the host: a program that draws them would be compiled for each number of tokens.
    x = jax.device_put(_random_rows(1 << max(14, (tokens - 1).bit_length()), shape.hidden, dtype)[:tokens])
    return Case(shape, tokens, dtype, layers, ids, [jax.device_put(one) for one in weights], x, activation)


@functools.lru_cache
def _routings(shape: ModelShape, tokens: int, repeats: int, routing: str) -> np.ndarray:
    return random_routings(shape.num_experts, shape.top_k, tokens, repeats, zipf=routing == "zipf")


@functools.lru_cache(maxsize=1)  # the blocks of a model follow each other
def _random_rows(tokens: int, columns: int, dtype: jnp.dtype) -> np.ndarray:
    """Normal numbers on the host."""
    return np.asarray(jax.random.normal(jax.random.key(8), (tokens, columns), dtype))


@partial(jax.jit, static_argnames=("activation", "implementation", "batch_invariant"))
def _block(*arguments, activation, implementation, batch_invariant=False):
    return jmm.fused_moe(
        *arguments, activation=activation, implementation=implementation, batch_invariant=batch_invariant
    )


def relative_error(case: Case, batch_invariant: bool) -> float:
    """Relative L2 error of one block of the CUDA kernels, in up to `_CHECKED_TOKENS` tokens, against the reference."""
    gate_up, down = case.layers[0]
    arrays = case.x, case.weights[0], case.ids[0]
    checked = slice(None, None, max(1, case.tokens // _CHECKED_TOKENS))
    blocks = []
    for implementation, rows in (("cuda", slice(None)), ("xla", checked)):
        x, weights, ids = (jax.device_put(np.asarray(array)[rows]) for array in arrays)
        invariant = batch_invariant and implementation == "cuda"
        out = _block(
            x,
            gate_up,
            down,
            weights,
            ids,
            activation=case.activation,
            implementation=implementation,
            batch_invariant=invariant,
        )
        blocks.append(np.asarray(out))
    ours, expected = blocks[0][checked].astype(np.float64), blocks[1].astype(np.float64)
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def our_row(case: Case, routing: str, ceilings: tuple[float, float], clock: MultiprocessorClock, args) -> dict:
    """Times and checks the block of this package."""
    shape, (gate_up, down) = case.shape, case.layers[0]
    read_tb_s, bf16_tflop_s = ceilings
    expert_bytes = (gate_up.nbytes + down.nbytes) / shape.num_experts
    limit = block_limit(shape, case.ids, expert_bytes=expert_bytes, read_tb_s=read_tb_s, bf16_tflop_s=bf16_tflop_s)
    scheme = "batch_invariant" if args.batch_invariant else None
    kernels = replayed_block(case.x, case.layers, case.weights, case.ids, scheme=scheme, activation=case.activation)
    times = kernels.microseconds(samples=args.samples, pause_seconds=args.pause)
    sm_mhz = clock.mhz()
    gemm1_us, gemm2_us = (
        statistics.median(
            kernels.microseconds(
                [kernels.plan.position(stage)], samples=min(args.samples, 15), pause_seconds=args.pause
            )
        )
        for stage in ("gate_up", "down")
    )
    kernels.close()
    block_us = statistics.median(times)
    jit_us = None
    if not args.device_times:
        chain = chain_microseconds(
            lambda x, layer, weights, ids: jmm.fused_moe(
                x,
                *layer,
                weights,
                ids,
                activation=case.activation,
                implementation="cuda",
                batch_invariant=args.batch_invariant,
            ),
            case.x,
            case.layers,
            case.weights,
            case.ids,
            samples=10,
            pause_seconds=args.pause,
        )
        jit_us = statistics.median(chain)
    return {
        "model": shape.name,
        "E": shape.num_experts,
        "k": shape.top_k,
        "H": shape.hidden,
        "I": shape.intermediate,
        "M": case.tokens,
        "format": gate_up.format.name,
        "group_size": shape.group_size,
        "dtype": args.dtype,
        "activation_dtype": args.dtype,
        "routing": routing,
        "activation": get_activation(case.activation).name,
        "biases": gate_up.bias is not None,
        "batch_invariant": args.batch_invariant,
        "implementation": f"jax_marlin_moe {jmm.__version__}",
        "hit_experts": limit.hit_experts,
        "block_us": block_us,
        "block_p10_us": times[len(times) // 10],
        "block_p90_us": times[-1 - len(times) // 10],
        "gemm1_us": gemm1_us,
        "gemm2_us": gemm2_us,
        "jit_us": jit_us,
        "limit_us": limit.microseconds,
        "weight_us": limit.weight_microseconds,
        "tb_s": limit.weight_bytes / block_us / 1e6,
        "tflop_s": limit.flops / block_us / 1e6,
        "rel_l2": relative_error(case, args.batch_invariant),
        "sm_mhz": sm_mhz,
    }


def peer_row(name: str, ours: dict, case: Case, clock: MultiprocessorClock, args) -> dict | None:
    """The peer's row for the configuration of ours, None where it is not installed or fails."""
    try:
        times = PEERS[name](
            case.shape,
            case.tokens,
            case.ids,
            dtype=args.dtype,
            samples=args.samples,
            pause_seconds=args.pause,
            weight_format=ours["format"],
        )
    except Exception as error:  # a peer that fails is a line in the log, not the end of our run
        print(f"{name} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    if times is None:
        print(f"{name} is not installed", flush=True)
        return None
    row = {**ours, "activation": "silu", "biases": False, "jit_us": None, "rel_l2": None, **times}
    row["sm_mhz"] = clock.mhz()
    row["tb_s"] = ours["tb_s"] * ours["block_us"] / row["block_us"]
    row["tflop_s"] = ours["tflop_s"] * ours["block_us"] / row["block_us"]
    return row


def repeats_of(tokens: int, args: argparse.Namespace) -> int:
    """Blocks of a replay, each with a routing of its own."""
    return min(args.repeats, max(_FEWEST_REPEATS, _ROUTED_TOKENS // tokens))


Wanted = dict[tuple[str, str], list[tuple[int, str]]]


def wanted_blocks(args: argparse.Namespace, timed: Container[tuple]) -> Wanted:
    """Tokens and routing of each block that is to be timed, by model and format.

    Args:
        args: of the command line.
        timed: `block_of` each row of earlier results.
    """

    def is_wanted(model: str, weight_format: str, tokens: int, routing: str) -> bool:
        group_size = MODELS[model].grouped(get_format(weight_format), args.group_size).group_size
        layer = LAYERS[model]
        activation = get_activation(layer.activation if args.own_activation else "silu").name
        how = args.dtype, activation, args.own_activation and layer.biased, args.batch_invariant
        return (model, weight_format, group_size, *how, routing, tokens, "jax_marlin_moe") not in timed

    blocks = list(itertools.product(args.tokens, args.routing))
    return {
        case: [block for block in blocks if not args.only_missing or is_wanted(*case, *block)]
        for case in itertools.product(args.models, args.format)
    }


def precompile(
    args: argparse.Namespace, dtype: jnp.dtype, wanted: Wanted
) -> dict[tuple[str, str], list[concurrent.futures.Future]]:
    """Compiles the kernels of all rows beside each other; blocks find them in the kernel cache.

    Returns those of each model and format. With device times alone they may still be at work while others are timed.
    """
    sources: dict[str, tuple[str, str]] = {}
    for (name, weight_format), blocks in wanted.items():
        ((gate_up, down),) = jax.eval_shape(lambda n=name, f=weight_format: make_layers(n, f, dtype, args, 1))
        for tokens in dict.fromkeys(tokens for tokens, _ in blocks):
            plan = plan_block(
                jax.ShapeDtypeStruct((tokens, gate_up.padded_k), dtype),
                gate_up,
                down,
                top_k=MODELS[name].top_k,
                activation=LAYERS[name].activation if args.own_activation else "silu",
                scheme="batch_invariant" if args.batch_invariant else None,
            )
            sources.setdefault(plan.source, (name, weight_format))
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    found = collections.defaultdict(list)
    for source, case in sources.items():
        found[case].append(pool.submit(compile_cubin, source, target_architecture()))
    if not args.device_times:
        concurrent.futures.wait(itertools.chain(*found.values()))
    return found


def draw_routings(args: argparse.Namespace, wanted: Wanted) -> None:
    """Begins with the routings of all rows, which take seconds where tokens are many, beside what follows."""
    pool = concurrent.futures.ThreadPoolExecutor(2)
    for (name, weight_format), blocks in wanted.items():
        shape = MODELS[name].grouped(get_format(weight_format), args.group_size)
        for tokens, routing in blocks:
            pool.submit(_routings, shape, tokens, repeats_of(tokens, args), routing)


_KEY = ("model", "format", "group_size", "dtype", "activation", "biases", "batch_invariant", "routing", "M",
        "implementation")  # fmt: skip


def block_of(row: dict) -> tuple:
    """What a row has timed. Versions of an implementation are the same."""
    *what, implementation = (row[name] for name in _KEY)
    return *what, implementation.split()[0]


def raise_ceiling(document: dict) -> None:
    """No limit is below what anything has reached: a row with a higher rate than the products is the ceiling.

    The limits of all rows follow.
    """
    measured = document["bf16_tflop_s"]
    document["bf16_tflop_s"] = ceiling = max(measured, *(row["tflop_s"] for row in document["rows"]))
    for row in document["rows"]:
        flops = row["tflop_s"] * row["block_us"]  # in millions
        row["limit_us"] = max(row["weight_us"], flops / ceiling)


def print_row(row: dict) -> None:
    """One line; what was not measured is omitted."""
    columns = [f"{name[:-3]} {row[name]:.1f}" for name in ("gemm1_us", "gemm2_us", "jit_us") if row[name] is not None]
    print(
        f"{row['model']:16s} {row['format']:8s} M={row['M']:<5d} {row['routing']:8s} block {row['block_us']:8.1f} us "
        f"({row['block_p10_us']:.1f} - {row['block_p90_us']:.1f}), limit {row['limit_us']:.1f} "
        f"({row['limit_us'] / row['block_us']:.0%}), {row['tb_s']:.2f} TB/s, {row['tflop_s']:.1f} TFLOP/s, "
        f"{', '.join(columns)}, error {row['rel_l2']:.1e}, "
        f"{row['sm_mhz']:.0f} MHz, {row['implementation']}",
        flush=True,
    )


def parsed_arguments() -> argparse.Namespace:
    """The options; ends the program where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="of rows and scales")
    parser.add_argument("--format", nargs="+", default=["int4"], choices=sorted(FORMATS))
    parser.add_argument("--group-size", type=int, help="rows that share a scale (default: the model's or the format's)")
    parser.add_argument("--repeats", type=int, default=24,
                        help="routings, each a block of a replay; fewer where tokens are many")  # fmt: skip
    parser.add_argument("--device-times", action="store_true", help="leave out jit_us, whose programs compile long")
    parser.add_argument("--samples", type=int, default=100, help="replays that are timed")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS",
                        help="rest before each of them, so that the card stays out of its power limit")  # fmt: skip
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PEERS), metavar="PEER",
                        help=f"also time, on the same routings: {', '.join(sorted(PEERS))}")  # fmt: skip
    parser.add_argument(
        "--batch-invariant", action="store_true", help="with schemes that give a row the same bits always"
    )
    parser.add_argument(
        "--own-activation", action="store_true", help="the model's activation and biases, not silu and none"
    )
    parser.add_argument(
        "--add", nargs="*", type=pathlib.Path, default=[], metavar="FILE", help="earlier results, whose rows stay"
    )
    parser.add_argument("--only-missing", action="store_true", help="time no block that the results of --add have")
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    for peer, weight_format in itertools.product(args.peers, args.format):
        if weight_format not in PEER_FORMATS[peer]:
            parser.error(
                f"argument --peers: {peer} is timed on {', '.join(PEER_FORMATS[peer])}, not on {weight_format}; "
                "leave one of them out"
            )
    return args


def main() -> None:
    """Runs the benchmark."""
    args = parsed_arguments()
    dtype = jnp.dtype(args.dtype)
    device = jax.devices()[0]
    earlier = [json.loads(path.read_text()) for path in args.add]
    wanted = wanted_blocks(args, {block_of(row) for document in earlier for row in document["rows"]})
    compiled = precompile(args, dtype, wanted)
    draw_routings(args, wanted)
    products = measure_bf16_products()
    fastest = max(products, key=lambda name: products[name])
    ceilings = measure_read_bandwidth(), products[fastest]
    clock = MultiprocessorClock()
    print(f"{device.device_kind}: read {ceilings[0]:.2f} TB/s, bf16 {ceilings[1]:.0f} TFLOP/s ({fastest})", flush=True)
    document = recorded_run("benchmarks.blocks", args.commit, numpy=np.__version__) | {
        "read_tb_s": ceilings[0],
        "bf16_tflop_s": ceilings[1],
        "bf16_products": products,
        "rows": [],
    }
    for before in earlier:
        document["rows"] = with_rows(document["rows"], before["rows"], block_of)
        document["bf16_tflop_s"] = max(document["bf16_tflop_s"], before["bf16_tflop_s"])
    for (name, weight_format), blocks in wanted.items():
        if not blocks:
            continue
        shape = MODELS[name].grouped(get_format(weight_format), args.group_size)
        layers = make_layers(name, weight_format, dtype, args)
        activation = LAYERS[name].activation if args.own_activation else "silu"
        for peer in set(args.peers) & COMPILERS.keys():
            tokens_once = list(dict.fromkeys(tokens for tokens, _ in blocks))
            COMPILERS[peer](shape, tokens_once, dtype=args.dtype, weight_format=weight_format)
        for program in compiled[name, weight_format]:
            program.result()
        for tokens, routing in blocks:
            repeats = repeats_of(tokens, args)
            case = make_case(shape, layers, tokens, repeats, routing, dtype, activation)
            ours = our_row(case, routing, ceilings, clock, args)
            others = [peer_row(peer, ours, case, clock, args) for peer in args.peers]
            for row in (ours, *others):
                if row is not None:
                    row |= {"commit": document["commit"]}
                    document["rows"] = with_rows(document["rows"], [row], block_of)
                    print_row(row)
            raise_ceiling(document)
            args.out.write_text(json.dumps(document, indent=1) + "\n")  # a run that is cut short keeps its rows
        del layers, case


if __name__ == "__main__":
    main()
