"""What state the card is in while something is timed: its multiprocessor clock, measured, and what NVML says of it."""

import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from cuda.bindings import driver

from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.cuda.program import Kernel, Plan
from jax_marlin_moe.measure.replay import ReplayedPlan

try:
    import pynvml
except ImportError:
    pynvml = None

# 0.2 ms at 2 GHz: a launch in a graph, under 1 us, adds less than half a percent.
_SPIN_CYCLES = 400_000
_SPIN = """
namespace jmm {
struct Spin {
  static constexpr int kThreads = 1, kMaxCtas = 1;
  int32_t* __restrict__ out;
  __device__ void run() const {
    const long long begin = clock64();
    long long now = begin;
    while (now - begin < %dll) now = clock64();
    *out = int(now);
  }
};
}
"""


class MultiprocessorClock:
    """Measures the clock by a thread that counts cycles for a while."""

    def __init__(self) -> None:
        kernel = Kernel(
            name="jmm_spin",
            headers=("types.cuh",),
            body="Spin",
            pointers={"out": Pointer(1, "int32", written=True)},
            threads=1,
            shared_bytes=0,
            max_ctas=1,
        )
        plan = Plan((kernel,), preamble=_SPIN % _SPIN_CYCLES)
        self._spin = ReplayedPlan(plan, [[jnp.zeros((1,))]] * 4, [jax.ShapeDtypeStruct((1,), jnp.int32)])

    def mhz(self) -> float:
        """MHz over the next millisecond."""
        with self._spin.captured() as replay:
            return _SPIN_CYCLES / replay()


@dataclasses.dataclass
class CardLog:
    """What NVML said, every few milliseconds.

    Attributes:
        sm_mhz: multiprocessor clock.
        power_w: power at the moment.
        reasons: bits of NVML_CLOCKS_EVENT_REASON_* that held the clock down at any time.
    """

    sm_mhz: list[float] = dataclasses.field(default_factory=list)
    power_w: list[float] = dataclasses.field(default_factory=list)
    reasons: int = 0

    def summary(self) -> dict[str, float | int | None]:
        """Medians, None where NVML was not there to ask."""
        return {
            "nvml_sm_mhz": statistics.median(self.sm_mhz) if self.sm_mhz else None,
            "power_w": statistics.median(self.power_w) if self.power_w else None,
            "clock_event_reasons": self.reasons if self.sm_mhz else None,
        }


@contextlib.contextmanager
def logged_card(interval_seconds: float = 0.01) -> Iterator[CardLog]:
    """Asks NVML in a thread of its own until the block ends; the log stays empty without `nvidia-ml-py`."""
    log = CardLog()
    if pynvml is None:
        yield log
        return
    pynvml.nvmlInit()
    # CUDA's first device need not be NVML's: they agree on the bus.
    status, bus = driver.cuDeviceGetPCIBusId(64, 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status}")
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.split(b"\0")[0])
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            log.sm_mhz.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
            (power,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
            log.power_w.append(power.value.uiVal / 1e3)
            log.reasons |= pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            time.sleep(interval_seconds)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield log
    finally:
        done.set()
        thread.join()
        pynvml.nvmlShutdown()
