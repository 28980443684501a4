"""Programs that a benchmark compiles side by side, and then times one after the other.

A benchmark is written once and gone through twice: first with the types of its arrays, when each call of `time` hands
a program to threads that compile, then with arrays, when the same calls in the same order run what was compiled.
"""

import collections
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.chain import seconds_of_calls
from benchmarks.kernel_events import device_microseconds
from benchmarks.memory import peak_bytes
from jax_marlin_moe.cuda.compiler import compile_cubin, target_architecture

_SAMPLE_SECONDS = 0.02
_MOST_CALLS = 40  # the wait for the last of ten would be a tenth of a short product
_SLOW_SECONDS = 1.0  # a call of a peer that takes longer is its only one, and the last of that peer's kind


@dataclasses.dataclass
class Bench:
    """Compiles, times, and measures memory.

    Attributes:
        samples: of each time.
        threads: that compile; none where programs are lowered only, for a card that need not be here.
        plans: whether arrays are types, and nothing runs.
    """

    samples: int
    threads: ThreadPoolExecutor | None
    plans: bool = True
    programs: collections.deque[Future] = dataclasses.field(default_factory=collections.deque)
    slow: dict[str, str] = dataclasses.field(default_factory=dict)  # what took how long, by the peer and its product

    def made(self, make: Callable, *arguments: Any) -> Any:
        """What a function of arrays makes; while planning, its types."""
        return jax.eval_shape(make, *arguments) if self.plans else make(*arguments)

    def normal(self, seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """A random array."""
        return self.made(lambda: jax.random.normal(jax.random.key(seed), shape, dtype))

    def time(
        self,
        function: Callable,
        *arguments: Any,
        memory: bool = False,
        device: bool = False,
        most_bytes: float = np.inf,
    ) -> dict:
        """Microseconds, and with `memory` megabytes beyond arguments and results; or an error.

        Args:
            function: is compiled.
            *arguments: of the call.
            memory: whether to measure it.
            device: whether to have the kernels' own time from the profiler, too.
            most_bytes: a program that plans with more is not run.
        """
        if self.plans:
            self._plan(jax.jit(function), arguments)
            return {}
        try:
            compiled = self.programs.popleft().result()
        except Exception:  # side by side, kernels that are tried share the memory of the device
            compiled = jax.jit(function).lower(*arguments).compile()
        planned = compiled.memory_analysis().temp_size_in_bytes
        found = {"temp_mb": planned / 1e6} if memory else {}
        if planned > most_bytes:
            return found | {"error": f"plans with {planned / 1e9:.0f} GB"}

        def call() -> Any:
            return compiled(*arguments)

        first = seconds_of_calls(call, 1, 0.0)
        if most_bytes < np.inf and first > _SLOW_SECONDS:
            return found | {"us": first * 1e6}
        if memory:
            found["peak_mb"] = peak_bytes(call) / 1e6
        once = min(seconds_of_calls(call, 1, 0.0) for _ in range(2))
        calls = int(np.clip(_SAMPLE_SECONDS / once, 1, _MOST_CALLS))
        samples = 1 if once > 0.1 else self.samples
        found["us"] = min(seconds_of_calls(call, calls, 0.01) for _ in range(samples)) * 1e6
        kernels = device_microseconds(call) if device else 0
        return found | ({"device_us": kernels} if kernels else {})

    def peer(self, kind: str, function: Callable, *arguments: Any, most_bytes: float, **measured: bool) -> dict:
        """The same of a peer: what it raises is a line of the result, and what is slow is not called again."""
        if kind in self.slow:
            self.programs.popleft()
            return {"error": f"not run: {self.slow[kind]}"}
        try:
            found = self.time(function, *arguments, most_bytes=most_bytes, **measured)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        if found.get("us", 0) > _SLOW_SECONDS * 1e6:
            self.slow[kind] = f"{found['us'] / 1e6:.1f} s for {arguments[0].shape[0]} rows"
        return found

    def compile_kernels(self, source: str) -> None:
        """Has kernels compiled into the cache on disk."""
        compile_ = partial(compile_cubin, source, target_architecture())
        if self.threads is None:
            compile_()
        else:
            self.threads.submit(compile_)

    def _plan(self, jitted: Any, arguments: tuple) -> None:
        """Has a program compiled. What that raises is raised again when its turn to run has come."""
        if self.threads is None:
            jitted.trace(*arguments).lower(lowering_platforms=("cuda",))
        else:
            self.programs.append(self.threads.submit(lambda: jitted.lower(*arguments).compile()))
