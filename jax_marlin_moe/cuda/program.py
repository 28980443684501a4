"""A compiled program as a custom call: image, contract, names and fingerprint, as csrc/ffi/cuda_program.h reads them.

An exported program contains this machine code: loading one is running code, so load only what you trust. The
fingerprint and the handler's checks find damage, not intent.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler

_CONTRACT_VERSION = 3

# XLA's codes of the types that the programs take (xla.PrimitiveType).
_DTYPE_CODES = {"int32": 4, "float16": 10, "float32": 11, "bfloat16": 16, "uint8": 6}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: the entry point's symbol, which profilers show: stage, format and rows, as in `jmm_gate_up_int4_m16`.
        body: the C++ type whose `run` is the kernel, spelled with its compile-time shapes.
        members: the C++ expression that fills it, over the parameters `p0`, `p1`, ...
        parameters: index among the call's buffers (operands, then results) and pointer type of each parameter.
        threads: threads of a block, a C++ constant expression's value.
        shared_bytes: dynamic shared memory.
        max_blocks: blocks that have work, at most.
        blocks_per_sm: resident blocks of a persistent grid; 0 launches `max_blocks`.
        overlaps_predecessor: whether it may start before the kernel before it has ended.
        cluster: blocks of a cluster; grids are whole clusters.
    """

    name: str
    body: str
    members: str
    parameters: tuple[tuple[int, str], ...]
    threads: int
    shared_bytes: int
    max_blocks: int
    blocks_per_sm: int = 0
    overlaps_predecessor: bool = False
    cluster: int = 1

    def blocks(self, multiprocessors: int) -> int:
        """The grid on a card with so many multiprocessors, as csrc/ffi/cuda_program.cc computes it."""
        bound = self.blocks_per_sm * multiprocessors
        blocks = min(self.max_blocks, bound) if bound else self.max_blocks
        return blocks - blocks % self.cluster


def render(kernels: Sequence[Kernel], includes: Sequence[str], preamble: str) -> str:
    """The translation unit: one entry point per kernel, under its name."""
    lines = [f'#include "{name}"' for name in includes] + [preamble]
    for index, kernel in enumerate(kernels):
        arguments = ", ".join(f"{pointer} p{i}" for i, (_, pointer) in enumerate(kernel.parameters))
        shared = f"using B{index} = jmm::{kernel.body};\n"
        if kernel.shared_bytes:
            shared += (
                f'static_assert(B{index}::kSharedBytes == {kernel.shared_bytes}, "the plan sized shared memory");\n'
            )
        bounds = f"__launch_bounds__({kernel.threads}, {max(kernel.blocks_per_sm, 1)})"
        if kernel.cluster > 1:
            bounds += f" __cluster_dims__({kernel.cluster}, 1, 1)"
        call = "run(shared_bytes)" if kernel.shared_bytes else "run()"
        lines.append(
            f'{shared}extern "C" __global__ void {bounds} {kernel.name}({arguments}) {{\n'
            "  extern __shared__ __align__(1024) unsigned char shared_bytes[];\n"
            f"  B{index}{{{kernel.members}}}.{call};\n}}"
        )
    return "\n".join(lines) + "\n"


def call_program(
    operands: Sequence[jax.Array | None],
    results: Sequence[jax.ShapeDtypeStruct],
    kernels: Sequence[Kernel],
    source: str,
    architecture: str,
) -> list[jax.Array]:
    """Compiles the kernels and calls them, one after the other, in one custom call.

    `results` are the outputs and after them the scratch buffers: kernels never allocate. `source` is what `render`
    made of the kernels. An operand that is None has a number among the buffers, but is no buffer of the call.
    """
    cubin = compiler.compile_cubin(source, architecture)
    contract = _contract([*operands, *results], kernels)
    names = " ".join(kernel.name for kernel in kernels)
    outputs = jax.ffi.ffi_call(native.PROGRAM_CUDA, list(results), vmap_method=None)(
        *(operand for operand in operands if operand is not None),
        cubin=np.frombuffer(cubin, np.uint8),
        contract=contract,
        kernels=names,
        fingerprint=np.int64(native.fingerprint(cubin, contract.tobytes(), names)),
    )
    return list(outputs)


def _contract(buffers: Sequence[jax.Array | jax.ShapeDtypeStruct | None], kernels: Sequence[Kernel]) -> np.ndarray:
    present = [buffer for buffer in buffers if buffer is not None]
    positions = list(itertools.accumulate((buffer is not None for buffer in buffers), initial=0))
    fields = [_CONTRACT_VERSION, len(present), len(kernels)]
    for buffer in present:
        fields += [_DTYPE_CODES[jnp.dtype(buffer.dtype).name], len(buffer.shape), *buffer.shape]
    for kernel in kernels:
        fields += [kernel.threads, kernel.shared_bytes, kernel.max_blocks, kernel.blocks_per_sm]
        fields += [kernel.cluster, int(kernel.overlaps_predecessor), len(kernel.parameters)]
        for index, _ in kernel.parameters:
            assert buffers[index] is not None, "a kernel takes an operand that is absent"
            fields.append(positions[index])
    return np.asarray(fields, np.int64)
