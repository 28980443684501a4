"""Times the whole expert block of `humming-kernels`, on the routings and the card that ours is timed on.

    python -m benchmarks.peer_humming --models qwen3-30b-a3b --tokens 1 16 64

`humming_block` gives device times from CUDA graph replay: one graph of as many blocks as there are routings, each with
its own routing and the next layer's weights, so that L2 is cold. A block is what a serving engine launches around the
library's products: the alignment of the routing to row tiles, gate_up, the activation, down, and the weighted sum.
The products and the activation are the library's, in the configurations that its own heuristics choose for the card,
the shape and the number of rows; it has no alignment and no sum, so these two are Triton kernels of this file.
Weights are symmetric INT4 with a scale for each group of `group_size`, MXFP4 or NVFP4. With an `activation_dtype` rows
are quantised by the library, a scale for each, those of the second product as they are activated. Every timed
configuration is checked against float32 of the dequantised weights (`rel_l2`).

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

from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import layers_to_rotate, random_routings
from jax_marlin_moe.measure.replay import timed_samples

try:
    import torch
    import triton
    import triton.language as tl
except ImportError:
    torch = triton = tl = None

_jit = triton.jit if triton else lambda function: function
constexpr = tl.constexpr if triton else int

# The multiples that vLLM and SGLang pad matrices to before they hand them to the library.
_PAD_N, _PAD_K = 256, 128
_INDEXED = json.dumps({"gemm_type": "indexed"})
_SILU_AND_MUL = {"activation_type": "binary_split", "activation_impl": "a / (1.0f + __expf(-a)) * b"}
_ROW_TYPES = {"float8_e4m3fn": "float8e4m3", "int8": "int8"}  # the library's names


@dataclasses.dataclass(frozen=True)
class _Format:
    """What the library calls a format of weights.

    Attributes:
        schema: its names of the types.
        values: of the codes, in order.
    """

    schema: dict[str, str]
    values: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """Of uniform codes."""
        return float(np.std(self.values))


_E2M1_VALUES = tuple(sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
_FORMATS = {
    "int4": _Format({"dtype": "int4"}, tuple(range(-8, 8))),
    "mxfp4": _Format({"dtype": "float4e2m1", "scale_dtype": "float8e8m0"}, _E2M1_VALUES),
    "nvfp4": _Format(
        {"dtype": "float4e2m1", "scale_dtype": "float8e4m3", "scale_type": "group", "scale_2_type": "tensor"},
        _E2M1_VALUES,
    ),
}
WEIGHT_FORMATS = tuple(_FORMATS)


def _power_of_two(value: int) -> int:
    """The least power of two that is not below a positive value."""
    return 1 << (value - 1).bit_length()


def _quotient(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


@_jit
def _count_experts(ids, counts, slots, experts: constexpr, chunk: constexpr, bins: constexpr):
    """How many of one chunk's slots go to each expert; what lies past the end is counted as expert `experts`."""
    program = tl.program_id(0)
    slot = program * chunk + tl.arange(0, chunk)
    expert = tl.load(ids + slot, mask=slot < slots, other=experts)
    tl.store(counts + program * bins + tl.arange(0, bins), tl.histogram(expert, bins))


@_jit
def _place_slots(
    ids,
    counts,
    cursors,
    sorted_ids,
    expert_ids,
    padded_slots,
    slots,
    sorted_stride,
    expert_stride,
    tile_0,
    tile_1,
    experts: constexpr,
    chunk: constexpr,
    bins: constexpr,
    chunks_bound: constexpr,
):
    """Slots in the order of their experts, each expert padded to whole tiles, and the expert of every tile.

    Program (i, j) places the slots of chunk i in table j, whose tiles have tile_j rows. With one chunk it counts for
    itself, else it reads what `_count_experts` left.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    table = tl.program_id(1)
    tile = tl.where(table == 0, tile_0, tile_1)
    sorted_ids += table * sorted_stride
    expert_ids += table * expert_stride
    cursors += (table * programs + program) * bins
    each = tl.arange(0, bins)
    slot = program * chunk + tl.arange(0, chunk)
    expert = tl.load(ids + slot, mask=slot < slots, other=experts)
    if chunks_bound == 1:
        total = tl.histogram(expert, bins)
        before = tl.zeros((bins,), tl.int32)
    else:
        row = tl.arange(0, chunks_bound)[:, None]
        every = tl.load(counts + row * bins + each[None, :], mask=row < programs, other=0)
        total = tl.sum(every, 0)
        before = tl.sum(tl.where(row < program, every, 0), 0)
    total = tl.where(each < experts, total, 0)
    padded = (total + tile - 1) // tile * tile
    first = tl.cumsum(padded, 0) - padded
    tl.store(cursors + each, first + before)
    if program == 0:
        tl.store(padded_slots + table, tl.sum(padded, 0))
    # The chunks share out the padding and the tiles' experts.
    for i in range(program, tile, programs):
        tl.store(sorted_ids + first + total + i, tl.zeros_like(each) + slots, mask=total + i < padded)
    for i in range(program, tl.max(padded, 0) // tile, programs):
        tl.store(expert_ids + first // tile + i, each, mask=i * tile < padded)
    tl.debug_barrier()
    place = tl.atomic_add(cursors + expert, 1, mask=slot < slots)
    tl.store(sorted_ids + place, slot, mask=slot < slots)


@_jit
def _sum_slots(rows, weights, out, hidden, top_k: constexpr, width: constexpr):
    """Each token's rows, weighted and summed."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < hidden
    total = tl.zeros((width,), tl.float32)
    for i in tl.static_range(top_k):
        row = tl.load(rows + (token * top_k + i) * hidden + column, mask=inside, other=0.0)
        total += tl.load(weights + token * top_k + i) * row.to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def _sum_rows(rows, weights, out, top_k: int) -> None:
    tokens, hidden = out.shape
    _sum_slots[(tokens, _quotient(hidden, 512))](rows, weights, out, hidden, top_k=top_k, width=512, num_warps=2)


class _Alignment:
    """The tables that the library's indexed products read, for one routing.

    Its heuristics may choose tiles of different heights for the two products: then there are two tables, from the same
    launch.

    Attributes:
        tables: for each product, the slots by expert, the expert of every tile, and the number of padded slots.
    """

    def __init__(self, ids, experts: int, tiles: tuple[int, int]) -> None:
        self._ids = ids
        self._experts = experts
        slots = ids.numel()
        # One chunk where that is enough for a single program, else as many as one program can add up.
        self._chunk = max(128, _power_of_two(min(slots, max(1024, _quotient(slots, 64)))))
        self._chunks = _quotient(slots, self._chunk)
        self._bins = max(128, _power_of_two(experts + 1))
        heights = sorted(set(tiles), reverse=True)
        used = min(experts, slots)
        # Rows of the tables start at whole vectors of the products' loads.
        sorted_stride = _quotient(slots + used * (heights[0] - 1), 32) * 32
        expert_stride = _quotient(sorted_stride // heights[-1] + 1, 32) * 32
        empty = {"dtype": torch.int32, "device": ids.device}
        self._sorted = torch.empty((len(heights), sorted_stride), **empty)
        self._expert_of = torch.empty((len(heights), expert_stride), **empty)
        self._padded = torch.empty((len(heights),), **empty)
        self._counts = torch.empty((self._chunks, self._bins), **empty)
        self._cursors = torch.empty((len(heights), self._chunks, self._bins), **empty)
        self._heights = heights
        self.tables = [
            {
                "sorted_ids": self._sorted[i],
                "expert_ids": self._expert_of[i],
                "num_tokens_padded": self._padded[i : i + 1],
            }
            for i in (heights.index(tile) for tile in tiles)
        ]

    def __call__(self) -> None:
        """Launches one kernel, or two for many slots."""
        slots = self._ids.numel()
        sizes = {"experts": self._experts, "chunk": self._chunk, "bins": self._bins}
        if self._chunks > 1:
            _count_experts[(self._chunks,)](self._ids, self._counts, slots, **sizes, num_warps=8)
        _place_slots[(self._chunks, len(self._heights))](
            self._ids,
            self._counts,
            self._cursors,
            self._sorted,
            self._expert_of,
            self._padded,
            slots,
            self._sorted.stride(0),
            self._expert_of.stride(0),
            self._heights[0],
            self._heights[-1],
            **sizes,
            chunks_bound=_power_of_two(self._chunks),
            num_warps=4 if self._chunk < 512 else 16,
        )


def _matrix_sizes(shape: ModelShape) -> tuple[tuple[int, int, float], tuple[int, int, float]]:
    """N, K and the gain of gate_up and of down: the activation and the sum shrink the rows, down scales them back."""
    return (2 * shape.intermediate, shape.hidden, 1.0), (shape.hidden, shape.intermediate, 4.0)


def _random_tensors(shape: ModelShape, weight_format: str, layer: int, matrix: int, dtype) -> dict[str, Any]:
    """Random codes [E, N, K / 8], eight a word, and scales [E, N, K / group_size]; the same for the same numbers.

    NVFP4 has a scale for each expert besides.
    """
    n, k, gain = _matrix_sizes(shape)[matrix]
    generator = torch.Generator("cuda").manual_seed(2 * layer + matrix)
    codes = torch.empty((shape.num_experts, n, k // 8), dtype=torch.int32, device="cuda")
    codes.random_(-(2**31), 2**31 - 1, generator=generator)
    scales = torch.empty((shape.num_experts, n, _quotient(k, shape.group_size)), dtype=torch.float32, device="cuda")
    scales.uniform_(0.5, 1.5, generator=generator)
    gain /= _FORMATS[weight_format].deviation * k**0.5
    if weight_format == "nvfp4":
        gains = torch.full((shape.num_experts,), gain, dtype=torch.float32, device="cuda")
        return {"weight": codes, "weight_scale": scales.to(torch.float8_e4m3fn), "weight_scale_2": gains}
    scales.mul_(gain)
    if weight_format == "mxfp4":
        exponents = scales.log2_().round_().add_(127).to(torch.uint8)
        return {"weight": codes, "weight_scale": exponents.view(torch.float8_e8m0fnu)}
    return {"weight": codes, "weight_scale": scales.to(dtype)}


def _prepare_matrix(
    shape: ModelShape, weight_format: str, layer: int, matrix: int, dtype, activation_dtype: str | None
) -> tuple[Any, dict[str, Any]]:
    """The library's configuration of one matrix and its tensors in the library's order."""
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config, transform_humming_tensors

    n, k, _ = _matrix_sizes(shape)[matrix]
    schema = HummingWeightSchema.from_config({**_FORMATS[weight_format].schema, "group_size": shape.group_size})
    config = prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=schema,
        input_schema=None if activation_dtype is None else HummingInputSchema(a_dtype=_ROW_TYPES[activation_dtype]),
        num_experts=shape.num_experts,
        pad_n_to_multiple=_PAD_N,
        pad_k_to_multiple=_PAD_K,
        torch_dtype=dtype,
    )
    tensors = _random_tensors(shape, weight_format, layer, matrix, dtype)
    # Zeros up to the padded sizes. (The library's own padding counts the groups of K downwards, and takes no matrix
    # whose last group is a part.)
    widths = {"weight": config.shape_k // 8, "weight_scale": config.shape_k // shape.group_size}
    for name, width in widths.items():
        tensor = tensors[name]
        padding = (0, width - tensor.shape[2], 0, config.shape_n - tensor.shape[1])
        # Scales of a byte are padded as bytes: 0 is the least of them, which a weight of zero does not mind.
        stored = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        tensors[name] = torch.nn.functional.pad(stored, padding).view(tensor.dtype)
    return config, transform_humming_tensors(config, tensors, already_padded=True)


def _dequantize(weight_format: str, tensors: dict[str, Any], expert: int, group_size: int):
    """One expert's matrix [N, K] in float32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device="cuda")
    codes = ((tensors["weight"][expert][..., None] >> shifts) & 15).flatten(-2)
    scales = tensors["weight_scale"][expert].float().repeat_interleave(group_size, -1)
    if "weight_scale_2" in tensors:
        scales *= tensors["weight_scale_2"][expert]
    values = torch.tensor(_FORMATS[weight_format].values, dtype=torch.float32, device="cuda")
    return values[codes] * scales[:, : codes.shape[1]]


def _reference(shape: ModelShape, weight_format: str, x, ids, weights, dtype):
    """The block on the first layer, in float32."""
    gate_up, down = (_random_tensors(shape, weight_format, 0, matrix, dtype) for matrix in (0, 1))
    out = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ _dequantize(weight_format, gate_up, expert, shape.group_size).T).chunk(2, dim=-1)
        rows = torch.nn.functional.silu(gate) * up
        rows = rows @ _dequantize(weight_format, down, expert, shape.group_size).T
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


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
        align = _Alignment(ids[i], shape.num_experts, tiles)
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
            lambda: _sum_rows(down_rows, weights[i], out, shape.top_k),
        ]

    return [block(i) for i in range(len(ids))]


@functools.lru_cache(maxsize=1)  # the blocks of a model follow each other
def _prepare_layers(shape: ModelShape, weight_format: str, dtype, activation_dtype: str | None) -> list[list]:
    count = layers_to_rotate(shape, weight_format)
    layers = [
        [_prepare_matrix(shape, weight_format, i, matrix, dtype, activation_dtype) for matrix in (0, 1)]
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
    expected = _reference(shape, weight_format, run.x, run.ids, run.weights, dtype)
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
        weight_format: one of `WEIGHT_FORMATS`.

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
