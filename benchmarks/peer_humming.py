"""Times the whole expert block of `humming-kernels`, on the routings and the card that ours is timed on.

    python -m benchmarks.peer_humming --models qwen3-30b-a3b --tokens 1 16 64

`humming_block` gives device times from CUDA graph replay: one graph of as many blocks as there are routings, each with
its own routing and the next layer's weights, so that L2 is cold. A block is what a serving engine launches around the
library's products: the alignment of the routing to row tiles, gate_up, the activation, down, and the weighted sum.
The products and the activation are the library's, in the configurations that its own heuristics choose for the card,
the shape and the number of rows; it has no alignment and no sum, so these two are Triton kernels of ours
(`peer_humming_kernels`). Weights are symmetric INT4 with a scale for each group of `group_size`, MXFP4 or NVFP4. With
an `activation_dtype` rows are quantised by the library, a scale for each, those of the second product as they are
activated. Every timed configuration is checked against float32 of the dequantised weights (`rel_l2`).

Needs PyTorch with CUDA and `humming-kernels[cu13]`. JAX in the same process takes 75% of the memory when it first
touches the card; XLA_PYTHON_CLIENT_PREALLOCATE=false leaves it to both.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import statistics
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peer_humming_kernels import Alignment, sum_rows
from benchmarks.peer_humming_weights import prepare_matrix, reference
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import layers_to_rotate, random_routings
from jax_marlin_moe.measure.replay import timed_samples

try:
    import torch
except ImportError:
    torch = None

_INDEXED = json.dumps({"gemm_type": "indexed"})
_SILU_AND_MUL = {"activation_type": "binary_split", "activation_impl": "a / (1.0f + __expf(-a)) * b"}


def _microseconds(blocks: Sequence[Sequence[Callable[[], None]]], samples: int, pause_seconds: float) -> list[float]:
    """Microseconds of one block, averaged over a replay of a graph of all of them; sorted."""
    for block in blocks:
        for launch in block:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: what other threads of the process ask of the card must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for block in blocks:
            for launch in block:
                launch()

    def replay(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (times * len(blocks))

    return timed_samples(replay, len(blocks), samples=samples, pause_seconds=pause_seconds)


def _make_blocks(shape: ModelShape, layers: Sequence, configs: Sequence[str], x, ids, weights, out) -> list[list]:
    """For each routing, the launches of a block in their order: alignment, gate_up, activation, down, sum.

    What passes between the kernels is the same memory for every block, as in a serving engine.
    """
    from humming.forward import humming_forward, may_process_input

    slots = ids[0].numel()
    empty = {"dtype": x.dtype, "device": "cuda"}
    gate_up_rows = torch.empty((slots, 2 * shape.intermediate), **empty)
    rows = torch.empty((slots, shape.intermediate), **empty)
    activated: list = [rows, None, None]  # and scales of groups and of rows
    down_rows = torch.empty((slots, shape.hidden), **empty)
    tiles = tuple(json.loads(config)["block_shape"][0] for config in configs)
    # The split-K semaphores: every kernel leaves them zero.
    locks = torch.zeros((8192,), dtype=torch.int32, device="cuda")

    def block(i: int) -> list[Callable[[], None]]:
        (config_1, gate_up), (config_2, down) = layers[i % len(layers)]
        align = Alignment(ids[i], shape.num_experts, tiles)
        common = {"locks": locks, "compute_config": _INDEXED, "valid_shape_m": slots}
        first = {**gate_up, **align.tables[0], **common, "tuning_config": configs[0], "top_k": shape.top_k}
        second = {**down, **align.tables[1], **common, "tuning_config": configs[1], "top_k": 1}

        def activate() -> None:
            # Quantised rows and their scales are the library's own memory.
            quantises = config_2.input_quant_mode.should_quantize
            activated[:] = may_process_input(
                config_2, gate_up_rows, outputs=None if quantises else rows, **_SILU_AND_MUL
            )

        return [
            align,
            lambda: humming_forward(config_1, x, outputs=gate_up_rows, **first),
            activate,
            lambda: humming_forward(config_2, activated[0], input_scale=activated[2], outputs=down_rows, **second),
            lambda: sum_rows(down_rows, weights[i], out, shape.top_k),
        ]

    return [block(i) for i in range(len(ids))]


@functools.lru_cache(maxsize=1)  # the blocks of a model follow each other
def _prepare_layers(shape: ModelShape, weight_format: str, dtype, activation_dtype: str | None) -> list[list]:
    count = layers_to_rotate(shape, weight_format)
    layers = [
        [prepare_matrix(shape, weight_format, i, matrix, dtype, activation_dtype) for matrix in (0, 1)]
        for i in range(count)
    ]
    torch.cuda.empty_cache()
    return layers


@dataclasses.dataclass
class _Run:
    """Blocks on their routings, and what the first of them reads and writes."""

    blocks: list[list[Callable[[], None]]]
    x: Any
    ids: Any
    weights: Any
    out: Any


def _make_run(
    shape: ModelShape, weight_format: str, tokens: int, ids: np.ndarray, dtype, activation_dtype: str | None
) -> _Run:
    from humming.tune import get_heuristics_config

    layers = _prepare_layers(shape, weight_format, dtype, activation_dtype)
    slots = tokens * shape.top_k
    configs = [
        json.dumps(get_heuristics_config(config, shape_m=slots, gemm_type="indexed", device=0))
        for config, _ in layers[0]
    ]
    generator = torch.Generator("cuda").manual_seed(7)
    x = torch.randn((tokens, shape.hidden), dtype=dtype, device="cuda", generator=generator)
    weights = torch.rand(ids.shape, dtype=torch.float32, device="cuda", generator=generator) + 0.5
    weights /= weights.sum(-1, keepdim=True)
    routed = [torch.from_numpy(np.ascontiguousarray(one, np.int32)).cuda() for one in ids]
    out = torch.empty_like(x)
    blocks = _make_blocks(shape, layers, configs, x, routed, weights, out)
    return _Run(blocks, x, routed[0], weights[0], out)


def compile_humming_blocks(
    shape: ModelShape,
    tokens: Sequence[int],
    *,
    dtype: str = "bfloat16",
    activation_dtype: str | None = None,
    weight_format: str = "int4",
) -> None:
    """Compiles the library's kernels for all these numbers of tokens beside each other; it keeps them on disk."""
    if not _is_installed():
        return
    with torch.no_grad():
        blocks = []
        for number in tokens:
            slots = np.arange(number * shape.top_k, dtype=np.int32)
            ids = (slots % shape.num_experts).reshape(1, number, shape.top_k)
            run = _make_run(shape, weight_format, number, ids, getattr(torch, dtype), activation_dtype)
            blocks += run.blocks
        for block in blocks:
            block[0]()

        def launch(block: list[Callable[[], None]]) -> None:
            with torch.no_grad():
                for kernel in block[1:4]:
                    kernel()

        with concurrent.futures.ThreadPoolExecutor(len(blocks)) as pool:
            list(pool.map(launch, blocks))
        torch.cuda.synchronize()


def _is_installed() -> bool:
    if torch is None:
        return False
    try:
        import humming.layer  # noqa: F401
    except ImportError:
        return False
    return True


def _measure(
    shape: ModelShape,
    tokens: int,
    ids: np.ndarray,
    dtype,
    samples: int,
    pause_seconds: float,
    activation_dtype: str | None,
    weight_format: str,
) -> dict[str, Any]:
    run = _make_run(shape, weight_format, tokens, ids, dtype, activation_dtype)
    blocks, out = run.blocks, run.out
    for launch in blocks[0]:
        launch()
    expected = reference(shape, weight_format, run.x, run.ids, run.weights, dtype)
    error = float((out.float() - expected).norm() / expected.norm())
    del expected

    times = _microseconds(blocks, samples, pause_seconds)
    alone = {}
    for name, i in (("align", 0), ("gemm1", 1), ("gemm2", 3)):
        part = _microseconds([[block[i]] for block in blocks], min(samples, 15), pause_seconds)
        alone[f"{name}_us"] = statistics.median(part)
    return {
        "implementation": f"humming-kernels {importlib.metadata.version('humming-kernels')}",
        "block_us": statistics.median(times),
        "block_p10_us": times[len(times) // 10],
        "block_p90_us": times[-1 - len(times) // 10],
        **alone,
        "rel_l2": error,
    }


def humming_block(
    shape: ModelShape,
    tokens: int,
    ids: np.ndarray,
    *,
    dtype: str = "bfloat16",
    samples: int = 100,
    pause_seconds: float = 0.0,
    activation_dtype: str | None = None,
    weight_format: str = "int4",
) -> dict[str, Any] | None:
    """Times the expert block of `humming-kernels`.

    Args:
        shape: of the expert block.
        tokens: rows of the input.
        ids: routings [repeats, tokens, top_k], one for each block of the graph; every id is below `num_experts`.
        dtype: bfloat16 or float16, of the rows and the scales.
        samples: replays of the graph.
        pause_seconds: before each replay, so that the card stays out of its power limit.
        activation_dtype: float8_e4m3fn or int8, what rows are quantised to; None leaves them as they are.
        weight_format: one of `peer_humming_weights.WEIGHT_FORMATS`.

    Returns:
        `implementation`; `block_us` with its `block_p10_us` and `block_p90_us`; `align_us`, `gemm1_us` and `gemm2_us`,
        each from a graph of that part alone; `rel_l2`. None where PyTorch or the library is not installed.
    """
    if not _is_installed():
        return None
    try:
        with torch.no_grad():
            return _measure(
                shape, tokens, ids, getattr(torch, dtype), samples, pause_seconds, activation_dtype, weight_format
            )
    finally:
        torch.cuda.empty_cache()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--samples", type=int, default=100)
    args = parser.parse_args()

    for name in args.models:
        for tokens in args.tokens:
            case = f"{name:16s} M={tokens:<5d} {args.routing:8s}"
            shape, zipf = MODELS[name], args.routing == "zipf"
            ids = random_routings(shape.num_experts, shape.top_k, tokens, args.repeats, zipf=zipf)
            try:
                result = humming_block(shape, tokens, ids, dtype=args.dtype, samples=args.samples)
            except Exception as error:  # one configuration that fails leaves the others to be timed
                traceback.print_exc()
                print(f"{case} failed: {type(error).__name__}: {error}", flush=True)
                continue
            if result is None:
                raise SystemExit("PyTorch or humming-kernels is not installed.")
            print(
                f"{case} block {result['block_us']:8.1f} us ({result['block_p10_us']:.1f} - "
                f"{result['block_p90_us']:.1f}), align {result['align_us']:.1f}, products {result['gemm1_us']:.1f} "
                f"{result['gemm2_us']:.1f}  error {result['rel_l2']:.1e}  {result['implementation']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
