"""A block whose rows are quantised to 8 bits, as a composition of products of 16 bits."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.block_operands import BlockOperands
from jax_marlin_moe.byte_rows import ByteDtype, dequantize_rows, has_groups, quantize_rows
from jax_marlin_moe.intermediate import KINDS, usable
from jax_marlin_moe.ops.grouped_product import float32_product, multiplied, with_bias
from jax_marlin_moe.rounding import rounded


def _bfloat16_parts(rows):
    """Three numbers of bfloat16 that float32 rows are the sum of."""
    for _ in range(3):
        part = rounded(rows, jnp.bfloat16)
        yield part
        rows = rows - part.astype(jnp.float32)


def composed_of_bytes(
    block: BlockOperands,
    *,
    activation: Activation,
    activation_dtype: ByteDtype,
    implementation: str | None,
    columns_over: tuple[str, ...] = (),
) -> Float32[Array, "tokens padded_n"]:
    """The block whose rows are quantised, of products of 16 bits, which hold every number of 8 bits.

    Along the manual mesh axes `columns_over` devices have other columns of the intermediate dimension: rows between the
    products have the scales of whole rows, and the result is this device's part of the sum.
    """
    gate_up, down, intermediate = block.gate_up, block.down, block.intermediate
    experts = reference.slot_experts(block.topk_ids, block.expert_map, gate_up.num_experts)

    def product(values, scales, weights):
        multiply = partial(float32_product, weights=multiplied(weights), experts=experts, implementation=implementation)
        if has_groups(activation_dtype):
            y = sum(multiply(part) for part in _bfloat16_parts(dequantize_rows(values, scales)))
        else:
            y = multiply(values.astype(block.x.dtype))
            y = y * jnp.repeat(scales, experts.shape[0] // values.shape[0], axis=0) if values.shape[0] else y
        return with_bias(y, weights, experts)

    h = product(*quantize_rows(block.x, activation_dtype, block.x_scale), gate_up)
    a = activation.of_product(h)[:, : down.padded_k]
    if intermediate is None:
        hidden = quantize_rows(rounded(a, block.x.dtype), activation_dtype, columns_over=columns_over)
    else:
        scales = usable(intermediate.scales[jnp.clip(experts, 0, gate_up.num_experts - 1)])[:, None]
        hidden = KINDS[intermediate.kind].apply(a, scales), scales
    y = product(*hidden, down).reshape(*block.topk_ids.shape, down.padded_n)
    kept = jnp.where((experts >= 0).reshape(block.topk_ids.shape), block.topk_weights, 0)
    return (y * kept[..., None]).sum(1)
