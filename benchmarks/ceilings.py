"""What the card can do, measured in the same run as everything held against it."""

import statistics
import time
from collections.abc import Callable

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


def measure_bf16_rate(calls: int = 64) -> float:
    """TFLOP/s of 8192^3 products of random bfloat16 matrices, `calls` of them in one program."""
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) / 90 for i in range(2))

    @jax.jit
    def products(a, b):
        for _ in range(calls):
            a = a @ b
        return a

    return calls * 2 * 8192**3 / statistics.median(wall_seconds(lambda: products(a, b), 20)) / 1e12
