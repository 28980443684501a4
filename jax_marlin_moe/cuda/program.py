"""A compiled program as a custom call: image, contract, names and fingerprint, as csrc/ffi/cuda_program.h reads them.

An exported program contains this machine code: loading one is running code, so load only what you trust. The
fingerprint and the handler's checks find damage, not intent.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.facts import (
    Bound,
    Facts,
    LayerOffset,
    Pointer,
    parameter_name,
    render_members,
    render_struct,
)
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.layer_slice import LayerSlice, with_index_operands

_CONTRACT_VERSION = 5

# XLA's codes of the types that the programs take (xla.PrimitiveType).
_DTYPE_CODES = {"int8": 2, "int32": 4, "uint8": 6, "float16": 10, "float32": 11, "bfloat16": 16, "float8_e4m3fn": 20}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: the entry point's symbol, which profilers show: stage, format and rows, as in `jmm_gate_up_int4_m16`.
        headers: of csrc/cuda, which have what `body` and `structs` name.
        body: the C++ type whose `run` is the kernel, in namespace jmm, spelled with the names of `structs`.
        pointers: what its members point to, in their order; None for one that is absent.
        threads: of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        padding_bytes: what it asks for beside it, so that a multiprocessor has no more CTAs than planned.
        max_ctas: that have work, at most.
        structs: the facts that it is compiled with, by the structs' names.
        constants: what else must hold on both sides: C++ expressions in the scope of the structs, and their values.
        ctas_per_sm: resident CTAs of a persistent grid; 0 launches `max_ctas`.
        overlaps_predecessor: whether it may start before the kernel before it has ended.
        cluster: CTAs of a cluster; grids are whole clusters.
    """

    name: str
    headers: tuple[str, ...]
    body: str
    pointers: Mapping[str, Bound]
    threads: int
    shared_bytes: int
    max_ctas: int
    structs: Mapping[str, Facts] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ctas_per_sm: int = 0
    overlaps_predecessor: bool = False
    cluster: int = 1
    padding_bytes: int = 0

    @property
    def requested_bytes(self) -> int:
        """Dynamic shared memory that a launch asks for."""
        return self.shared_bytes + self.padding_bytes

    @property
    def parameters(self) -> tuple[tuple[int | None, int], ...]:
        """What the entry point takes, in its order: buffers of the call, and the bytes before what they point to.

        None in the place of a buffer is the number of tokens.
        """
        bound = (pointer for pointer in self.pointers.values() if pointer is not None)
        present = [(p.buffer, p.offset) if isinstance(p, Pointer) else (None, 0) for p in bound]
        return (*present, *((buffer, 0) for buffer in self.layer_indices))

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Of them, those that hold the numbers of layers."""
        layers = (pointer.layer for pointer in self.pointers.values() if pointer is not None)
        return tuple(dict.fromkeys(layer.index for layer in layers if layer is not None))

    @property
    def scope(self) -> str:
        """The C++ namespace that has the structs, and the body as `Kernel`."""
        return f"of_{self.name}"

    def ctas(self, multiprocessors: int) -> int:
        """The grid on a card with that many multiprocessors, as csrc/ffi/cuda_program.cc computes it."""
        bound = self.ctas_per_sm * multiprocessors
        ctas = min(self.max_ctas, bound) if bound else self.max_ctas
        return ctas - ctas % self.cluster


@dataclasses.dataclass(frozen=True)
class CountedRows:
    """The buffers of a program that is compiled for a most number of tokens.

    Attributes:
        tokens: of the call.
        most: that the program takes.
        rows_of_token: rows that buffers have for each token, by the buffer. Others are as compiled.
    """

    tokens: int
    most: int
    rows_of_token: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call and what they need.

    Attributes:
        kernels: in launch order.
        scratch: buffers that follow the results, in this order.
        preamble: C++ that the kernels' types need beside the headers.
        counted: where the kernels take the number of tokens at run time.
    """

    kernels: tuple[Kernel, ...]
    scratch: tuple[jax.ShapeDtypeStruct, ...] = ()
    preamble: str = ""
    counted: CountedRows | None = None

    @property
    def source(self) -> str:
        """The translation unit."""
        return render(self.kernels, self.preamble)

    def position(self, stage: str) -> int:
        """The place among `kernels` of a stage.

        Args:
            stage: what the name of its kernel begins with, such as "align", "gate_up" or "combine".

        Raises:
            ValueError: if the plan has no such stage.
        """
        for position, kernel in enumerate(self.kernels):
            if kernel.name.startswith(f"jmm_{stage}_"):
                return position
        raise ValueError(f"stage is {stage!r}; the kernels are {', '.join(kernel.name for kernel in self.kernels)}")


def counted_plan(
    plan: Plan, tokens: int, most: int | None, rows_of_token: Mapping[int, int], first_scratch: int
) -> Plan:
    """A plan for the most tokens that a call may have, with the scratch of one that has `tokens`.

    Args:
        plan: whose kernels take the number of tokens.
        tokens: of the call.
        most: that the plan is for; None returns the plan as it is, for exactly those of the call.
        rows_of_token: as in `CountedRows`.
        first_scratch: the first buffer of the plan's scratch.
    """
    if most is None:
        return plan

    def resized(place: int, buffer: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows = rows_of_token.get(place)
        return buffer if rows is None else jax.ShapeDtypeStruct((rows * tokens, *buffer.shape[1:]), buffer.dtype)

    scratch = tuple(resized(first_scratch + place, buffer) for place, buffer in enumerate(plan.scratch))
    return dataclasses.replace(plan, scratch=scratch, counted=CountedRows(tokens, most, rows_of_token))


def render(kernels: Sequence[Kernel], preamble: str = "") -> str:
    """The translation unit: one entry point per kernel, under its name.

    What the plan knows about a kernel beside its facts is asserted: it must hold in C++ as well.
    """
    lines = [render_includes(kernels), preamble]
    for kernel in _entry_points(kernels):
        lines += [render_facts(kernel), _render_entry_point(kernel)]
    return "\n".join(lines) + "\n"


def _entry_points(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The kernels without further launches of one, which differ in their buffers alone."""
    distinct: dict[str, Kernel] = {}
    for kernel in kernels:
        first = distinct.setdefault(kernel.name, kernel)
        equal = render_facts(first) == render_facts(kernel) and _render_entry_point(first) == _render_entry_point(
            kernel
        )
        assert equal, f"two kernels have the name {kernel.name}"
    return list(distinct.values())


def render_includes(kernels: Sequence[Kernel]) -> str:
    """The headers of the kernels, each once."""
    return "\n".join(f'#include "{name}"' for name in sorted({name for kernel in kernels for name in kernel.headers}))


def render_facts(kernel: Kernel) -> str:
    """The structs, the kernel's type and the assertions, in a namespace of their own."""
    expected = {"Kernel::kThreads": kernel.threads, "Kernel::kMaxCtas": kernel.max_ctas}
    if kernel.shared_bytes:
        expected["Kernel::kSharedBytes"] = kernel.shared_bytes
    if kernel.ctas_per_sm:
        expected |= {"Kernel::kCtasPerSm": kernel.ctas_per_sm, "Kernel::kCluster": kernel.cluster}
    expected |= kernel.constants
    expected["sizeof(Kernel) / sizeof(void*)"] = len(kernel.pointers)  # none is left unbound
    lines = [f"namespace {kernel.scope} {{"]
    lines += [render_struct(name, facts) for name, facts in kernel.structs.items()]
    lines.append(f"using Kernel = jmm::{kernel.body};")
    lines += [f'static_assert({what} == {value}, "{what} of the plan");' for what, value in expected.items()]
    lines += [
        f'static_assert(jmm::kSame<Kernel::{pointer.element}, {pointer.cpp_element}>, "elements of {path}");'
        for path, pointer in kernel.pointers.items()
        if isinstance(pointer, Pointer) and pointer.element
    ]
    return "\n".join([*lines, "}"])


def _render_entry_point(kernel: Kernel) -> str:
    """The function that the driver launches. It moves the pointers into stacks to their layers before all else."""
    pointers = {parameter_name(path): pointer for path, pointer in kernel.pointers.items() if pointer is not None}
    parameters = [f"{pointer.cpp} {name}{'_stack' * bool(pointer.layer)}" for name, pointer in pointers.items()]
    parameters += [f"const int32_t* layer_of_{buffer}" for buffer in kernel.layer_indices]
    attributes = f"__launch_bounds__({kernel.threads}, {max(kernel.ctas_per_sm, 1)})"
    if kernel.cluster > 1:
        attributes += f" __cluster_dims__({kernel.cluster}, 1, 1)"
    moved = [_render_layer(name, p) for name, p in pointers.items() if isinstance(p, Pointer) and p.layer]
    return "\n".join(
        [
            f'extern "C" __global__ void {attributes} {kernel.name}({", ".join(parameters)}) {{',
            "  extern __shared__ __align__(1024) unsigned char shared_bytes[];",
            *moved,
            f"  {kernel.scope}::Kernel{render_members(kernel.pointers)}"
            f".{'run(shared_bytes)' if kernel.shared_bytes else 'run()'};\n}}",
        ]
    )


def _render_layer(name: str, pointer: Pointer) -> str:
    layer = pointer.layer
    assert layer is not None
    step = layer.elements * (jnp.dtype(pointer.dtype).itemsize if pointer.element else 1)
    index = f"min(max(__ldg(layer_of_{layer.index}), 0), {layer.layers - 1})"
    return f"  {pointer.cpp} {name} = {name}_stack + {index} * {step}LL;"


def _in_stacks(
    kernels: Sequence[Kernel], source: str, operands: Sequence[jax.Array | LayerSlice | None]
) -> tuple[list[Kernel], str, list[jax.Array | None]]:
    """The kernels of a call, their source and its operands, with stacks and indices in place of slices."""
    arrays, indices = with_index_operands(operands)
    added = len(arrays) - len(operands)
    if not added:
        return list(kernels), source, arrays

    def moved(pointer: Bound) -> Bound:
        if not isinstance(pointer, Pointer):
            return pointer
        operand = operands[pointer.buffer] if pointer.buffer < len(operands) else None
        if isinstance(operand, LayerSlice):
            layer = LayerOffset(indices[pointer.buffer], operand.stack.shape[0], operand.size)
            return dataclasses.replace(pointer, layer=layer)
        # Results and scratch follow the operands.
        return dataclasses.replace(pointer, buffer=pointer.buffer + added * (pointer.buffer >= len(operands)))

    of_stacks = [
        dataclasses.replace(kernel, pointers={path: moved(pointer) for path, pointer in kernel.pointers.items()})
        for kernel in kernels
    ]
    for kernel, of_stack in zip(_entry_points(kernels), _entry_points(of_stacks), strict=True):
        before, after = _render_entry_point(kernel), _render_entry_point(of_stack)
        assert source.count(before) == 1, f"the source does not have the entry point of {kernel.name}"
        source = source.replace(before, after)
    return of_stacks, source, arrays


def call_program(
    op: str,
    operands: Sequence[jax.Array | LayerSlice | None],
    results: Sequence[jax.ShapeDtypeStruct],
    plan: Plan,
    architecture: str,
    aliases: Mapping[int, int] | None = None,
) -> list[jax.Array]:
    """Compiles the kernels of a plan and calls them, one after the other, in one custom call of the op's name.

    Args:
        op: the name.
        operands: in the order of the plan's buffers. One that is None has a number among them, but is not a buffer of
            the call; one that is a layer of a stack has the whole stack as its buffer, and the kernels find the layer.
        results: the plan's buffers behind the operands. Those behind the results are its scratch: kernels never
            allocate.
        plan: the kernels.
        architecture: the target.
        aliases: operands, before any that is None, whose memory a result may take, and the results.

    Returns:
        The results, without the scratch.
    """
    given = len(operands)
    kernels, source, arrays = _in_stacks(plan.kernels, plan.source, operands)
    cubin = compiler.compile_cubin(source, architecture)
    counted = plan.counted
    if counted is not None:  # results and scratch follow the operands
        added = len(arrays) - given
        rows = {buffer + added * (buffer >= given): rows for buffer, rows in counted.rows_of_token.items()}
        counted = dataclasses.replace(counted, rows_of_token=rows)
    outputs = [*results, *plan.scratch]
    contract = _contract([*arrays, *outputs], kernels, counted)
    names = " ".join(kernel.name for kernel in kernels)
    return custom_call(
        op,
        native.TARGETS["program", "cuda"],
        [array for array in arrays if array is not None],
        outputs,
        aliases,
        cubin=np.frombuffer(cubin, np.uint8),
        contract=contract,
        kernels=names,
        fingerprint=np.int64(native.fingerprint(cubin, contract.tobytes(), names)),
    )[: len(results)]


def _contract(
    buffers: Sequence[jax.Array | jax.ShapeDtypeStruct | None],
    kernels: Sequence[Kernel],
    counted: CountedRows | None,
) -> np.ndarray:
    present = [(place, buffer) for place, buffer in enumerate(buffers) if buffer is not None]
    positions = list(itertools.accumulate((buffer is not None for buffer in buffers), initial=0))
    fields = [_CONTRACT_VERSION, len(present), len(kernels)]
    for place, buffer in present:
        rows = counted.rows_of_token.get(place, 0) if counted is not None else 0
        extents = (rows * counted.most, *buffer.shape[1:]) if counted is not None and rows else buffer.shape
        fields += [_DTYPE_CODES[jnp.dtype(buffer.dtype).name], len(extents), rows, *extents]
    for kernel in kernels:
        fields += [kernel.threads, kernel.requested_bytes, kernel.max_ctas, kernel.ctas_per_sm]
        fields += [kernel.cluster, int(kernel.overlaps_predecessor), len(kernel.parameters)]
        for path, pointer in kernel.pointers.items():
            if isinstance(pointer, Pointer):
                _check_pointer(kernel.name, path, pointer, buffers)
        for parameter, offset in kernel.parameters:
            fields += [len(present) if parameter is None else positions[parameter], offset]
    return np.asarray(fields, np.int64)


def _check_pointer(
    name: str, path: str, pointer: Pointer, buffers: Sequence[jax.Array | jax.ShapeDtypeStruct | None]
) -> None:
    """Raises RuntimeError where a kernel was planned for another buffer than the call's."""
    buffer = buffers[pointer.buffer]
    if buffer is None:
        raise RuntimeError(f"{path} of {name} is buffer {pointer.buffer}, which the call does not have")
    if jnp.dtype(buffer.dtype).name != pointer.dtype:
        raise RuntimeError(
            f"{path} of {name} is buffer {pointer.buffer}, which has dtype {buffer.dtype}; it must be {pointer.dtype}"
        )
