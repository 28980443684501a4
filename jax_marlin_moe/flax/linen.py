"""`MarlinMoE` for Flax Linen."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.flax.block import apply_block, check_block, initial_experts, layer_parts
from jax_marlin_moe.flax.serialization import register_states
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.weights import MarlinWeights

register_states()

QUANTIZED_COLLECTION = "quantized"


class MarlinMoE(nn.Module):
    """A softmax router and the quantised experts behind it.

    The router's kernel is the parameter `params/router`; the experts are `quantized/gate_up` and `quantized/down`,
    each a `MarlinWeights`, in a collection that optimisers over `params` do not see. For inference: the block of
    experts has no differentiation rule, so `jax.grad` through the layer raises. Many models route in other ways or have
    more beside the experts: build the layer of a checkpoint with `from_layer`, which refuses what there is no place for
    here.

    Attributes:
        num_experts: E.
        hidden: H, a multiple of 64.
        intermediate: I, a multiple of 64.
        top_k: experts per token.
        weight_format: a name of `jax_marlin_moe.FORMATS`; used by `init` alone, as are the next three.
        group_size: rows that share a scale, as the format allows; None for one group, by default the
            customary size.
        dtype: of the scales, where they are floats.
        router_dtype: of the router's kernel, any float.
        renormalize: whether the chosen router weights are divided by their sum.
        activation: as for `jax_marlin_moe.fused_moe`.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
    """

    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    weight_format: str = "int4"
    group_size: int | Literal["customary"] | None = "customary"
    dtype: Any = jnp.bfloat16
    router_dtype: Any = jnp.float32
    renormalize: bool = True
    activation: str | Activation = "silu"
    implementation: str | None = None

    @classmethod
    def from_weights(
        cls,
        gate_up: MarlinWeights,
        down: MarlinWeights,
        router: Float[Array, "H E"],
        *,
        top_k: int,
        renormalize: bool = True,
        activation: str | Activation = "silu",
        implementation: str | None = None,
    ) -> tuple["MarlinMoE", dict[str, dict[str, Any]]]:
        """A module and its variables from packed experts.

        Args:
            gate_up: E experts (H, 2 I), columns [gate | up].
            down: E experts (I, H).
            router: float kernel, input dimension first.
            top_k: experts per token.
            renormalize: as the attribute.
            activation: as the attribute.
            implementation: as the attribute.

        Returns:
            The module, and `{"params": ..., "quantized": ...}` for its `apply`.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes disagree, or a name or top_k is out of range.
        """
        check_block(gate_up, down, router, top_k, activation)
        module = cls(
            num_experts=gate_up.num_experts,
            hidden=gate_up.k,
            intermediate=down.k,
            top_k=top_k,
            weight_format=gate_up.format.name,
            group_size=None if gate_up.num_groups == 1 else gate_up.group_size,
            dtype=gate_up.scales.dtype,
            router_dtype=router.dtype,
            renormalize=renormalize,
            activation=activation,
            implementation=implementation,
        )
        experts = {"gate_up": gate_up, "down": down}
        return module, {"params": {"router": router}, QUANTIZED_COLLECTION: experts}

    @classmethod
    def from_layer(
        cls, layer: MoELayer, *, implementation: str | None = None
    ) -> tuple["MarlinMoE", dict[str, dict[str, Any]]]:
        """A loaded layer that is a softmax router and its experts alone, as in Mixtral, Qwen3 and OLMoE.

        Args:
            layer: of `jax_marlin_moe.checkpoint`.
            implementation: as the attribute.

        Returns:
            As `from_weights`.

        Raises:
            TypeError: `layer` is not a `MoELayer`.
            ValueError: the layer has a bias, groups of experts, a scale, other scores, a shared expert or anything
                else that this class has no place for.
        """
        return cls.from_weights(**layer_parts(layer), implementation=implementation)

    @nn.compact
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
        router = self.param(
            "router", nn.initializers.lecun_normal(), (self.hidden, self.num_experts), self.router_dtype
        )
        if self.has_variable(QUANTIZED_COLLECTION, "gate_up"):
            gate_up: MarlinWeights = self.get_variable(QUANTIZED_COLLECTION, "gate_up")
            down: MarlinWeights = self.get_variable(QUANTIZED_COLLECTION, "down")
        else:
            gate_up, down = self._initial_experts()
        return apply_block(
            x,
            router,
            gate_up,
            down,
            top_k=self.top_k,
            renormalize=self.renormalize,
            activation=self.activation,
            implementation=self.implementation,
        )

    def _initial_experts(self) -> tuple[MarlinWeights, MarlinWeights]:
        if not self.is_initializing():
            raise ValueError(
                f"the variables hold no collection {QUANTIZED_COLLECTION!r} for this layer; pass all that `init` or "
                "`from_weights` returned, not `params` alone"
            )
        experts = initial_experts(
            jax.random.fold_in(self.make_rng("params"), 1),
            self.num_experts,
            self.hidden,
            self.intermediate,
            activation=self.activation,
            weight_format=self.weight_format,
            group_size=self.group_size,
            dtype=self.dtype,
        )
        for name, value in zip(("gate_up", "down"), experts, strict=True):
            self.put_variable(QUANTIZED_COLLECTION, name, value)
        return experts
