"""`MarlinMoE` for Flax NNX."""

import os
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.checkpoint import load_moe_layer
from jax_marlin_moe.flax.parts import (
    PARAMS,
    QUANTIZED,
    ROUTING,
    Layer,
    checked,
    expert_axes,
    kind_of,
    layer_of,
    one_layer,
    parts_of,
    random_layer,
)
from jax_marlin_moe.flax.serialization import register_states
from jax_marlin_moe.layer import STATIC
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.stacked_layer import StackedMoELayer

register_states()


class QuantizedParam(nnx.Variable[Any]):
    """Packed weights: a variable whose value is a `MarlinWeights`, or a pytree around one.

    Not an `nnx.Param`: optimisers and gradients with `wrt=nnx.Param` do not see it. `nnx.split(layer, nnx.Param,
    QuantizedParam, RoutingState)` tells the kinds apart.
    """


class RoutingState(nnx.Variable[Array]):
    """What decides for experts and has no gradient: the correction bias, the experts of each token id."""


_VARIABLES = {PARAMS: nnx.Param, QUANTIZED: QuantizedParam, ROUTING: RoutingState}


class MarlinMoE(nnx.Module):
    """A `MoELayer` whose arrays are variables of Flax: its router with any rule, quantised experts, a shared expert.

    Calls of the two give the same bits. Each array of the layer is an attribute of the same name, where it is there:
    `gate_up` and `down` are `QuantizedParam`; `correction_bias` and `token_experts` are `RoutingState`; `router`,
    `router_bias`, `expert_scale`, `router_input_scale` and `output_norm` are `nnx.Param`. Those of the shared expert
    are `shared_gate_up` and `shared_down`, `QuantizedParam` or, where they are dense, `nnx.Param`, and `shared_gate`.
    What is static has its name too (`routing`, `activation`, `norm_epsilon`, `shared_activation`).

    Call it under `nnx.jit(..., graph=False)`, or under `jax.jit` with `nnx.split` and `nnx.merge`: plain `nnx.jit`
    returns all variables of its arguments from the compiled program, in case they changed, which copies the packed
    weights in each call.

    A `StackedMoELayer` makes a module of all its layers, whose arrays begin with an axis for the layers; calls say
    which (`layer=`), and copy no weights. In `nnx.scan`, scan over the index and pass the module with the axis None:

        step = nnx.scan(lambda h, l, moe: h + moe(h, layer=l), in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry,
                        graph=False)
        y = step(x, jnp.arange(len(moe.layer)), moe)

    Args:
        layer: as loaded, or built from packed weights. Its leaves may be `jax.ShapeDtypeStruct`s: the module is then as
            one of `nnx.eval_shape`.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        expert_axis: a logical axis, or one of the mesh, over which the routed experts are: metadata `out_sharding` of
            `gate_up` and `down`, which `nnx.get_partition_spec` and `nnx.get_named_sharding` read. In calls each
            device computes its own experts.
        activation_dtype: what rows are quantised to in calls that do not pass one, as for `MoELayer`; an attribute
            that may be assigned.

    Raises:
        TypeError: `layer` is neither a `MoELayer` nor a `StackedMoELayer`.
        ValueError: its parts do not fit together; the message names the part.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        implementation: str | None = None,
        expert_axis: str | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
    ) -> None:
        layers = checked(layer)
        self.stacked = isinstance(layer, StackedMoELayer)
        parts = parts_of(layers)
        for name, value in parts.items():
            axes = expert_axes(name, expert_axis, stacked=self.stacked)
            # Flax constrains a variable at once if it may, which fails for an array that has its device.
            metadata: dict[str, Any] = {"out_sharding": axes, "eager_sharding": False} if axes else {}
            setattr(self, name, _VARIABLES[kind_of(name, value)](value, **metadata))
        for name in STATIC:
            setattr(self, name, getattr(layers, name))
        self.part_names = tuple(parts)
        self.implementation = implementation
        self.activation_dtype = as_byte_dtype(activation_dtype)

    @classmethod
    def from_layer(
        cls,
        layer: Layer,
        *,
        implementation: str | None = None,
        expert_axis: str | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
    ) -> "MarlinMoE":
        """The module of a layer: the constructor, under the name that Linen's module has for it."""
        return cls(layer, implementation=implementation, expert_axis=expert_axis, activation_dtype=activation_dtype)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        layer: int,
        *,
        implementation: str | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
        **options: Any,
    ) -> "MarlinMoE":
        """A layer of a checkpoint.

        Args:
            path: as for `jax_marlin_moe.checkpoint.load_moe_layer`.
            layer: its number, from 0.
            implementation: as in the constructor.
            activation_dtype: likewise; what the checkpoint was calibrated for is `Checkpoint.activation_dtype(layer)`.
            **options: `quantize`, `group_size` and `scale_dtype`, as for `load_moe_layer`.

        Raises:
            FileNotFoundError: as `load_moe_layer`.
            ValueError: likewise.
        """
        loaded = load_moe_layer(path, layer, **options)
        return cls(loaded, implementation=implementation, activation_dtype=activation_dtype)

    @classmethod
    def random(
        cls,
        num_experts: int,
        hidden: int,
        intermediate: int,
        routing: Routing,
        *,
        rngs: nnx.Rngs,
        weight_format: str = "int4",
        group_size: int | Literal["customary"] | None = "customary",
        dtype: DTypeLike = jnp.bfloat16,
        router_dtype: DTypeLike = jnp.float32,
        activation: str | Activation = "silu",
        correction_bias: bool = False,
        shared_intermediate: int = 0,
        shared_gate: bool = False,
        implementation: str | None = None,
    ) -> "MarlinMoE":
        """A layer with random weights of variance 1 / fan-in, quantised.

        Args:
            num_experts: E.
            hidden: H.
            intermediate: I.
            routing: the rule, as `Routing(top_k)` for a softmax router.
            rngs: its `params` stream is used.
            weight_format: a name of `jax_marlin_moe.FORMATS`.
            group_size: rows that share a scale, as the format allows; None for one group, by default the
                customary size.
            dtype: of the scales, where they are floats.
            router_dtype: of the router's kernel and the gate of the shared expert, any float.
            activation: as for `jax_marlin_moe.fused_moe`.
            correction_bias: whether there is one; it begins with zeros.
            shared_intermediate: I of a shared expert in the same format; 0 for none.
            shared_gate: whether a sigmoid gate multiplies the shared expert.
            implementation: as in the constructor.

        Raises:
            ValueError: a size does not fit the group size, or a name or number is out of range.
        """
        layer = random_layer(
            rngs.params(),
            num_experts,
            hidden,
            intermediate,
            routing,
            activation=activation,
            weight_format=weight_format,
            group_size=group_size,
            dtype=dtype,
            router_dtype=router_dtype,
            correction_bias=correction_bias,
            shared_intermediate=shared_intermediate,
            shared_gate=shared_gate,
        )
        return cls(layer, implementation=implementation)

    @property
    def layer(self) -> Layer:
        """The layer, or the stack of them, of the variables' present values: a pytree."""
        parts = {name: getattr(self, name).get_value() for name in self.part_names}
        return layer_of(parts, {name: getattr(self, name) for name in STATIC}, stacked=self.stacked)

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        token_ids: Int32[Array, "*batch"] | None = None,
        *,
        router_input: Float[Array, "*batch H"] | None = None,
        layer: int | Int32[Array, ""] | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
        batch_invariant: bool = False,
    ) -> Float[Array, "*batch H"]:
        """Routes each row of x to its experts and sums their results, that of the shared expert included.

        Args:
            x: float16 or bfloat16, any leading dimensions; float32 rows as in `jax_marlin_moe.moe_layer`.
            token_ids: for layers that route by token, the id of each row.
            router_input: rows that the router reads, where they are not those of the experts.
            layer: of a stack, which layer: a number, or a traced one, which is clamped to those there are.
            activation_dtype: as for `MoELayer`, whose fixed scales count here too; None means that of the module.
            batch_invariant: as for `jax_marlin_moe.moe_layer`.

        Returns:
            An array with the shape and dtype of x.

        Raises:
            TypeError: x has another dtype.
            ValueError: the last dimension is not H, `token_ids` or `layer` are missing, or the implementation cannot
                run.
        """
        called = one_layer(self.layer, layer)
        options: dict[str, Any] = {
            "implementation": self.implementation,
            "activation_dtype": self.activation_dtype if activation_dtype is None else activation_dtype,
            "batch_invariant": batch_invariant,
        }
        return called(x, token_ids, router_input=router_input, **options)
