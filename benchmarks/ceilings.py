"""What the card can do, measured in the same run as everything held against it."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.cuda.program import Kernel, Plan
from jax_marlin_moe.measure.replay import ReplayedPlan

_READ_BYTES = 2 << 30

# Every thread keeps 8 loads of 16 bytes in flight and adds what it read, so that the compiler cannot remove any load.
_READER = """
namespace jmm {
struct Reader {
  static constexpr int kThreads = 512, kMaxCtas = 1 << 20, kCtasPerSm = 2, kCluster = 1;
  const int32_t* __restrict__ in;
  int32_t* __restrict__ out;
  __device__ void run() const {
    constexpr long long kVectors = %dll;
    const int4* vectors = reinterpret_cast<const int4*>(in);
    constexpr int kLoads = 8;
    const long long piece = (long long)blockDim.x * kLoads;
    int sum = 0;
    for (long long first = blockIdx.x * piece; first < kVectors; first += gridDim.x * piece) {
      int4 v[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) v[j] = __ldg(vectors + first + j * blockDim.x + threadIdx.x);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x7fffffff) *out = sum;
  }
};
}
"""


def measure_read_bandwidth() -> float:
    """TB/s of a read-only stream over 2 GiB, by CUDA graph replay."""
    data = jnp.arange(_READ_BYTES // 4, dtype=jnp.int32)
    kernel = Kernel(
        name="jmm_reader",
        headers=("types.cuh",),
        body="Reader",
        pointers={"in": Pointer(0, "int32"), "out": Pointer(1, "int32", written=True)},
        threads=512,
        shared_bytes=0,
        max_ctas=1 << 20,
        ctas_per_sm=2,
    )
    plan = Plan((kernel,), preamble=_READER % (_READ_BYTES // 16))
    stream = ReplayedPlan(plan, [[data]] * 4, [jax.ShapeDtypeStruct((1,), jnp.int32)])
    microseconds = statistics.median(stream.microseconds())
    stream.close()
    return _READ_BYTES / microseconds / 1e6


# Rows, columns and K of products that keep every multiprocessor busy. How far a card lowers its clock depends on how
# long a product lasts, so some are short.
_PRODUCT_SHAPES = ((4096, 4096, 4096), (8192, 8192, 4096), (8192, 8192, 8192))
_BURST_SECONDS, _REST_SECONDS = 0.004, 0.02  # of products in a row, as replays of blocks are timed


def measure_bf16_products(samples: int = 5) -> dict[str, float]:
    """TFLOP/s of products of random bfloat16 matrices, by library, layout and shape.

    Each is a median over bursts of equal products with a rest before each burst, so that the card's power limit hits
    them no more than it hits replays of blocks. The libraries are XLA, which tries several kernels for a product, and
    PyTorch's cuBLAS where it is installed.
    """
    rates = {}
    for rows, columns, k in _PRODUCT_SHAPES:
        a = jax.random.normal(jax.random.key(0), (rows, k), jnp.bfloat16)
        b = jax.random.normal(jax.random.key(1), (k, columns), jnp.bfloat16)
        flops = 2.0 * rows * columns * k
        for library, layout, call, wait in _products(a, b):
            name = f"{library} {layout} {rows} x {columns} x {k}"
            rates[name] = flops / _burst_seconds(call, wait, flops, samples) / 1e12
    return rates


def _products(a: jax.Array, b: jax.Array) -> Iterator[tuple[str, str, Callable, Callable]]:
    """Library, layout ("N": rows along memory, "T": columns), a call, and what waits for its result."""
    transposed = jnp.asarray(b.T)
    yield "XLA", "NN", functools.partial(jax.jit(jnp.matmul), a, b), jax.block_until_ready
    yield "XLA", "NT", functools.partial(jax.jit(lambda a, b: a @ b.T), a, transposed), jax.block_until_ready
    try:
        import torch
    except ImportError:
        return
    ours, theirs, theirs_transposed = (torch.from_dlpack(array) for array in (a, b, transposed))

    def wait(_: object) -> None:
        torch.cuda.synchronize()

    yield "cuBLAS", "NN", functools.partial(torch.matmul, ours, theirs), wait
    yield "cuBLAS", "NT", functools.partial(torch.matmul, ours, theirs_transposed.T), wait


def _burst_seconds(call: Callable, wait: Callable, flops: float, samples: int) -> float:
    """Seconds of one call: the host's time of a burst less that of one with half as many."""
    calls = max(4, math.ceil(_BURST_SECONDS * 700e12 / flops))

    def burst(number: int) -> float:
        time.sleep(_REST_SECONDS)
        start = time.perf_counter()
        for _ in range(number):
            result = call()
        wait(result)
        return time.perf_counter() - start

    burst(calls)
    return statistics.median(burst(2 * calls) - burst(calls) for _ in range(samples)) / calls
