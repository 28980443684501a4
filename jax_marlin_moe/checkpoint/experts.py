"""From the experts of a checkpoint, read one by one, to the packed matrices of a layer.

A naming family says where each expert's linears are (`Linear`), a quantisation scheme turns one of them into logical
codes (`LogicalMatrix`), and `pack_experts` packs them expert by expert into arrays of their final size: at no time is
more than one expert unpacked.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, Shaped, UInt8

from jax_marlin_moe.formats import WeightFormat, get_format
from jax_marlin_moe.layout import TILE_K
from jax_marlin_moe.ops.arguments import check_weights
from jax_marlin_moe.quantize import pack_expert
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class Linear:
    """Where the tensors of one expert's linear, of shape (K, N), lie.

    Attributes:
        module: what the names of its tensors begin with; `name("scales")` is the whole name of one.
        expert: its index along the first axis of tensors that stack all experts; None where it has tensors of its own.
        features: the output features that are its own, of those that the tensors hold: all of them, every other one
            where gate and up are interleaved, a half where they stand side by side.
        separator: between the module and the name of a tensor.
        transposed: whether plain weights are stored [in, out] rather than [out, in].
    """

    module: str
    expert: int | None = None
    features: slice = slice(None)
    separator: str = "."
    transposed: bool = False

    def name(self, tensor: str) -> str:
        """The whole name of one of its tensors; the plain name "" is the module itself."""
        return f"{self.module}{self.separator}{tensor}" if tensor else self.module


@dataclasses.dataclass(frozen=True)
class LogicalMatrix:
    """One expert's quantised matrix, as numbers rather than as words.

    Attributes:
        format: the row of the format registry.
        codes: one byte a code; rows in the order of the groups where `input_order` is given.
        scales: in a dtype that the format allows; bit patterns (e4m3, e8m0) as uint8.
        zeros: zero points, uint8 or, for float ones, in the dtype of the scales.
        global_scale: float32, for formats that have one.
        bias: added after scaling.
        input_order: row k of `codes` multiplies `x[input_order[k]]`; None is the identity.
    """

    format: WeightFormat
    codes: UInt8[np.ndarray, "K N"]
    scales: Shaped[np.ndarray, "groups N"]
    zeros: Shaped[np.ndarray, "groups N"] | None = None
    global_scale: float | None = None
    bias: Float[np.ndarray, "N"] | None = None
    input_order: Int32[np.ndarray, "K"] | None = None


def pack_experts(
    read: Callable[[int, int], LogicalMatrix], num_experts: int, parts: int, advance: Callable[[], None] = lambda: None
) -> MarlinWeights:
    """Packs a stack of experts, each of one matrix or of several with equal shapes side by side ([gate | up]).

    Args:
        read: (expert, part) to the matrix; called in order, each once.
        num_experts: E.
        parts: matrices of an expert that stand side by side.
        advance: called after each matrix.

    Returns:
        The packed experts on JAX's default device.

    Raises:
        ValueError: experts or parts differ in format, shape, group size, or in having zero points, biases or a row
            order; the parts of one expert differ in their row order.
    """
    stack: _Stack | None = None
    for expert in range(num_experts):
        for part in range(parts):
            matrix = read(expert, part)
            if stack is None:
                stack = _Stack(matrix, num_experts, parts)
            stack.put(expert, part, matrix)
            advance()
    assert stack is not None, "a layer has experts"
    return stack.weights()


# Zero points that all equal the baked one of a simpler format: the same matrices in fewer bytes.
_BAKED = {"int4_zp": "int4", "int8_zp": "int8"}


class _Stack:
    """The arrays of a layer's matrix, filled expert by expert."""

    def __init__(self, first: LogicalMatrix, num_experts: int, parts: int) -> None:
        self.first, self.parts = first, parts
        self.n = first.codes.shape[1]
        leaves = _pack_one(first)
        # Columns of the parts stand side by side: the last axis of every leaf grows by their number.
        self.leaves = [
            None if leaf is None else np.empty((num_experts, *leaf.shape[:-1], parts * leaf.shape[-1]), leaf.dtype)
            for leaf in leaves
        ]
        columns = leaves[1].shape[-1]
        self.bias = None if first.bias is None else np.zeros((num_experts, parts * columns), np.float32)
        order = first.input_order
        self.input_order = None if order is None else np.empty((num_experts, order.size), np.int32)
        baked = _BAKED.get(first.format.name)
        self.baked = None if baked is None else get_format(baked)  # until a zero point differs

    def put(self, expert: int, part: int, matrix: LogicalMatrix) -> None:
        first = self.first
        for what, ours, theirs in (
            ("format", first.format.name, matrix.format.name),
            ("shape", first.codes.shape, matrix.codes.shape),
            ("shape of scales", first.scales.shape, matrix.scales.shape),
            ("dtype of scales", first.scales.dtype, matrix.scales.dtype),
            ("bias", first.bias is None, matrix.bias is None),
            ("row order", first.input_order is None, matrix.input_order is None),
        ):
            if ours != theirs:
                raise ValueError(f"expert {expert} differs from expert 0 in its {what}: {theirs}, not {ours}")
        for stacked, leaf in zip(self.leaves, _pack_one(matrix), strict=True):
            if stacked is not None:
                width = leaf.shape[-1]
                stacked[expert, ..., part * width : (part + 1) * width] = leaf
        if self.baked is not None and (matrix.zeros != self.baked.zero_point).any():
            self.baked = None
        if self.bias is not None:
            start = part * self.bias.shape[1] // self.parts
            self.bias[expert, start : start + self.n] = matrix.bias
        if self.input_order is not None:
            if part > 0 and not np.array_equal(self.input_order[expert], matrix.input_order):
                raise ValueError(
                    f"gate and up of expert {expert} read their input in different orders (g_idx); they must agree"
                )
            self.input_order[expert] = matrix.input_order

    def weights(self) -> MarlinWeights:
        packed, scales, zeros, global_scales = (None if a is None else jnp.asarray(a) for a in self.leaves)
        k, padded_n = self.first.codes.shape[0], scales.shape[-1] // self.parts
        weights = MarlinWeights(
            packed,
            scales,
            None if self.baked is not None else zeros,
            None if self.bias is None else jnp.asarray(self.bias),
            None if self.input_order is None else jnp.asarray(self.input_order),
            self.baked or self.first.format,
            global_scales=global_scales,
            row_padding=packed.shape[1] * TILE_K - k,
            column_padding=(padded_n - self.n,) * self.parts if padded_n > self.n else (),
        )
        check_weights("weights", weights)
        return weights


_pack_leaves = jax.jit(pack_expert, static_argnames="row")


def _pack_one(matrix: LogicalMatrix) -> list[np.ndarray | None]:
    """The packed leaves of one matrix, made by the CPU where JAX has one: a layer may be larger than a card."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        leaves = _pack_leaves(matrix.codes, matrix.scales, matrix.zeros, matrix.global_scale, matrix.format)
    return [None if leaf is None else np.asarray(leaf) for leaf in leaves]
