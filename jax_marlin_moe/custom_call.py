"""Custom calls under the name of their op.

`jax.ffi.ffi_call` is a primitive of that name, and so HLO instructions and profiles call every op. A primitive per op,
with the same lowering, shows which it is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_marlin_moe.layer_slice import LayerSlice, with_index_operands
from jax_marlin_moe.native import TARGETS
from jax_marlin_moe.operand_types import replicated_type


@dataclasses.dataclass(frozen=True)
class _Values:
    """An array among the attributes, compared by its contents: the parameters of a primitive are hashed."""

    dtype: str
    data: bytes


def custom_call(
    name: str,
    target: str,
    operands: Sequence[jax.Array | LayerSlice],
    results: Sequence[jax.ShapeDtypeStruct],
    aliases: Mapping[int, int] | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """Calls an FFI target, in a lowering of an op.

    Where operands are layers of stacks, the target of csrc/ffi/layer_of_stack_cpu.cc calls that of the op.

    Args:
        name: of the op, and of the instruction in HLO.
        target: registered with `jax.ffi.register_ffi_target`.
        operands: at least one, the first an array.
        results: their shapes and dtypes.
        aliases: operands whose memory a result takes, by their place, and the result's.
        attributes: numpy scalars and vectors, strings, booleans and integers.
    """
    operands, places = with_index_operands(operands)
    if places:
        pairs = np.asarray(list(places.items()), np.int64).reshape(-1)
        attributes |= {"layer_target": target, "layer_operands": pairs}
        target = TARGETS["layer_of_stack", "cpu"]
    packed = tuple(
        (key, _Values(value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value)
        for key, value in attributes.items()
    )
    shapes = tuple((tuple(result.shape), np.dtype(result.dtype)) for result in results)
    return _primitive(name).bind(
        *operands, target=target, shapes=shapes, aliases=tuple((aliases or {}).items()), attributes=packed
    )


@functools.cache
def _primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True

    def result_types(*operands, shapes, **_):
        return [replicated_type(operands[0], shape, dtype) for shape, dtype in shapes]

    def lowering(context, *operands, target, aliases, attributes, **_):
        values = {
            key: np.frombuffer(value.data, value.dtype) if isinstance(value, _Values) else value
            for key, value in attributes
        }
        return jax.ffi.ffi_lowering(target, operand_output_aliases=dict(aliases))(context, *operands, **values)

    primitive.def_abstract_eval(result_types)
    mlir.register_lowering(primitive, lowering)
    return primitive
