"""The arguments of expert blocks, alone and within layers, checked. Errors name the argument and what it must be."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from jax_marlin_moe import arguments
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import GROUP, ByteDtype, has_groups, scales_whole_rows
from jax_marlin_moe.intermediate import IntermediateQuantizer, check_kind, check_positive
from jax_marlin_moe.layout import TILE_N
from jax_marlin_moe.ops.shares import count_shares, split_block
from jax_marlin_moe.weights import MarlinWeights

FP8_ROWS = jnp.bfloat16  # as what the kernels read float8_e4m3fn: it holds every value
# By `activation_dtype`, the kind of `intermediate` with fixed scales of the rows between the products.
_KIND_OF_ROWS = {"float8_e4m3fn": "static_fp8", "int8": "static_int8"}


def check_experts(x: jax.Array, gate_up: MarlinWeights, down: MarlinWeights, act: Activation, within: str = "") -> None:
    """Raises TypeError or ValueError unless the matrices are those of one block, for rows like x.

    `within` is what comes before their names in messages.
    """
    first, second = f"{within}gate_up", f"{within}down"
    shares = count_shares(gate_up)
    if shares > 1 and isinstance(down, MarlinWeights):
        gate_up, down = jax.eval_shape(partial(split_block, shares=shares), gate_up, down)
    arguments.check_weights(first, gate_up)
    arguments.check_weights(second, down)
    arguments.check_shape("x", x, (x.shape[0], gate_up.k), "(tokens, H)")
    halves = act.halves
    if gate_up.n != halves * down.k:
        raise ValueError(
            f"{first} has N = {gate_up.n} columns and {second} K = {down.k} rows; activation "
            f"{act.name!r} needs N = {halves} * K"
        )
    if gate_up.padded_n % (halves * TILE_N) or len(gate_up.column_padding or halves * (0,)) != halves:
        raise ValueError(
            f"{first} has {gate_up.padded_n} columns, with column_padding = {gate_up.column_padding}; the block needs "
            f"gate and up in whole tiles of {TILE_N} columns each: pack them one by one and join them with "
            "jax_marlin_moe.concatenate_columns"
        )
    if down.n != gate_up.k:
        raise ValueError(f"{second} has N = {down.n} columns; it must be H = {gate_up.k}")
    if down.num_experts != gate_up.num_experts:
        raise ValueError(
            f"{second} has {down.num_experts} experts; it must have as many as gate_up: {gate_up.num_experts}"
        )
    if down.input_order is not None:
        raise ValueError(
            f"{second}.input_order is not None; fold it into the columns of gate_up first, with "
            "jax_marlin_moe.fold_input_order(gate_up, down)"
        )


def as_block_rows(
    x: jax.Array, x_scale: Any, preferred_element_type: DTypeLike | None, activation_dtype: ByteDtype | None
) -> tuple[jax.Array, Float32[Array, ""] | None, jnp.dtype]:
    """The rows of a block as its products read them, their scale and the dtype of the result.

    Raises TypeError or ValueError where the arguments do not go together.
    """
    is_fp8 = hasattr(x, "dtype") and x.dtype == jnp.float8_e4m3fn
    if is_fp8:
        if activation_dtype is not None:
            raise ValueError(
                f"activation_dtype is {activation_dtype!r} and x has dtype float8_e4m3fn; x must have 16 bits, which "
                "the call quantises, or activation_dtype be None"
            )
        arguments.check_rank("x", x, 2)
        if x_scale is None:
            raise ValueError(
                "x_scale is None; x has dtype float8_e4m3fn, whose values are in units of it: pass a float32"
            )
        dtype = arguments.as_result_type("x", x, FP8_ROWS, jnp.float32, preferred_element_type)
    else:
        rows, dtype = arguments.as_rows("x", x, preferred_element_type)
        if x_scale is not None and activation_dtype is None:
            raise ValueError(
                f"x_scale is not None, but x has dtype {x.dtype}; it must be None, or x float8_e4m3fn: multiply x by it"
            )
        x = rows
        arguments.check_rank("x", x, 2)
    return x, None if x_scale is None else as_scale(x_scale), dtype


def as_scale(x_scale: Any) -> Float32[Array, ""]:
    """A scale of rows as an array.

    Raises:
        TypeError: it is not float32.
        ValueError: it is not one number; or it is a number of Python or NumPy that is not positive and finite. The
            values of arrays are not checked.
    """
    if isinstance(x_scale, int | float | np.generic):
        check_positive("x_scale", np.asarray(x_scale, np.float32))
        x_scale = jnp.float32(x_scale)
    arguments.check_array("x_scale", x_scale, ndim=0, dtype=jnp.float32)
    return x_scale


def check_intermediate(intermediate: Any, num_experts: int) -> None:
    """Raises TypeError or ValueError unless it is a quantiser for that many experts."""
    if not isinstance(intermediate, IntermediateQuantizer):
        raise TypeError(
            f"intermediate has type {type(intermediate).__name__}; it must be made by "
            "jax_marlin_moe.IntermediateQuantizer.static_fp8, .static_int8 or .dynamic_nvfp4"
        )
    check_kind("intermediate.kind", intermediate.kind)
    scales = intermediate.scales
    arguments.check_array("intermediate.scales", scales, ndim=scales.ndim and 1, dtype=jnp.float32)
    if scales.ndim:
        arguments.check_shape("intermediate.scales", scales, (num_experts,), "(experts,)")


def check_fixed_scales(
    activation_dtype: ByteDtype | None, x_scale: Any, intermediate: IntermediateQuantizer | None
) -> None:
    """Raises ValueError where fixed scales do not go with what rows are quantised to."""
    if activation_dtype is not None and activation_dtype not in _KIND_OF_ROWS:
        for name, value in (("x_scale", x_scale), ("intermediate", intermediate)):
            if value is not None:
                raise ValueError(
                    f"activation_dtype is {activation_dtype!r} and {name} is not None; it must be None: only rows "
                    f"of {' and '.join(map(repr, _KIND_OF_ROWS))} have fixed scales"
                )
    if intermediate is None:
        return
    kind, found = intermediate.kind, f"activation_dtype is {activation_dtype!r} and intermediate.kind "
    if activation_dtype is None and kind == "static_int8":
        raise ValueError(
            f"{found}{kind!r}; it must be 'static_fp8' or 'dynamic_nvfp4', or pass activation_dtype='int8'"
        )
    if activation_dtype is not None and kind != _KIND_OF_ROWS[activation_dtype]:
        raise ValueError(
            f"{found}{kind!r}; it must be {_KIND_OF_ROWS[activation_dtype]!r}, or intermediate None: both say how rows "
            "are quantised"
        )


def check_rows_in_shares(
    gate_up: MarlinWeights,
    shares: int,
    activation: Activation,
    activation_dtype: ByteDtype | None,
    intermediate: IntermediateQuantizer | None,
) -> None:
    """Raises ValueError unless shares of the matrices give rows between the products the scales of whole ones."""
    if scales_whole_rows(activation_dtype, intermediate):
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}, intermediate is None and gate_up is laid out for {shares} "
            "ranks; each row between the products has one scale, which follows from columns of all ranks: call "
            "jax_marlin_moe.sharding.parallel_layer, or parallel_experts, whose ranks find it together; or pass fixed "
            "scales, 'float8_e4m3fn_g128', or matrices that are not laid out"
        )
    _check_groups(gate_up.padded_n // shares // activation.halves, activation_dtype)


def check_groups_of_rank(gate_up: MarlinWeights, activation: Activation, activation_dtype: ByteDtype | None) -> None:
    """Raises ValueError unless groups of scales divide one rank's columns of the intermediate dimension."""
    _check_groups(gate_up.padded_n // activation.halves, activation_dtype)


def _check_groups(columns: int, activation_dtype: ByteDtype | None) -> None:
    if has_groups(activation_dtype) and columns % GROUP:
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}, and each rank has {columns} columns of the intermediate "
            f"dimension; it must have a multiple of {GROUP}, which share a scale: cut it for fewer ranks, or pass "
            "'float8_e4m3fn'"
        )
