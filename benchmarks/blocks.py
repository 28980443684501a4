"""Times the whole expert block on this machine's GPU and writes one JSON file.

    python -m benchmarks.blocks --models qwen3-30b-a3b mixtral-8x7b --tokens 1 4 16 64 --out blocks.json

`block_us`, `gemm1_us` and `gemm2_us` are device times: the call's kernels in a CUDA graph of `--repeats` blocks, each
with a fresh routing and the next layer's weights, so that L2 is cold. `jit_us` is what a user sees: a block inside a
jitted chain of `--repeats` blocks, each fed by the one before, called again and again. Every timed configuration is
checked against float32 of the dequantised weights.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.ceilings import measure_bf16_rate, measure_read_bandwidth
from benchmarks.record import current_commit, recorded_command
from benchmarks.roofline import block_limit
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.argument_shapes import MODELS, ModelShape
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan import plan_fused_moe
from jax_marlin_moe.cuda.replay import ReplayedPlan
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.ops.operands import weight_operands

_L2_BYTES = 60e6
_LAYER_BUDGET = 24e9  # bytes of weights held on the card for one model


def random_experts(key, experts: int, k: int, n: int, group_size: int, weight_format: str, dtype) -> jmm.MarlinWeights:
    """Random codes, with scales that keep the variance of the rows that pass through."""
    row = get_format(weight_format)
    keys = jax.random.split(key, 3)
    packed = jax.random.bits(keys[0], (experts, k // 16, n * 16 // row.codes_per_word), jnp.uint32)
    deviation = ((row.max_code + 1) ** 2 / 12) ** 0.5
    scales = jax.random.uniform(keys[1], (experts, k // group_size, n), jnp.float32, 0.5, 1.5) / deviation / k**0.5
    zeros = None
    if row.has_zero_points:
        zeros = jax.random.bits(keys[2], (experts, k // group_size, n // row.codes_per_word), jnp.uint32)
        zeros = jax.lax.bitcast_convert_type(zeros, jnp.int32)
    packed = jax.lax.bitcast_convert_type(packed, jnp.int32)
    return jmm.MarlinWeights(packed, scales.astype(dtype), zeros, None, None, row)


def routings(shape: ModelShape, tokens: int, repeats: int, kind: str, seed: int = 0) -> np.ndarray:
    """Ids [repeats, tokens, top_k]: each token's experts are distinct, drawn uniformly or by Zipf's law."""
    rng = np.random.default_rng(seed)
    popularity = np.ones(shape.num_experts)
    if kind == "zipf":
        popularity = 1 / rng.permutation(np.arange(1, shape.num_experts + 1))
    # Gumbel top-k draws without replacement in proportion to the popularity.
    noise = rng.gumbel(size=(repeats, tokens, shape.num_experts))
    return np.argsort(-(np.log(popularity) + noise), axis=-1)[..., : shape.top_k].astype(np.int32)


@dataclasses.dataclass
class Case:
    """One configuration with its data on the card."""

    shape: ModelShape
    tokens: int
    dtype: jnp.dtype
    layers: list
    ids: np.ndarray
    weights: jax.Array
    x: jax.Array


def make_layers(shape: ModelShape, weight_format: str, dtype) -> list:
    """As many layers as exceed L2 several times, within the budget."""
    layer_bytes = 1.5 * shape.num_experts * shape.hidden * shape.intermediate * (1 + 2 * 2 / shape.group_size)
    count = max(1, min(8, int(_LAYER_BUDGET / layer_bytes), int(np.ceil(20 * _L2_BYTES / layer_bytes))))
    make = jax.jit(random_experts, static_argnums=(1, 2, 3, 4, 5, 6))
    layers = []
    for i in range(count):
        a, b = jax.random.split(jax.random.key(i))
        gate_up = make(
            a, shape.num_experts, shape.hidden, 2 * shape.intermediate, shape.group_size, weight_format, dtype
        )
        down = make(b, shape.num_experts, shape.intermediate, shape.hidden, shape.group_size, weight_format, dtype)
        # The activation and the weighted sum shrink the rows: scale them back, so that a chain neither dies nor grows.
        down = dataclasses.replace(down, scales=(down.scales.astype(jnp.float32) * 4).astype(dtype))
        layers.append((gate_up, down))
    return layers


def make_case(shape: ModelShape, layers: list, tokens: int, repeats: int, routing: str, dtype) -> Case:
    """Routings and rows for `layers`."""
    ids = routings(shape, tokens, repeats, routing)
    weights = jax.random.uniform(jax.random.key(7), (repeats, tokens, shape.top_k), jnp.float32, 0.5, 1.5)
    x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), dtype)
    return Case(shape, tokens, dtype, layers, ids, weights / weights.sum(-1, keepdims=True), x)


def time_chain(case: Case, samples: int, **options) -> list[float]:
    """Microseconds per block inside a chain, one value for every ten calls of it.

    Calls follow each other as in a decoding loop, waited for once in ten. The rows are donated, so that every call
    finds its buffers where the captured graph has them.
    """
    repeats = case.ids.shape[0]

    @partial(jax.jit, donate_argnums=0)
    def chain(x, layers, ids, weights):
        for i in range(repeats):
            gate_up, down = layers[i % len(layers)]
            x = jmm.fused_moe(x, gate_up, down, weights[i], ids[i], **options)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
        return (x * scale).astype(x.dtype)

    ids, weights = list(jnp.asarray(case.ids)), list(case.weights)
    x = case.x + 0

    def run(calls: int) -> float:
        nonlocal x
        start = time.perf_counter()
        for _ in range(calls):
            x = chain(x, case.layers, ids, weights)
        jax.block_until_ready(x)
        return (time.perf_counter() - start) / calls

    run(5)
    return [run(calls=10) / repeats * 1e6 for _ in range(samples)]


def replayed(case: Case) -> ReplayedPlan:
    """The block's kernels over the case's routings, outside of XLA."""
    gate_up, down = case.layers[0]
    shape, tokens = case.shape, case.tokens
    plan = plan_fused_moe(
        case.x,
        gate_up,
        down,
        tokens=tokens,
        top_k=shape.top_k,
        routed_experts=shape.num_experts,
        mapped=False,
        activation=get_activation("silu"),
        architecture=target_architecture(),
    )
    absent = jnp.zeros((0,), jnp.int32)
    operands = [
        [case.x, *weight_operands(first), *weight_operands(second), case.weights[i], jnp.asarray(case.ids[i]), absent]
        for i in range(len(case.ids))
        for first, second in [case.layers[i % len(case.layers)]]
    ]
    return ReplayedPlan(plan, operands, [jax.ShapeDtypeStruct(case.x.shape, case.x.dtype)])


def relative_error(case: Case, **options) -> float:
    """Relative L2 error of one block against the reference."""
    gate_up, down = case.layers[0]
    arguments = (case.x, gate_up, down, case.weights[0], jnp.asarray(case.ids[0]))
    ours = jax.jit(lambda *a: jmm.fused_moe(*a, **options))(*arguments)
    expected = jax.jit(lambda *a: jmm.fused_moe(*a, implementation="xla"))(*arguments)
    ours, expected = (np.asarray(a, np.float64) for a in (ours, expected))
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def peer_row(ours: dict, shape: ModelShape, tokens: int, ids: np.ndarray, args) -> dict | None:
    """The peer's row for the configuration of ours, None where it is not installed or fails."""
    from benchmarks.peers import humming_block

    try:
        times = humming_block(shape, tokens, ids, dtype=args.dtype, samples=args.samples)
    except Exception as error:  # a peer that fails is a line in the log, not the end of our run
        print(f"peer failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    if times is None:
        return None
    row = {**ours, "jit_us": None, "rel_l2": None, **times}
    row["tb_s"] = ours["tb_s"] * ours["block_us"] / row["block_us"]
    row["tflop_s"] = ours["tflop_s"] * ours["block_us"] / row["block_us"]
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--peers", action="store_true", help="time the installed peers on the same routings")
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    dtype = jnp.dtype(args.dtype)
    row = get_format(args.format)
    device = jax.devices()[0]
    read_tb_s, bf16_tflop_s = measure_read_bandwidth(), measure_bf16_rate()
    print(f"{device.device_kind}: read {read_tb_s:.2f} TB/s, bf16 {bf16_tflop_s:.0f} TFLOP/s", flush=True)
    rows = []
    for name in args.models:
        shape = MODELS[name]
        layers = make_layers(shape, args.format, dtype)
        for tokens in args.tokens:
            for routing in args.routing:
                case = make_case(shape, layers, tokens, args.repeats, routing, dtype)
                limit = block_limit(
                    shape,
                    case.ids,
                    bits=row.bits,
                    scale_bytes=2,
                    read_tb_s=read_tb_s,
                    bf16_tflop_s=bf16_tflop_s,
                )
                kernels = replayed(case)
                times = kernels.microseconds(samples=args.samples)
                first = len(kernels.plan.kernels) - 3  # [align,] gate_up, down, combine
                gemm1_us, gemm2_us = (statistics.median(kernels.microseconds([k])) for k in (first, first + 1))
                kernels.close()
                block_us = statistics.median(times)
                result = {
                    "model": name,
                    "E": shape.num_experts,
                    "k": shape.top_k,
                    "H": shape.hidden,
                    "I": shape.intermediate,
                    "M": tokens,
                    "format": args.format,
                    "group_size": shape.group_size,
                    "dtype": args.dtype,
                    "activation_dtype": args.dtype,
                    "routing": routing,
                    "implementation": f"jax_marlin_moe {jmm.__version__}",
                    "hit_experts": limit.hit_experts,
                    "block_us": block_us,
                    "block_p10_us": times[len(times) // 10],
                    "block_p90_us": times[-1 - len(times) // 10],
                    "gemm1_us": gemm1_us,
                    "gemm2_us": gemm2_us,
                    "jit_us": statistics.median(time_chain(case, 10)),
                    "limit_us": limit.microseconds,
                    "tb_s": limit.weight_bytes / block_us / 1e6,
                    "tflop_s": limit.flops / block_us / 1e6,
                    "rel_l2": relative_error(case),
                }
                rows.append(result)
                print(
                    f"{name:16s} M={tokens:<5d} {routing:8s} block {block_us:8.1f} us, products {gemm1_us:.1f} "
                    f"{gemm2_us:.1f}  limit {limit.microseconds:8.1f} ({limit.microseconds / block_us:4.0%})  "
                    f"jit {result['jit_us']:.0f}  error {result['rel_l2']:.1e}",
                    flush=True,
                )
                peer = peer_row(result, shape, tokens, case.ids, args) if args.peers else None
                if peer is not None:
                    rows.append(peer)
                    print(
                        f"{name:16s} M={tokens:<5d} {routing:8s} block {peer['block_us']:8.1f} us, products "
                        f"{peer['gemm1_us']:.1f} {peer['gemm2_us']:.1f}  {peer['implementation']}",
                        flush=True,
                    )
        del layers
    document = {
        "card": device.device_kind,
        "commit": args.commit or current_commit(),
        "command": recorded_command("benchmarks.blocks"),
        "versions": {"jax": jax.__version__, "jax_marlin_moe": jmm.__version__, "numpy": np.__version__},
        "read_tb_s": read_tb_s,
        "bf16_tflop_s": bf16_tflop_s,
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
