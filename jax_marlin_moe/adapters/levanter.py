"""`moe_mlp`: in the manner of levanter's function of that name."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.adapters.names import activation_named
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.weights import MarlinWeights


def moe_mlp(
    x: Float[Array, "tokens D"],
    selected_experts: Int[Array, "tokens top_k"],
    combine_weights: Float[Array, "tokens top_k"],
    w_up_gate: MarlinWeights,
    w_down: MarlinWeights,
    *,
    activation: str | Activation | enum.Enum | Callable[[Array], Array] = jax.nn.silu,
    implementation: str | None = None,
    mesh: Any = None,
    capacity_factor: float | None = None,
    remat_mode: Any = "none",
    report_capacity_overflow: bool = False,
    token_valid: Bool[Array, " tokens"] | None = None,
) -> Float[Array, "tokens D"] | tuple[Float[Array, "tokens D"], Int[Array, ""]]:
    """Chosen experts of each token, combined. No token is dropped for want of capacity.

    `mesh`, `capacity_factor` and `remat_mode` are for levanter's own exchanges of rows and change nothing here: experts
    are computed on the devices that they are on, and a call keeps nothing but its inputs for the backward pass.

    Args:
        x: bfloat16 or float16 rows; rows of another float are multiplied as bfloat16, and the results cast back.
        selected_experts: their experts.
        combine_weights: of the sum.
        w_up_gate: packed experts (D, 2 I), gate in the first half of the columns, as this package has it.
        w_down: packed experts (I, D).
        activation: of gate: a name, a member of levanter's enumeration, or a function of jax.nn.
        implementation: as for `jax_marlin_moe.fused_moe`.
        mesh: see above.
        capacity_factor: see above.
        remat_mode: see above.
        report_capacity_overflow: whether the number of dropped choices, which is zero, is returned too.
        token_valid: False for tokens that are padding, whose results are zeros.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: shapes disagree, or the activation is not known.
    """
    ids = selected_experts.astype(jnp.int32)
    if token_valid is not None:
        ids = jnp.where(token_valid[:, None], ids, -1)
    rows = x if x.dtype in (jnp.bfloat16, jnp.float16) else x.astype(jnp.bfloat16)
    y = fused_moe(
        rows,
        w_up_gate,
        w_down,
        combine_weights.astype(jnp.float32),
        ids,
        activation=activation_named(activation),
        implementation=implementation,
    )
    y = y.astype(x.dtype)
    return (y, jnp.zeros((), jnp.int32)) if report_capacity_overflow else y
