"""Stacks of experts in memory, for the public importers: checks of their arrays, decoding and packing."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_marlin_moe.arguments import check_rank
from jax_marlin_moe.checkpoint.schemes.storage import LogicalLinear
from jax_marlin_moe.formats import FLOAT_SCALES, WeightFormat, get_format
from jax_marlin_moe.packing import assemble, pack_expert
from jax_marlin_moe.weights import MarlinWeights


def pack_stack(
    decode: Callable[..., LogicalLinear],
    tensors: tuple[Any, ...],
    row: WeightFormat,
    k: int,
    n: int,
    group_size: int,
    order: np.ndarray | None = None,
    bias: Array | None = None,
    options: Mapping[str, int] = MappingProxyType({}),
) -> MarlinWeights:
    """Decodes, with the keyword arguments `options`, and packs a stack."""
    parts = _decode_and_pack(tensors, decode, tuple(options.items()), row)
    input_order = None if order is None else jnp.asarray(order)
    return assemble(parts, k, n, row, group_size, bias=bias, input_order=input_order)


# Stacks of one kind and shape share a compilation: options travel as a tuple, which compares by value.
@partial(jax.jit, static_argnames=("decode", "options", "row"))
def _decode_and_pack(tensors: Any, decode: Callable, options: tuple[tuple[str, int], ...], row: WeightFormat) -> Any:
    def one_expert(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
        codes, scales, zeros, global_scale = decode(*leaves, **dict(options))
        return pack_expert(codes, scales, zeros, global_scale, row)

    # Expert by expert: the codes of one matrix, not of all, are in memory.
    return jax.lax.map(one_expert, tensors)


def integer_format(bits: int, *, zeros: bool) -> WeightFormat:
    """The format of integer codes; raises ValueError where they have neither 4 nor 8 bits."""
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    return get_format(f"int{bits}_zp" if zeros else f"int{bits}")


def check_float_scales(name: str, scales: Array, row: WeightFormat) -> None:
    """Raises TypeError or ValueError unless scales [E, ., .] have a dtype that a format has."""
    assert row.scale == FLOAT_SCALES
    if jnp.dtype(scales.dtype).name not in row.scale_dtypes:
        raise TypeError(f"{name} has dtype {scales.dtype}; it must be {' or '.join(row.scale_dtypes)}")
    check_rank(name, scales, 3)


def bit_patterns(name: str, value: Array, dtype: str) -> Array:
    """Bit patterns as uint8 of an array that is that, or has the named 8-bit dtype."""
    found = getattr(value, "dtype", None)
    if found is not None and jnp.dtype(found).name == dtype:
        return value.view(jnp.uint8)
    if found != jnp.uint8:
        raise TypeError(f"{name} has dtype {found}; it must be {dtype}, or uint8 with its bit patterns")
    return value


def refuse_block_scales(name: str, fault: str | None) -> None:
    """Raises ValueError where `bad_block_scales` has found a fault."""
    if fault:
        raise ValueError(f"{name} holds {fault}; every block scale must be a number that is not negative")
