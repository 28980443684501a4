"""Logical codes and scales into `MarlinWeights`, and back to dense weights.

Every `MarlinWeights` that is not a slice or a join of others is made by `assemble`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from jax_marlin_moe import layout, reference
from jax_marlin_moe.arguments import check_array, check_rank, check_weights
from jax_marlin_moe.formats import WeightFormat, get_format
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding


def pack_logical(
    codes: Shaped[Array, "experts K N"],
    scales: Shaped[Array, "experts groups N"],
    weight_format: str,
    *,
    group_size: int | None = None,
    zeros: Shaped[Array, "experts groups N"] | None = None,
    global_scales: Float32[Array, " experts"] | Float32[Array, "experts N/64"] | None = None,
    bias: Float[Array, "experts N"] | None = None,
) -> MarlinWeights:
    """Packs codes and scales that are already chosen, bit for bit; what every importer ends in.

    Args:
        codes: of any K and N, one byte per code, or uint16 where codes have 16 bits.
        scales: in a dtype that the format allows; bit patterns (e4m3, e8m0) as uint8.
        weight_format: a name of `jax_marlin_moe.FORMATS`.
        group_size: rows of K that share a scale. May be None where the shapes leave no choice: with one group, groups
            that divide K, and formats of one group size.
        zeros: zero points, uint8 or, for float ones, in the dtype of the scales.
        global_scales: float32, one per expert or one per 64 columns (rounded up).
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, the format has no such group size, or the shapes do not determine it.
    """
    row = get_format(weight_format)
    check_array("codes", codes, ndim=3, dtype=row.code.dtype)
    check_rank("scales", scales, 3)
    experts, k, n = codes.shape
    check_stack("scales", scales.shape, (experts, scales.shape[1], n))
    size = resolve_group_size(group_size, k, scales.shape[1], row)
    return assemble(_pack((codes, scales, zeros, global_scales), row), k, n, row, size, bias=bias)


@partial(jax.jit, static_argnames="row")
def _pack(leaves, row: WeightFormat):
    def one_expert(leaf):
        codes, scales, zeros, global_scale = leaf
        return pack_expert(codes, scales, zeros, global_scale, row)

    return jax.lax.map(one_expert, leaves)


def pack_expert(codes, scales, zeros, global_scale, row: WeightFormat):
    """The leaves of one expert in Marlin order, padded to whole tiles; the global scale may be one per 64 columns."""
    k, n = codes.shape
    rows, columns = -k % layout.TILE_K, -n % layout.TILE_N
    groups, blocks = scales.shape[0], (n + columns) // layout.TILE_N
    # Scales of zero make the padding columns zero, whatever their codes; the padding of x does it for rows.
    codes = jnp.pad(codes, ((0, rows), (0, columns)), constant_values=row.zero_point or 0)
    scales = layout.permute_scales(jnp.pad(scales, ((0, 0), (0, columns))))
    if zeros is not None:
        zeros = jnp.pad(zeros, ((0, 0), (0, columns)))
        packs = row.zeros == "integer"
        zeros = layout.pack_zeros(zeros, bits=row.bits) if packs else layout.permute_scales(zeros)
    if global_scale is not None:
        global_scale = jnp.broadcast_to(jnp.asarray(global_scale, jnp.float32), (blocks,))
    assert scales.shape == (groups, n + columns)
    return layout.pack(codes, bits=row.bits), scales, zeros, global_scale


def assemble(
    leaves: tuple[Any, ...],
    k: int,
    n: int,
    row: WeightFormat,
    group_size: int,
    *,
    name: str = "weights",
    bias: Array | None = None,
    input_order: Array | None = None,
    parts: int = 1,
) -> MarlinWeights:
    """`MarlinWeights` of equal matrices (k, n) side by side, from the stacked leaves of `pack_expert`.

    Args:
        leaves: packed, scales, zeros and global scales of all parts, each joined along its columns.
        k: rows, without padding.
        n: columns of one part, without padding.
        row: the format.
        group_size: rows that share a scale; any number from k on where one scale covers all of them.
        name: of the weights, for errors.
        bias: [experts, parts * n], or None.
        input_order: as in `MarlinWeights`.
        parts: how many matrices are side by side.

    Raises:
        TypeError, ValueError: what makes up the weights does not fit together.
    """
    packed, scales, zeros, global_scales = leaves
    rows, columns = -k % layout.TILE_K, -n % layout.TILE_N
    if bias is not None:
        check_rank("bias", bias, 2)
        check_stack("bias", bias.shape, (packed.shape[0], parts * n))
        each = jnp.asarray(bias).astype(jnp.float32).reshape(-1, parts, n)
        bias = jnp.pad(each, ((0, 0), (0, 0), (0, columns))).reshape(each.shape[0], -1)
    weights = MarlinWeights(
        packed=packed,
        scales=scales,
        zeros=zeros,
        bias=bias,
        input_order=input_order,
        format=row,
        group_size=min(group_size, k),
        global_scales=global_scales,
        row_padding=rows,
        column_padding=(columns,) * parts if columns else (),
    )
    check_weights(name, weights)
    return weights


@jax.jit
def dequantize(weights: MarlinWeights) -> Float32[Array, "*experts K N"]:
    """The weights in float32, without padding; rows in the order of the packing, which `input_order` names."""
    return drop_column_padding(reference.dequantize(weights)[..., : weights.k, :], weights)


def dense_weights(weights: MarlinWeights) -> Float32[Array, "experts K N"]:
    """The weights in float32, without padding, with rows in the order of the columns of x."""
    dense = dequantize(weights)
    if weights.input_order is None:
        return dense
    inverse = jnp.argsort(weights.input_order, axis=1)
    return jnp.take_along_axis(dense, inverse[:, :, None], axis=1)


def fold_input_order(gate_up: MarlinWeights, down: MarlinWeights) -> tuple[MarlinWeights, MarlinWeights]:
    """Moves the row order of `down` into the columns of `gate_up`, where it costs nothing.

    The i-th input of down's packed rows is intermediate column `down.input_order[e, i]`, so gate and up columns are
    permuted alike, expert by expert, and down reads them in sequence.

    Args:
        gate_up: columns [gate | up], or of one matrix where the activation is not gated.
        down: with `input_order` set; without, both are returned as they are.

    Returns:
        Both matrices, the second without an order.

    Raises:
        TypeError: an argument is not `MarlinWeights`.
        ValueError: the matrices are not those of one block, or gate_up has global scales, which a new order of columns
            would mix.
    """
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    if down.input_order is None:
        return gate_up, down
    halves = 1 if gate_up.n == down.k else 2
    if gate_up.n != halves * down.k:
        raise ValueError(
            f"gate_up has N = {gate_up.n} columns; it must be 2 * K of down = {2 * down.k}, or K where not gated"
        )
    if gate_up.global_scales is not None:
        raise ValueError(
            "gate_up.global_scales is not None: they belong to blocks of 64 columns, which the row order of down would "
            "break up; quantise down without one"
        )
    width = gate_up.padded_n // halves
    padding = jnp.broadcast_to(jnp.arange(down.k, width), (down.num_experts, width - down.k))
    one_half = jnp.concatenate([down.input_order, padding], axis=1)
    columns = jnp.concatenate([one_half + width * half for half in range(halves)], axis=1)  # [E, padded_n]
    row = gate_up.format

    def permuted(scales: Array, order: Array) -> Array:
        return layout.permute_scales(layout.unpermute_scales(scales)[:, order])

    def one_expert(arrays):
        packed, scales, zeros, bias, order = arrays
        if row.zeros == "integer":
            zeros = layout.pack_zeros(layout.unpack_zeros(zeros, bits=row.bits)[:, order], bits=row.bits)
        elif row.zeros == "float":
            zeros = permuted(zeros, order)
        return (
            layout.pack(layout.unpack(packed, bits=row.bits)[:, order], bits=row.bits),
            permuted(scales, order),
            zeros,
            None if bias is None else bias[order],
        )

    arrays = (gate_up.packed, gate_up.scales, gate_up.zeros, gate_up.bias, columns)
    packed, scales, zeros, bias = jax.lax.map(one_expert, arrays)
    gate_up = dataclasses.replace(gate_up, packed=packed, scales=scales, zeros=zeros, bias=bias)
    return gate_up, dataclasses.replace(down, input_order=None)


def check_stack(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError where a stack of tensors does not have the shape that the others ask for."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}; with the other tensors it must be {expected}")


def check_group_size(name: str, group_size: int | None, k: int, row: WeightFormat) -> None:
    """Raises unless the format has such groups over K rows: TypeError on no integer; None is one group."""
    if group_size is not None and (not isinstance(group_size, int) or isinstance(group_size, bool)):
        raise TypeError(f"{name} is {group_size!r}; it must be an int, None for one group, or 'customary'")
    if group_size is None or group_size == k:
        allowed = row.per_channel or group_size in row.group_sizes
    else:
        allowed = group_size in row.group_sizes
    if not allowed:
        one_group = "None (one group) or " if row.per_channel else ""
        raise ValueError(f"{name} is {group_size}; format {row.name} takes {one_group}one of {row.group_sizes}")


def resolve_group_size(group_size: int | None, k: int, groups: int, row: WeightFormat) -> int:
    """Rows under one scale of a stack with `groups` groups, K for one; None where they divide K or the format has one.

    Raises:
        ValueError: the format has no such groups, `groups` is another number, or nothing determines the size.
    """
    if group_size is None and groups == 1:
        group_size = k
    if group_size is None and len(row.group_sizes) == 1:
        group_size = row.group_sizes[0]
    if group_size is None:
        if groups < 1 or k % groups:
            raise ValueError(
                f"group_size is None, and {groups} groups over K = {k} do not determine it; pass the rows of K that "
                "share a scale"
            )
        group_size = k // groups
    if not (groups == 1 and group_size >= k and (row.per_channel or k <= max(row.group_sizes))):
        check_group_size("group_size", group_size, k, row)
    if groups != -(-k // group_size):
        raise ValueError(
            f"scales has {groups} groups over K = {k}; group_size {group_size} makes {-(-k // group_size)}"
        )
    return group_size
