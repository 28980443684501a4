"""`MarlinMoE` for Flax Linen."""

import os
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.checkpoint import load_moe_layer
from jax_marlin_moe.flax.parts import (
    PARAMS,
    Layer,
    Structure,
    checked,
    expert_axes,
    kind_of,
    layer_of,
    one_layer,
    parts_of,
    random_layer,
    random_part,
    statics_of,
)
from jax_marlin_moe.flax.serialization import register_states
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.stacked_layer import StackedMoELayer

register_states()

Variables = dict[str, dict[str, Any]]


class MarlinMoE(nn.Module):
    """A `MoELayer` whose arrays are variables of Flax: its router with any rule, quantised experts, a shared expert.

    Calls of the two give the same bits. Build the module with `from_layer`, `from_checkpoint` or `random`. Each array
    of the layer is a variable of the same name, where it is there: `quantized/gate_up` and `quantized/down`, each a
    `MarlinWeights`, in a collection that optimisers over `params` do not see; `routing/correction_bias` and
    `routing/token_experts`, which have no gradient; `params/router`, `router_bias`, `expert_scale`,
    `router_input_scale` and `output_norm`. Those of the shared expert are `shared_gate_up` and `shared_down` in
    `quantized` or, where they are dense, in `params`, and `params/shared_gate`.

    A `StackedMoELayer` makes a module of all its layers, whose variables begin with an axis for the layers; calls say
    which (`layer=`), and copy no weights. In `nn.scan`, scan over the index and broadcast the variables:
    `nn.scan(Body, variable_broadcast=("params", "quantized", "routing"), split_rngs={"params": False})`.

    Attributes:
        structure: shapes of the layer's arrays, and what of it is static.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        expert_axis: the logical axis over which the routed experts are. The leaves of `gate_up` and `down` are boxes
            then (`nn.LogicallyPartitioned`), which `nn.get_partition_spec` reads and `apply` takes off. In calls each
            device computes its own experts.
        activation_dtype: what rows are quantised to in calls that do not pass one, as for `MoELayer`.
    """

    structure: Structure
    implementation: str | None = None
    expert_axis: str | None = None
    activation_dtype: ByteDtype | DTypeLike | None = None

    @classmethod
    def from_layer(
        cls,
        layer: Layer,
        *,
        implementation: str | None = None,
        expert_axis: str | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
    ) -> tuple["MarlinMoE", Variables]:
        """A module and its variables from a layer.

        Args:
            layer: as loaded, or built from packed weights. Its leaves may be `jax.ShapeDtypeStruct`s, and so are the
                variables then.
            implementation: as the attribute.
            expert_axis: as the attribute.
            activation_dtype: as the attribute.

        Returns:
            The module, and `{"params": ..., "quantized": ...}`, with "routing" where it has such arrays, for its
            `apply`.

        Raises:
            TypeError: `layer` is neither a `MoELayer` nor a `StackedMoELayer`.
            ValueError: its parts do not fit together; the message names the part.
        """
        module = cls(Structure.of(layer), implementation, expert_axis, as_byte_dtype(activation_dtype))
        variables: Variables = {}
        for name, value in parts_of(checked(layer)).items():
            variables.setdefault(kind_of(name, value), {})[name] = module._boxed(name, value)
        return module, variables

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        layer: int,
        *,
        implementation: str | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
        **options: Any,
    ) -> tuple["MarlinMoE", Variables]:
        """A layer of a checkpoint.

        Args:
            path: as for `jax_marlin_moe.checkpoint.load_moe_layer`.
            layer: its number, from 0.
            implementation: as the attribute.
            activation_dtype: as the attribute; what the checkpoint was calibrated for is
                `Checkpoint.activation_dtype(layer)`.
            **options: `quantize`, `group_size` and `scale_dtype`, as for `load_moe_layer`.

        Returns:
            As `from_layer`.

        Raises:
            FileNotFoundError: as `load_moe_layer`.
            ValueError: likewise.
        """
        loaded = load_moe_layer(path, layer, **options)
        return cls.from_layer(loaded, implementation=implementation, activation_dtype=activation_dtype)

    @classmethod
    def random(
        cls,
        num_experts: int,
        hidden: int,
        intermediate: int,
        routing: Routing,
        *,
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
        """A module whose `init` draws random weights of variance 1 / fan-in and quantises them.

        Args:
            num_experts: E.
            hidden: H.
            intermediate: I.
            routing: the rule, as `Routing(top_k)` for a softmax router.
            weight_format: a name of `jax_marlin_moe.FORMATS`.
            group_size: rows that share a scale, as the format allows; None for one group, by default the
                customary size.
            dtype: of the scales, where they are floats.
            router_dtype: of the router's kernel and the gate of the shared expert, any float.
            activation: as for `jax_marlin_moe.fused_moe`.
            correction_bias: whether there is one; it begins with zeros.
            shared_intermediate: I of a shared expert in the same format; 0 for none.
            shared_gate: whether a sigmoid gate multiplies the shared expert.
            implementation: as the attribute.

        Raises:
            ValueError: a size does not fit the group size, or a name or number is out of range.
        """
        make = partial(
            random_layer,
            num_experts=num_experts,
            hidden=hidden,
            intermediate=intermediate,
            routing=routing,
            activation=activation,
            weight_format=weight_format,
            group_size=group_size,
            dtype=dtype,
            router_dtype=router_dtype,
            correction_bias=correction_bias,
            shared_intermediate=shared_intermediate,
            shared_gate=shared_gate,
        )
        return cls(Structure(checked(jax.eval_shape(make, jax.random.key(0)))), implementation)

    @nn.compact
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
            ValueError: the last dimension is not H, `token_ids`, `layer` or a collection are missing, or the
                implementation cannot run.
        """
        shapes = parts_of(self.structure.layer)
        parts = {name: self._value(name, place, shape) for place, (name, shape) in enumerate(shapes.items())}
        held = layer_of(parts, statics_of(self.structure.layer), stacked=self._stacked)
        options: dict[str, Any] = {
            "implementation": self.implementation,
            "activation_dtype": self.activation_dtype if activation_dtype is None else activation_dtype,
            "batch_invariant": batch_invariant,
        }
        return one_layer(held, layer)(x, token_ids, router_input=router_input, **options)

    @property
    def _stacked(self) -> bool:
        return isinstance(self.structure.layer, StackedMoELayer)

    def _value(self, name: str, place: int, shape: Any) -> Any:
        """The variable of a part; drawn where the module is initialising."""
        kind = kind_of(name, shape)
        if kind == PARAMS:
            return self.param(name, lambda key: random_part(key, name, shape, stacked=self._stacked))
        if not self.has_variable(kind, name):
            if not self.is_initializing():
                raise ValueError(
                    f"the variables hold no {name!r} in a collection {kind!r} for this layer; pass all that `init` or "
                    "`from_layer` returned, not `params` alone"
                )
            key = jax.random.fold_in(self.make_rng("params"), place)
            value = random_part(key, name, shape, stacked=self._stacked)
            self.put_variable(kind, name, self._boxed(name, value))
        return nn.unbox(self.get_variable(kind, name))

    def _boxed(self, name: str, value: Any) -> Any:
        """The part with boxes around its leaves, where their axes have names."""
        axes = expert_axes(name, self.expert_axis, stacked=self._stacked)
        if not axes:
            return value
        return jax.tree.map(
            lambda leaf: nn.LogicallyPartitioned(leaf, (*axes, *[None] * (len(leaf.shape) - len(axes)))), value
        )
