"""What the card can do, measured in the same run as everything held against it."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.program import Kernel, call_program

_READ_BYTES = 2 << 30

# Every thread keeps 8 loads of 16 bytes in flight and adds what it read, so that nothing can be left out.
_READER = """
namespace jmm {
struct Reader {
  const int4* __restrict__ in;
  const int* __restrict__ seed;
  int* __restrict__ out;
  __device__ void run() const {
    constexpr long long kVectors = %dll;
    const long long threads = (long long)gridDim.x * blockDim.x;
    int sum = *seed;
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i + 7 * threads < kVectors; i += 8 * threads) {
      int4 v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = __ldcs(in + i + j * threads);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x7fffffff || blockIdx.x + threadIdx.x == 0) *out = sum;
  }
};
}
"""


def wall_seconds(call: Callable, repeats: int) -> list[float]:
    """Wall time of each call, after three warm-up calls."""
    for _ in range(3):
        jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def measure_read_bandwidth(calls: int = 32) -> float:
    """TB/s of a read-only stream over 2 GiB, `calls` streams in one program."""
    data = jnp.arange(_READ_BYTES // 4, dtype=jnp.int32)
    kernel = Kernel(
        body="Reader",
        members="p0, p1, p2",
        parameters=((0, "const int4*"), (1, "const int*"), (2, "int*")),
        threads=512,
        shared_bytes=0,
        max_blocks=1 << 20,
        blocks_per_sm=4,
    )
    architecture = target_architecture()

    @jax.jit
    def stream(data):
        total = jnp.zeros((1,), jnp.int32)
        for _ in range(calls):
            (total,) = call_program(
                [data, total], [jax.ShapeDtypeStruct((1,), jnp.int32)], [kernel], (), architecture,
                preamble=_READER % (_READ_BYTES // 16),
            )
        return total

    return calls * _READ_BYTES / statistics.median(wall_seconds(lambda: stream(data), 20)) / 1e12


def measure_bf16_rate(calls: int = 32) -> float:
    """TFLOP/s of 8192^3 products of random bfloat16 matrices, `calls` of them in one program."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) / 90 for i in range(2))

    @jax.jit
    def products(a, b):
        for _ in range(calls):
            a = a @ b
        return a

    return calls * 2 * 8192**3 / statistics.median(wall_seconds(lambda: products(a, b), 20)) / 1e12
