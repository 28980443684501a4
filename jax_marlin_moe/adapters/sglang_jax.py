"""`MarlinEPMoE`: in the place of sglang-jax's `EPMoE`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.adapters.names import activation_named
from jax_marlin_moe.flax.nnx import QuantizedParam
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.weights import MarlinWeights


class MarlinEPMoE(nnx.Module):
    """Routed experts behind a router that the model has: `EPMoE.__call__`, with packed weights.

    Tokens that are padding have the experts -1 and come back as zeros.

    Args:
        gate_up: experts (H, 2 I), columns [gate | up].
        down: experts (I, H).
        activation: a name, as sglang-jax or this package spells it.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
    """

    def __init__(
        self,
        gate_up: MarlinWeights,
        down: MarlinWeights,
        *,
        activation: str | Activation = "silu",
        implementation: str | None = None,
    ) -> None:
        self.gate_up, self.down = QuantizedParam(gate_up), QuantizedParam(down)
        self.activation, self.implementation = activation_named(activation), implementation

    def __call__(
        self,
        hidden_states: Float[Array, "tokens H"],
        topk_weights: Float[Array, "tokens top_k"],
        topk_ids: Int[Array, "tokens top_k"],
        *,
        out_sharding: Any = None,
    ) -> Float[Array, "tokens H"]:
        """The weighted sum of the experts of each token.

        Args:
            hidden_states: bfloat16 or float16 rows.
            topk_weights: of the sum.
            topk_ids: the experts of each token, -1 for none.
            out_sharding: must be None.

        Raises:
            ValueError: `out_sharding` is given: rows leave as they came.
        """
        if out_sharding is not None:
            raise ValueError(f"out_sharding is {out_sharding}; it must be None: reshard the result")
        return fused_moe(
            hidden_states,
            self.gate_up.get_value(),
            self.down.get_value(),
            topk_weights.astype(jnp.float32),
            topk_ids.astype(jnp.int32),
            activation=self.activation,
            implementation=self.implementation,
        )
