"""What the layers of both Flax APIs share: a layer's arrays by name and kind, and random layers. No Flax in here."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.arguments import check_top_k
from jax_marlin_moe.layer import STATIC, MoELayer, check_layer
from jax_marlin_moe.layer_slice import count_layers
from jax_marlin_moe.random_experts import random_experts
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.stacked_layer import StackedMoELayer
from jax_marlin_moe.weights import MarlinWeights, concatenate_columns

# What a layer's arrays are to Flax, and the names of Linen's collections: floats that gradients train, packed weights,
# and what decides for experts but has no gradient.
PARAMS, QUANTIZED, ROUTING = "params", "quantized", "routing"
_WITHOUT_GRADIENT = frozenset(
    {"correction_bias", "token_experts", "placement", "x_scale", "intermediate_scales", "expert_input_scale"}
)
_SHARED = "shared_"


Layer = MoELayer | StackedMoELayer


def checked(layer: Layer) -> MoELayer:
    """`layer`, or the layers of a stack with their leaves [L, ...]. Leaves may be arrays or shapes.

    Raises:
        TypeError: it is neither.
        ValueError: its parts do not fit together; the message names the part.
    """
    if isinstance(layer, StackedMoELayer):
        check_layer("layer", layer[0])
        return layer.layers
    if not isinstance(layer, MoELayer):
        raise TypeError(
            f"layer has type {type(layer).__name__}; it must be a jax_marlin_moe.MoELayer or StackedMoELayer"
        )
    check_layer("layer", layer)
    return layer


def one_layer(layer: Layer, index: Any) -> MoELayer:
    """What is called: the layer itself, or the one of a stack that `index` names.

    Raises:
        ValueError: a stack without an index, or an index without a stack.
    """
    if isinstance(layer, StackedMoELayer):
        if index is None:
            raise ValueError(f"layer is None; this module holds a stack of {len(layer)} layers: pass which one to call")
        return layer[index]
    if index is not None:
        raise ValueError("layer is given; this module holds one layer, not a stack of them")
    return layer


def parts_of(layer: Layer) -> dict[str, Any]:
    """The arrays and packed weights of a layer by name; those of the shared expert begin with `shared_`."""
    layer = layer.layers if isinstance(layer, StackedMoELayer) else layer
    found: dict[str, Any] = {}
    for field in dataclasses.fields(MoELayer):
        value = None if field.name in STATIC else getattr(layer, field.name)
        if isinstance(value, SharedExpert):
            found |= {_SHARED + inner.name: getattr(value, inner.name) for inner in dataclasses.fields(SharedExpert)}
        else:
            found[field.name] = value
    return {name: value for name, value in found.items() if value is not None}


def statics_of(layer: Layer) -> dict[str, Any]:
    """The fields of a layer that are not arrays, by name."""
    layer = layer.layers if isinstance(layer, StackedMoELayer) else layer
    return {name: getattr(layer, name) for name in STATIC}


def layer_of(parts: Mapping[str, Any], statics: Mapping[str, Any], *, stacked: bool) -> Layer:
    """The layer of which these are `parts_of` and `statics_of`."""
    shared = {name.removeprefix(_SHARED): value for name, value in parts.items() if name.startswith(_SHARED)}
    own = {name: value for name, value in parts.items() if not name.startswith(_SHARED)}
    layer = MoELayer(**own, **statics, shared=SharedExpert(**shared) if shared else None)
    return StackedMoELayer(layer) if stacked else layer


def kind_of(name: str, value: Any) -> str:
    """PARAMS, QUANTIZED or ROUTING, for a part of a layer."""
    if isinstance(value, MarlinWeights):
        return QUANTIZED
    return ROUTING if name in _WITHOUT_GRADIENT else PARAMS


def expert_axes(name: str, expert_axis: str | None, *, stacked: bool) -> tuple[str | None, ...]:
    """Names of the leading axes of a part's arrays, where one is named: all those of routed experts begin with them."""
    if expert_axis is None or name not in ("gate_up", "down"):
        return ()
    return (None, expert_axis) if stacked else (expert_axis,)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A layer without its values, hashable and of no arrays.

    Attributes:
        layer: shapes and dtypes (`jax.ShapeDtypeStruct`) in place of arrays.
    """

    layer: Layer

    @classmethod
    def of(cls, layer: Layer) -> "Structure":
        """That of a layer, or of a stack, of arrays, tracers or shapes."""
        return cls(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layer))


def random_layer(
    key: jax.Array,
    num_experts: int,
    hidden: int,
    intermediate: int,
    routing: Routing,
    *,
    activation: str | Activation,
    weight_format: str,
    group_size: int | Literal["customary"] | None,
    dtype: DTypeLike,
    router_dtype: DTypeLike,
    correction_bias: bool,
    shared_intermediate: int,
    shared_gate: bool,
) -> MoELayer:
    """A layer of normal random weights with variance 1 / K: a router, quantised experts and, likewise, a shared one."""
    check_top_k(routing.top_k, num_experts)
    halves = get_activation(activation).halves
    experts = partial(random_experts, weight_format=weight_format, group_size=group_size, scale_dtype=dtype)
    keys = jax.random.split(key, 6)

    def dense(key: jax.Array, columns: int) -> jax.Array:
        return jax.random.normal(key, (hidden, columns), router_dtype) * jnp.asarray(hidden**-0.5, router_dtype)

    shared = None
    if shared_intermediate:
        shared = SharedExpert(
            experts(keys[3], 1, k=hidden, n=halves * shared_intermediate),
            experts(keys[4], 1, k=shared_intermediate, n=hidden),
            dense(keys[5], 1) if shared_gate else None,
        )
    elif shared_gate:
        raise ValueError("shared_gate is True and shared_intermediate 0; a gate needs the expert that it is for")
    return MoELayer(
        gate_up=experts(keys[0], num_experts, k=hidden, n=halves * intermediate),
        down=experts(keys[1], num_experts, k=intermediate, n=hidden),
        router=dense(keys[2], num_experts),
        routing=routing,
        activation=activation,
        correction_bias=jnp.zeros((num_experts,), jnp.float32) if correction_bias else None,
        shared=shared,
    )


def random_part(key: jax.Array, name: str, shape: Any, *, stacked: bool = False) -> Any:
    """Values for a part of a layer, of which shapes and dtypes are given; `stacked`, with the layers in front.

    Matrices are normal with variance 1 / K, biases and tables zero, scales and norms one.
    """
    if stacked:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shape)
        return jax.lax.map(lambda one_key: random_part(one_key, name, one), jax.random.split(key, count_layers(shape)))
    if isinstance(shape, MarlinWeights):
        return _random_weights(key, shape)
    if name.endswith(("scale", "scales", "norm")):
        return jnp.ones(shape.shape, shape.dtype)
    if len(shape.shape) < 2 or not jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.zeros(shape.shape, shape.dtype)
    return (jax.random.normal(key, shape.shape, jnp.float32) * shape.shape[-2] ** -0.5).astype(shape.dtype)


def _random_weights(key: jax.Array, shape: MarlinWeights) -> MarlinWeights:
    parts = shape.column_padding or (0,)
    columns = [shape.padded_n // len(parts) - padding for padding in parts]
    row = shape.format
    group_size: int | None = shape.group_size
    if shape.num_groups == 1:
        group_size = None if row.per_channel else min(size for size in row.group_sizes if size >= shape.k)
    made = concatenate_columns(
        [
            random_experts(
                part_key,
                shape.num_experts,
                shape.k,
                n,
                weight_format=row.name,
                group_size=group_size,
                scale_dtype=shape.scales.dtype,
            )
            for part_key, n in zip(jax.random.split(key, len(parts)), columns, strict=True)
        ]
    )
    if shape.bias is not None:
        made = dataclasses.replace(made, bias=jnp.zeros(shape.bias.shape, shape.bias.dtype))
    if shape.input_order is not None:
        order = jnp.broadcast_to(jnp.arange(shape.k, dtype=jnp.int32), shape.input_order.shape)
        made = dataclasses.replace(made, input_order=order)
    return dataclasses.replace(made, group_size=shape.group_size)
