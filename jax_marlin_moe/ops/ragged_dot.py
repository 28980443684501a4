"""`ragged_dot`: rows sorted by group times the packed matrix of their group, with the arguments of JAX's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_marlin_moe import arguments
from jax_marlin_moe.operand_types import shard_rows_like
from jax_marlin_moe.ops.grouped_product import grouped_product_op, multiplied, row_experts, slot_columns
from jax_marlin_moe.ops.input_order import gather_input_order
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.qarray import from_qarray
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding, pad_rows


def ragged_dot(
    lhs: Float[Array, "*batch m K"],
    rhs: MarlinWeights | Any,
    group_sizes: Int32[Array, "*batch groups"],
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: Int32[Array, ""] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch m N"]:
    """`jax.lax.ragged_dot` with packed experts in the place of a dense stack.

    The first `group_sizes[0]` rows of lhs are of group 0, the next `group_sizes[1]` of group 1, and so on; group g is
    multiplied by `rhs[g - group_offset]`, and its bias is added if there is one. Rows of groups that rhs does not
    have, and rows past the last group, are zero. Negative sizes count as 0, and rows that sizes claim past the end of
    lhs do not exist. Differentiable with respect to lhs, and to biases and global scales of rhs. Leading dimensions
    are batches of rows with sizes of their own, as under `jax.vmap`.

    Args:
        lhs: rows sorted by group. bfloat16 or float16; float32 is multiplied as bfloat16 and returned as float32.
        rhs: packed experts, as many as there are groups or fewer; or a QArray of qwix, which `from_qarray` packs in
            every call: pack experts that stay once, before.
        group_sizes: int32.
        precision: None or the default, by any of its names, or a pair of them. Products accumulate in float32; there
            is no other precision.
        preferred_element_type: of the result: that of lhs, which is the default, or float32, which is not rounded.
        group_offset: an int or int32, the group that `rhs[0]` is; None is 0.
        implementation: None (the best that works), "cuda", "cpu" or "xla".

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    if hasattr(rhs, "qvalue"):
        rhs = _packed(rhs)
    arguments.check_weights("rhs", rhs)
    lhs, dtype = arguments.as_rows("lhs", lhs, preferred_element_type)
    if lhs.ndim > 2:
        each = partial(
            ragged_dot,
            precision=precision,
            preferred_element_type=dtype,
            group_offset=group_offset,
            implementation=implementation,
        )
        return arguments.over_batches(each, ("lhs", lhs), rhs, ("group_sizes", group_sizes))
    arguments.check_rank("lhs", lhs, 2)
    arguments.check_shape("lhs", lhs, (lhs.shape[0], rhs.k), "(m, K)")
    arguments.check_array("group_sizes", group_sizes, ndim=1, dtype=jnp.int32)
    groups = group_sizes.shape[0]
    if group_offset is None and groups != rhs.num_experts:
        raise ValueError(
            f"group_sizes has {groups} groups and rhs {rhs.num_experts} experts; without group_offset they must be as "
            "many"
        )
    if groups < 1:
        raise ValueError("group_sizes has 0 groups; it must have at least one")
    if group_offset is not None:
        group_offset = jnp.asarray(group_offset, jnp.int32 if isinstance(group_offset, int) else None)
        arguments.check_array("group_offset", group_offset, ndim=group_offset.ndim, dtype=jnp.int32)
        if group_offset.size != 1:
            raise ValueError(f"group_offset has shape {tuple(group_offset.shape)}; it must be one number")
    if not _is_default(precision):
        raise ValueError(f"precision is {precision}; it must be None: products are of 16-bit rows, summed in float32")
    return _ragged_dot(lhs, rhs, group_sizes, group_offset, dtype=dtype.name, implementation=implementation)


def _is_default(precision: Any) -> bool:
    """Whether `jax.lax.ragged_dot` takes both operands at the default precision."""
    both = precision if isinstance(precision, tuple) and len(precision) == 2 else (precision,)
    try:
        return all(one is None or jax.lax.Precision(one) is jax.lax.Precision.DEFAULT for one in both)
    except ValueError:  # no name of a precision
        return False


def _packed(array: Any) -> MarlinWeights:
    """A QArray, packed; what `from_qarray` raises, with the argument's name."""
    try:
        return from_qarray(array)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            "rhs is a QArray that is traced, and packing it looks at the values of its zero points or 8-bit scales: "
            "pack it before the traced function, with jax_marlin_moe.from_qarray"
        ) from error
    except (TypeError, ValueError) as error:
        raise type(error)(f"rhs is a QArray that no format holds: {error}") from error


@one_program("dtype", saved_as="ragged_dot")
def _ragged_dot(lhs, rhs, group_sizes, group_offset, *, dtype, implementation):
    rows = lhs
    offset = None if group_offset is None else group_offset.reshape(1)
    experts = None
    if rhs.input_order is not None or rhs.bias is not None:
        experts = row_experts(group_sizes, offset, rows, rhs)
    if rhs.input_order is not None:
        rows = gather_input_order(rows, rhs, experts)
    (y,) = grouped_product_op(
        pad_rows(rows, rhs),
        multiplied(rhs),
        None,
        group_sizes,
        offset,
        transposed=False,
        dtype=dtype if rhs.bias is None else "float32",
        implementation=implementation,
    )
    if rhs.bias is not None:
        y = (y + slot_columns(rhs.bias, experts)).astype(dtype)
    return shard_rows_like(drop_column_padding(y, rhs), lhs)
