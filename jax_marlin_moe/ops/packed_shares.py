"""Packed shares: what devices add to a sum, as `four_numbers` from where it is made to where it is added.

csrc/cuda/shares.cuh has the kernels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.cuda.compiler import compute_capability, target_architecture
from jax_marlin_moe.cuda.kernels.shares import VECTOR, add_shares_kernel, pack_share_kernel
from jax_marlin_moe.cuda.program import Plan, call_program
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.four_numbers import WORDS, pack_fours, unpack_fours
from jax_marlin_moe.ops.implementation import unavailable_reason


def pack_share(y: Float32[Array, "*rows columns"]) -> Int32[Array, "*rows words"]:
    """`pack_fours`, for a sum of shares."""
    return _pack_share.bind(y)


def add_shares(words: Int32[Array, "shares *rows words"], dtype: DTypeLike) -> Float[Array, "*rows columns"]:
    """The sum of packed shares, in their order, rounded to a dtype."""
    return _add_shares.bind(words, dtype=jnp.dtype(dtype))


def add_two_shares(
    own: Int32[Array, "*rows words"],
    other: Int32[Array, "*rows words"],
    dtype: DTypeLike,
    alike_over: tuple[str, ...] = (),
) -> Float[Array, "*rows columns"]:
    """The sum of a device's share and another's, in either order the same.

    Args:
        own: a packed share.
        other: another.
        dtype: of the sum.
        alike_over: manual axes of two devices that each have the other's share, over which the sum does not vary.
    """
    return _add_two_shares.bind(own, other, dtype=jnp.dtype(dtype), alike_over=alike_over)


def _added(words, *, dtype):
    return unpack_fours(words).sum(0).astype(dtype)


def _two_added(own, other, *, dtype, alike_over):
    return (unpack_fours(own) + unpack_fours(other)).astype(dtype)


def _packed_on_cuda(y):
    if not y.size or y.size % VECTOR:
        return pack_fours(y)
    return _called(pack_share_kernel(y.size, share=0, words=1), [y], jax.ShapeDtypeStruct(_packed_shape(y), WORDS))


def _added_on_cuda(words, *, dtype):
    result = jax.ShapeDtypeStruct(_added_shape(words.shape[1:]), dtype)
    if not _adds_on_cuda(result):
        return _added(words, dtype=dtype)
    return _called(add_shares_kernel(words.shape[0], result.size, dtype, words=0, total=1), [words], result)


def _two_added_on_cuda(own, other, *, dtype, alike_over):
    result = jax.ShapeDtypeStruct(_added_shape(own.shape), dtype)
    if not _adds_on_cuda(result):
        return _two_added(own, other, dtype=dtype, alike_over=alike_over)
    return _called(add_shares_kernel(2, result.size, dtype, words=0, other=1, total=2), [own, other], result)


def _adds_on_cuda(result):
    rounds = result.dtype == jnp.bfloat16 and compute_capability(target_architecture()) >= 80
    return result.size and result.size % VECTOR == 0 and (rounds or result.dtype == jnp.float32)


def _called(kernel, operands, result):
    (found,) = call_program(
        kernel.name.removeprefix("jmm_"), operands, [result], Plan((kernel,)), target_architecture()
    )
    return found


def _packed_shape(y):
    return (*y.shape[:-1], y.shape[-1] // 2)


def _added_shape(shape):
    return (*shape[:-1], shape[-1] * 2)


def _packed_type(y):
    return replicated_type(y, _packed_shape(y), WORDS)


def _type_of_sum(words, *, dtype):
    return replicated_type(words, _added_shape(words.shape[1:]), dtype)


def _type_of_two(own, other, *, dtype, alike_over):
    type_ = replicated_type(own, _added_shape(own.shape), dtype)
    manual = type_.manual_axis_type
    return type_.update(manual_axis_type=manual.update(varying=manual.varying - frozenset(alike_over)))


def _primitive(name: str, *, type_of: Callable, form: Callable, on_cuda: Callable, front: int = 0) -> Primitive:
    """An operation on arrays of one shape, whose dimension `front` may be joined by others in front of it.

    It is no `Op`: sums over devices, which every `Op` has, are made of these.
    """
    primitive = Primitive(name)

    def batched(operands, dims, **params):
        size = next(one.shape[dim] for one, dim in zip(operands, dims, strict=True) if dim is not None)
        moved = [
            jnp.repeat(jnp.expand_dims(one, front), size, front) if dim is None else jnp.moveaxis(one, dim, front)
            for one, dim in zip(operands, dims, strict=True)
        ]
        return primitive.bind(*moved, **params), 0

    def lowered_for_cuda(*operands, **params):
        return (form if unavailable_reason("cuda") else on_cuda)(*operands, **params)

    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(type_of)
    mlir.register_lowering(primitive, mlir.lower_fun(form, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(lowered_for_cuda, multiple_results=False), platform="cuda")
    batching.primitive_batchers[primitive] = batched
    return primitive


_pack_share = _primitive("pack_share", type_of=_packed_type, form=pack_fours, on_cuda=_packed_on_cuda)
_add_shares = _primitive("add_shares", type_of=_type_of_sum, form=_added, on_cuda=_added_on_cuda, front=1)
_add_two_shares = _primitive("add_two_shares", type_of=_type_of_two, form=_two_added, on_cuda=_two_added_on_cuda)
