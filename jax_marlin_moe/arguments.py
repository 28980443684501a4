"""Checks of arguments that more than one function takes. Each names the argument, what it was and what it must be."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.formats import ACTIVATION_DTYPES, FORMATS
from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.weights import MarlinWeights

BLOCK_SIZES = (8, 16, 32, 48, 64, 128, 256)


def check_array(name: str, value: jax.Array, *, ndim: int, dtype: DTypeLike) -> None:
    """Raises TypeError on another dtype, ValueError on another rank."""
    if not hasattr(value, "dtype") or value.dtype != jnp.dtype(dtype):
        found = getattr(value, "dtype", type(value).__name__)
        wanted = jnp.dtype(dtype).name
        article = "an" if wanted.startswith("int") else "a"
        raise TypeError(
            f"{name} has dtype {found}; it must be {article} {wanted} array, as jnp.asarray(..., jnp.{wanted}) makes it"
        )
    check_rank(name, value, ndim)


def as_dtype(name: str, value: Any) -> jnp.dtype:
    """The dtype that an argument names; TypeError where it names none."""
    try:
        return jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a dtype, as jnp.float32 or its name") from None


def as_number(name: str, value: Any) -> float:
    """A real number that is known, as a float; TypeError on anything else, text and booleans among it."""
    if isinstance(value, str | bytes | bool | np.bool_ | jax.core.Tracer) or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name} is {value!r}; it must be a number that is known when the call is traced")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; it must be a number") from None


def check_rank(name: str, value: jax.Array, ndim: int) -> None:
    """Raises ValueError on another rank, TypeError on what is no array."""
    _check_is_array(name, value)
    if value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {ndim} dimensions")


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError on another shape, TypeError on what is no array; `meaning` spells the shape in words."""
    _check_is_array(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {meaning} = {tuple(shape)}")


def _check_is_array(name: str, value: Any) -> None:
    if not hasattr(value, "shape"):
        raise TypeError(f"{name} has type {type(value).__name__}; it must be an array: make it one with jnp.asarray")


def as_rows(name: str, x: jax.Array, preferred_element_type: DTypeLike | None = None) -> tuple[jax.Array, jnp.dtype]:
    """The values of `x` as the products read them, float32 ones rounded to bfloat16, and the type of the result.

    Raises TypeError on other types of x, and on results in another type than float32 or that of the products' rows.
    """
    if not hasattr(x, "dtype") or jnp.dtype(x.dtype) not in (*ACTIVATION_DTYPES, jnp.dtype(jnp.float32)):
        found = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{name} has dtype {found}; it must be bfloat16, float16 or float32: cast it before the call")
    rows = x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
    return rows, as_result_type(name, x, rows.dtype, x.dtype, preferred_element_type)


def as_result_type(
    name: str, x: jax.Array, rounded: DTypeLike, default: DTypeLike, preferred_element_type: DTypeLike | None
) -> jnp.dtype:
    """The type of the result for rows `x`: `rounded`, float32, or else TypeError."""
    wanted = as_dtype("preferred_element_type", default if preferred_element_type is None else preferred_element_type)
    if wanted not in (jnp.dtype(rounded), jnp.dtype(jnp.float32)):
        raise TypeError(
            f"preferred_element_type is {wanted}; for {name} of dtype {x.dtype} it must be {jnp.dtype(rounded)} or "
            "float32: cast the result"
        )
    return wanted


def has_batch(x: jax.Array) -> bool:
    """Whether the rows of `x` have leading dimensions beside that of the rows."""
    return getattr(x, "ndim", 0) > 2


def batch_rows(name: str, value: jax.Array, x: jax.Array) -> jax.Array:
    """`value`, whose leading dimensions are those of x, with a row for each row of x; ValueError where they differ."""
    found = tuple(getattr(value, "shape", ()))
    if found[:-1] != tuple(x.shape[:-1]):
        raise ValueError(f"{name} has shape {found}; x has shape {tuple(x.shape)}, and all but the last must be alike")
    return value.reshape(math.prod(found[:-1]), found[-1])


def over_batches(
    call: Callable[[jax.Array, MarlinWeights, jax.Array], Any],
    rows: tuple[str, jax.Array],
    weights: MarlinWeights,
    table: tuple[str, jax.Array],
    table_rank: int = 1,
) -> Any:
    """What `call(rows, weights, table)` makes of each element of the leading dimensions of named rows and their table.

    Raises ValueError where the leading dimensions differ, TypeError on a table of another type than int32.
    """
    (rows_name, x), (name, value) = rows, table
    check_array(name, value, ndim=x.ndim - 2 + table_rank, dtype=jnp.int32)
    if value.shape[:-table_rank] != x.shape[:-2]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; {rows_name} has shape {tuple(x.shape)}, and their leading "
            "dimensions must be alike"
        )

    def each(x: jax.Array, value: jax.Array) -> Any:
        return call(x, weights, value)

    for _ in x.shape[:-2]:
        each = jax.vmap(each)
    return each(x, value)


def as_router_weights(name: str, value: jax.Array) -> jax.Array:
    """Router weights in float32; TypeError unless they are floats."""
    if not hasattr(value, "dtype") or value.dtype not in (*ACTIVATION_DTYPES, jnp.dtype(jnp.float32)):
        found = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name} has dtype {found}; it must be a float32 array, or float16 or bfloat16")
    return value.astype(jnp.float32)


def check_weights(name: str, weights: MarlinWeights) -> None:
    """Raises unless `weights` is a consistent stack of packed experts for 16-bit activations."""
    if not isinstance(weights, MarlinWeights):
        raise TypeError(
            f"{name} has type {type(weights).__name__}; it must be a MarlinWeights: pack dense weights with "
            "jax_marlin_moe.quantize, or a checkpoint's with jax_marlin_moe.checkpoint"
        )
    if weights.layout not in ("a16", f"a16/{weights.padded_n}"):
        of_ranks = weights.layout.startswith("a16/")
        raise ValueError(
            f"{name}.layout is {weights.layout!r}, with {weights.padded_n} columns; "
            + (
                f"its columns are those of several ranks, {weights.layout.removeprefix('a16/')} each: call it with "
                "fused_moe, moe_layer or jax_marlin_moe.sharding.parallel_layer, or a rank's share in jax.shard_map"
                if of_ranks
                else "this op needs 'a16' (16-bit activations): repack from the source"
            )
        )
    fmt = weights.format
    if FORMATS.get(fmt.name) != fmt:
        raise ValueError(f"{name}.format is {fmt}; it must be a row of jax_marlin_moe.formats.FORMATS")
    check_array(f"{name}.packed", weights.packed, ndim=3, dtype=jnp.int32)
    experts, k, n = weights.num_experts, weights.padded_k, weights.padded_n
    if k < TILE_K or n < TILE_N or n % TILE_N:
        raise ValueError(f"{name} is packed as (K, N) = ({k}, {n}); K must be a multiple of {TILE_K} and N of {TILE_N}")
    parts = weights.column_padding or (0,)
    if not 0 <= weights.row_padding < k or not all(0 <= padding < n // len(parts) for padding in parts):
        raise ValueError(
            f"{name} has row_padding {weights.row_padding} and column_padding {weights.column_padding}, which do not "
            f"fit its packed (K, N) = ({k}, {n})"
        )
    _check_scales(name, weights)
    if weights.bias is not None:
        check_array(f"{name}.bias", weights.bias, ndim=2, dtype=jnp.float32)
        check_shape(f"{name}.bias", weights.bias, (experts, n), "(E, N)")
    if weights.input_order is not None:
        check_array(f"{name}.input_order", weights.input_order, ndim=2, dtype=jnp.int32)
        check_shape(f"{name}.input_order", weights.input_order, (experts, weights.k), "(E, K)")


def _check_scales(name: str, weights: MarlinWeights) -> None:
    """Scales, zero points and global scales against the format and the packed shape."""
    fmt, experts, k, n = weights.format, weights.num_experts, weights.padded_k, weights.padded_n
    if jnp.dtype(weights.scales.dtype).name not in fmt.scale_dtypes:
        raise TypeError(
            f"{name}.scales has dtype {weights.scales.dtype}; format {fmt.name} takes {' or '.join(fmt.scale_dtypes)}"
        )
    check_rank(f"{name}.scales", weights.scales, 3)
    groups = weights.num_groups
    check_shape(f"{name}.scales", weights.scales, (experts, groups, n), "(E, groups, N)")
    size = weights.group_size
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name}.group_size is {size!r}; it must be an integer")
    one_group = groups == 1 and (fmt.per_channel or k <= max(fmt.group_sizes))
    allowed = f"one of {fmt.group_sizes}" + (" or K" if fmt.per_channel else "")
    if not (size in fmt.group_sizes or (one_group and size >= weights.k)):
        raise ValueError(
            f"{name}.group_size is {size}, with {groups} groups over K = {k}; the group size must be {allowed}"
        )
    if groups != -(-weights.k // size):
        raise ValueError(
            f"{name}.scales has {groups} groups over K = {k}; {name}.group_size is {size}, which makes "
            f"{-(-weights.k // size)}; it must be {allowed}"
        )
    for leaf, wanted in (("zeros", fmt.zeros is not None), ("global_scales", fmt.has_global_scales)):
        value = getattr(weights, leaf)
        if wanted != (value is not None):
            verb = "needs" if wanted else "takes no"
            raise ValueError(f"{name}.{leaf} is {'' if value is None else 'not '}None; {fmt.name} {verb} {leaf}")
    if weights.zeros is not None and fmt.zeros == "integer":
        check_array(f"{name}.zeros", weights.zeros, ndim=3, dtype=jnp.int32)
        check_shape(f"{name}.zeros", weights.zeros, (experts, groups, n // fmt.codes_per_word), "(E, groups, N / pf)")
    elif weights.zeros is not None:
        check_array(f"{name}.zeros", weights.zeros, ndim=3, dtype=weights.scales.dtype)
        check_shape(f"{name}.zeros", weights.zeros, (experts, groups, n), "(E, groups, N)")
    if weights.global_scales is not None:
        check_array(f"{name}.global_scales", weights.global_scales, ndim=2, dtype=jnp.float32)
        check_shape(f"{name}.global_scales", weights.global_scales, (experts, n // TILE_N), "(E, N / 64)")


def check_block_size(block_size: int) -> None:
    """Raises unless `block_size` is one that the alignment offers."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; it must be one of {BLOCK_SIZES}")


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises unless 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must lie in [1, {num_experts}], the number of experts")


def check_expert_map(expert_map: jax.Array | None, experts: int) -> None:
    """Raises unless `expert_map` is None or a vector of int32 of experts, each once, or -1, where it is known.

    Values of a traced map, and of one that other processes have parts of, are not known: those past the last expert are
    experts that live elsewhere, too.
    """
    if expert_map is None:
        return
    check_array("expert_map", expert_map, ndim=1, dtype=jnp.int32)
    if isinstance(expert_map, jax.core.Tracer) or not getattr(expert_map, "is_fully_addressable", True):
        return
    values = np.asarray(expert_map)
    outside = np.flatnonzero((values < -1) | (values >= experts))
    if outside.size:
        raise ValueError(
            f"expert_map[{outside[0]}] is {values[outside[0]]}; it must be one of the {experts} experts here, in "
            f"[0, {experts}), or -1 for an expert that lives elsewhere"
        )
    places, counts = np.unique(values[values >= 0], return_counts=True)
    if (counts > 1).any():
        first, second = np.flatnonzero(values == places[counts > 1][0])[:2]
        raise ValueError(
            f"expert_map[{first}] and expert_map[{second}] are both {values[first]}; an expert here must be one of "
            "all. For experts in several places, use jax_marlin_moe.sharding.place_experts"
        )
