"""`MarlinMoE` for Flax NNX."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.flax.block import apply_block, check_block, initial_experts, layer_parts
from jax_marlin_moe.flax.serialization import register_states
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.weights import MarlinWeights

register_states()


class QuantizedParam(nnx.Variable[MarlinWeights]):
    """Packed weights: a variable whose value is a `MarlinWeights`.

    Not an `nnx.Param`: optimisers and gradients with `wrt=nnx.Param` do not see it. `nnx.split(layer, nnx.Param,
    QuantizedParam)` tells the two apart.
    """


class MarlinMoE(nnx.Module):
    """A softmax router and the quantised experts behind it.

    `router` is an `nnx.Param`, `gate_up` and `down` are `QuantizedParam`. For inference: the block of experts has no
    differentiation rule, so `nnx.grad` through the layer raises. Many models route in other ways or have more beside
    the experts: build the layer of a checkpoint with `from_layer`, which refuses what there is no place for here.

    Args:
        gate_up: E experts (H, 2 I), columns [gate | up].
        down: E experts (I, H).
        router: float kernel, input dimension first.
        top_k: experts per token.
        renormalize: whether the chosen router weights are divided by their sum.
        activation: as for `jax_marlin_moe.fused_moe`.
        implementation: None (the best that works), "cuda", "cpu" or "xla".

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes disagree, or a name or top_k is out of range.
    """

    def __init__(
        self,
        gate_up: MarlinWeights,
        down: MarlinWeights,
        router: Float[Array, "H E"],
        *,
        top_k: int,
        renormalize: bool = True,
        activation: str | Activation = "silu",
        implementation: str | None = None,
    ) -> None:
        check_block(gate_up, down, router, top_k, activation)
        self.router = nnx.Param(router)
        self.gate_up = QuantizedParam(gate_up)
        self.down = QuantizedParam(down)
        self.top_k = top_k
        self.renormalize = renormalize
        self.activation = activation
        self.implementation = implementation

    @classmethod
    def from_layer(cls, layer: MoELayer, *, implementation: str | None = None) -> "MarlinMoE":
        """A loaded layer that is a softmax router and its experts alone, as in Mixtral, Qwen3 and OLMoE.

        Args:
            layer: of `jax_marlin_moe.checkpoint`.
            implementation: as in the constructor.

        Raises:
            TypeError: `layer` is not a `MoELayer`.
            ValueError: the layer has a bias, groups of experts, a scale, other scores, a shared expert or anything
                else that this class has no place for.
        """
        return cls(**layer_parts(layer), implementation=implementation)

    @classmethod
    def random(
        cls,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        top_k: int,
        rngs: nnx.Rngs,
        weight_format: str = "int4",
        group_size: int | Literal["customary"] | None = "customary",
        dtype: DTypeLike = jnp.bfloat16,
        router_dtype: DTypeLike = jnp.float32,
        activation: str | Activation = "silu",
        **options: Any,
    ) -> "MarlinMoE":
        """A layer with random weights of variance 1 / fan-in, quantised.

        Args:
            num_experts: E.
            hidden: H, a multiple of 64.
            intermediate: I, a multiple of 64.
            top_k: experts per token.
            rngs: its `params` stream is used.
            weight_format: a name of `jax_marlin_moe.FORMATS`.
            group_size: rows that share a scale, as the format allows; None for one group, by default the
                customary size.
            dtype: of the scales, where they are floats.
            router_dtype: of the router's kernel, any float.
            activation: as in the constructor.
            **options: `renormalize` and `implementation`, as in the constructor.

        Raises:
            ValueError: a size does not fit the group size or the tiles of the packing.
        """
        gate_up, down = initial_experts(
            rngs.params(),
            num_experts,
            hidden,
            intermediate,
            activation=activation,
            weight_format=weight_format,
            group_size=group_size,
            dtype=dtype,
        )
        router = jax.random.normal(rngs.params(), (hidden, num_experts), router_dtype) * hidden**-0.5
        return cls(gate_up, down, router, top_k=top_k, activation=activation, **options)

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Routes each row of x to its experts and sums their results.

        Args:
            x: float16 or bfloat16, any leading dimensions.

        Returns:
            An array with the shape and dtype of x.

        Raises:
            TypeError: x has another dtype.
            ValueError: the last dimension is not H, or the implementation cannot run.
        """
        return apply_block(
            x,
            self.router.get_value(),
            self.gate_up.get_value(),
            self.down.get_value(),
            top_k=self.top_k,
            renormalize=self.renormalize,
            activation=self.activation,
            implementation=self.implementation,
        )
