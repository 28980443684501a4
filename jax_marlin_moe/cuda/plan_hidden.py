"""The plan of what lies between the two products of a backward pass."""

import jax
import jax.numpy as jnp

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.kernels.hidden_cotangents import hidden_cotangents_kernel
from jax_marlin_moe.cuda.limits import check_counts, check_rows
from jax_marlin_moe.cuda.program import Plan


def plan_hidden_cotangents(
    hidden: jax.Array,
    pulled: jax.Array,
    *,
    num_experts: int,
    biased: bool,
    activation: Activation,
    dtype: jnp.dtype,
    architecture: str,
) -> Plan:
    """Buffers: hidden, pulled, experts, topk_weights, bias or None; d_hidden, which may be hidden, and d_weights."""
    check_rows(hidden, compute_capability(architecture))
    slots = hidden.shape[0]
    check_counts(slots, num_experts, slots)
    kernel = hidden_cotangents_kernel(
        slots,
        hidden.shape[1] // 2,
        pulled.shape[1],
        num_experts,
        activation,
        hidden.dtype,
        dtype,
        hidden=0,
        pulled=1,
        experts=2,
        topk_weights=3,
        bias=4 if biased else None,
        d_hidden=5,
        d_weights=6,
    )
    return Plan((kernel,))
