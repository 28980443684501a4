"""Device time of a planned call: its kernels captured in a CUDA graph and replayed, without XLA in between.

The same cubins, in the same launch configuration, as the custom call uses. Each repetition has its own routing and
takes the next layer's weights, so replays find a cold L2. The rows that pass between the kernels are the same memory in
all repetitions, as they are for calls in a row under XLA: memory of their own would have to be written back.
"""

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from cuda.bindings import driver

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.cuda.compiler import compile_cubin, target_architecture
from jax_marlin_moe.cuda.plan import operands_of_block, plan_fused_moe
from jax_marlin_moe.cuda.program import Plan
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme
from jax_marlin_moe.weights import MarlinWeights, pad_rows

_SHARED_LIMIT = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_OVERLAP = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def _checked(result):
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {status}")
    return values[0] if values else None


def plan_block(
    x: jax.Array,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    *,
    top_k: int,
    activation: str | Activation,
    scheme: BlockScheme | BatchInvariant | None,
    activation_dtype: ByteDtype | None = None,
    shared: int = 0,
) -> Plan:
    """`plan_fused_moe` for the card at hand, with a row of x for each token and every expert in the matrices."""
    return plan_fused_moe(
        x,
        gate_up,
        down,
        tokens=x.shape[0],
        top_k=top_k,
        routed_experts=gate_up.num_experts,
        mapped=False,
        activation=get_activation(activation),
        architecture=target_architecture(),
        scheme=scheme,
        activation_dtype=activation_dtype,
        shared=shared,
    )


def operands_by_routing(
    x: jax.Array,
    layers: Sequence[tuple[MarlinWeights, MarlinWeights]],
    topk_weights: Sequence[jax.Array] | jax.Array,
    topk_ids: np.ndarray,
    shared: Sequence[tuple[MarlinWeights, MarlinWeights]] = (),
) -> list[list[jax.Array | None]]:
    """Operands of `plan_block`, one list per routing; each takes the next layer, and its `shared` experts."""
    x = pad_rows(x, layers[0][0])
    return [
        operands_of_block(
            x,
            *layers[i % len(layers)],
            topk_weights[i],
            jax.device_put(topk_ids[i]),
            shared=shared[i % len(layers)] if shared else (),
        )
        for i in range(len(topk_ids))
    ]


def timed_samples(
    replay: Callable[[int], float], repetitions: int, *, samples: int, pause_seconds: float
) -> list[float]:
    """Microseconds of one repetition in each of `samples` samples, after three to warm up; sorted.

    The card takes some 40 microseconds to start on a graph after a rest, so a sample is as many replays in a row as
    last two milliseconds: 2 % of them. Replays in a row may drive the card into its power limit, where it lowers its
    clock; a pause before each sample keeps it out of there.

    Args:
        replay: replays a graph that many times and gives the microseconds of one repetition.
        repetitions: in the graph.
        samples: how many.
        pause_seconds: before each.
    """
    warm = min(replay(1) for _ in range(3))
    replays = max(1, math.ceil(2000 / (warm * repetitions)))
    times = []
    for _ in range(samples):
        time.sleep(pause_seconds)
        times.append(replay(replays))
    return sorted(times)


def _zeros(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]


class ReplayedPlan:
    """The kernels of a plan over several sets of operands.

    Args:
        plan: of `jax_marlin_moe.cuda.plan`.
        operands: one list of arrays per repetition, in the plan's order, None where absent.
        results: shapes of the results, allocated here with the scratch.
    """

    def __init__(
        self, plan: Plan, operands: Sequence[Sequence[jax.Array | None]], results: Sequence[jax.ShapeDtypeStruct]
    ) -> None:
        _checked(driver.cuInit(0))
        device = _checked(driver.cuDeviceGet(0))
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(device))))
        self._multiprocessors = _checked(
            driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
        )
        self.plan = plan
        cubin = compile_cubin(plan.source, target_architecture())
        self._module = _checked(driver.cuModuleLoadData(cubin))
        self._functions = []
        for kernel in plan.kernels:
            function = _checked(driver.cuModuleGetFunction(self._module, kernel.name.encode()))
            _checked(driver.cuFuncSetAttribute(function, _SHARED_LIMIT, kernel.requested_bytes))
            _checked(driver.cuFuncSetAttribute(function, _CARVEOUT, 100))  # as csrc/ffi/cuda_program.cc does
            self._functions.append(function)
        self._stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        # Those of 32 bits say what the routing is: with lists of its own, a repetition's kernel can be timed alone.
        shared = {i: shape for i, shape in enumerate(plan.scratch) if shape.dtype != jnp.int32}
        own = [*results, *(shape for i, shape in enumerate(plan.scratch) if i not in shared)]
        # One program for all of them: each that is compiled takes a tenth of a second.
        rows = dict(zip(shared, jax.jit(partial(_zeros, tuple(shared.values())))(), strict=True))
        allocate = jax.jit(partial(_zeros, tuple(own)))
        self._buffers = []
        for inputs in operands:
            arrays = iter(allocate())
            outputs = [next(arrays) for _ in results]
            scratch = [rows[i] if i in rows else next(arrays) for i in range(len(plan.scratch))]
            self._buffers.append([*inputs, *outputs, *scratch])
        jax.block_until_ready(self._buffers)
        self._results = slice(len(operands[0]), len(operands[0]) + len(results))
        self._pointers = [[0 if b is None else b.unsafe_buffer_pointer() for b in buffers] for buffers in self._buffers]

    def close(self) -> None:
        """Unloads the module."""
        _checked(driver.cuStreamSynchronize(self._stream))
        _checked(driver.cuModuleUnload(self._module))

    def results(self, repetition: int = 0) -> list[jax.Array]:
        """What the last replay of all kernels has left of one repetition; the next one overwrites it."""
        return self._buffers[repetition][self._results]

    def _launch(self, index: int, pointers: Sequence[int], overlap: bool) -> None:
        kernel = self.plan.kernels[index]
        config = driver.CUlaunchConfig()
        config.gridDimX = kernel.ctas(self._multiprocessors)
        config.gridDimY = config.gridDimZ = 1
        config.blockDimX = kernel.threads
        config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = kernel.requested_bytes
        config.hStream = self._stream
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = _OVERLAP
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        tokens = 0 if self.plan.counted is None else self.plan.counted.tokens
        values = tuple(tokens if buffer is None else pointers[buffer] + offset for buffer, offset in kernel.parameters)
        parameters = (values, (ctypes.c_void_p,) * len(values))
        _checked(driver.cuLaunchKernelEx(config, self._functions[index], parameters, 0))

    @contextlib.contextmanager
    def captured(self, kernels: Sequence[int] | None = None) -> Iterator[Callable[..., float]]:
        """A graph of all repetitions, as a function that replays it that many times in a row.

        The function waits for the replays and returns the microseconds of one repetition, averaged over all.

        Args:
            kernels: which kernels to launch; None for the whole call. Those that read another's results must have
                been preceded by a whole call.
        """
        chosen = range(len(self.plan.kernels)) if kernels is None else kernels
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCapture(self._stream, mode))
        for pointers in self._pointers:
            for position, index in enumerate(chosen):
                overlap = position > 0 and self.plan.kernels[index].overlaps_predecessor
                self._launch(index, pointers, overlap)
        graph = _checked(driver.cuStreamEndCapture(self._stream))
        executable = _checked(driver.cuGraphInstantiate(graph, 0))
        begin, end = (_checked(driver.cuEventCreate(0)) for _ in range(2))

        def replay(times: int = 1) -> float:
            _checked(driver.cuEventRecord(begin, self._stream))
            for _ in range(times):
                _checked(driver.cuGraphLaunch(executable, self._stream))
            _checked(driver.cuEventRecord(end, self._stream))
            _checked(driver.cuEventSynchronize(end))
            return _checked(driver.cuEventElapsedTime(begin, end)) * 1e3 / (times * len(self._pointers))

        try:
            yield replay
        finally:
            for event in (begin, end):
                _checked(driver.cuEventDestroy(event))
            _checked(driver.cuGraphExecDestroy(executable))
            _checked(driver.cuGraphDestroy(graph))

    def microseconds(
        self, kernels: Sequence[int] | None = None, samples: int = 15, pause_seconds: float = 0.0
    ) -> list[float]:
        """`timed_samples` of the whole call, or of some of its kernels as `captured` takes them."""
        with self.captured(kernels) as replay:
            return timed_samples(replay, len(self._pointers), samples=samples, pause_seconds=pause_seconds)


def replayed_block(
    x: jax.Array,
    layers: Sequence[tuple[MarlinWeights, MarlinWeights]],
    topk_weights: Sequence[jax.Array] | jax.Array,
    topk_ids: np.ndarray,
    *,
    activation: str = "silu",
    scheme: BlockScheme | BatchInvariant | None = None,
    activation_dtype: ByteDtype | None = None,
) -> ReplayedPlan:
    """The kernels of `fused_moe` over the routings, each with the next of the layers; see `ReplayedPlan`.

    Args:
        x: [tokens, K].
        layers: (gate_up, down) pairs of the same shapes and formats.
        topk_weights: router weights [routings, tokens, top_k], also as one array per routing.
        topk_ids: expert ids [routings, tokens, top_k].
        activation: between the products.
        scheme: tiles; by default what a call would use.
        activation_dtype: as for `fused_moe`.
    """
    gate_up, down = layers[0]
    _, tokens, top_k = topk_ids.shape
    plan = plan_block(
        x, gate_up, down, top_k=top_k, activation=activation, scheme=scheme, activation_dtype=activation_dtype
    )
    operands = operands_by_routing(x, layers, topk_weights, topk_ids)
    return ReplayedPlan(plan, operands, [jax.ShapeDtypeStruct((tokens, down.padded_n), x.dtype)])
