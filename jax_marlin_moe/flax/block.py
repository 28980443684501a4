"""What the layers of both Flax APIs share: routed experts as a function, and random experts. No Flax in here."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.arguments import check_shape, check_top_k, check_weights
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.random_experts import random_experts
from jax_marlin_moe.routing import Routing, route
from jax_marlin_moe.weights import MarlinWeights


def apply_block(
    x: Float[Array, "*batch H"],
    router: Float[Array, "H E"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    *,
    top_k: int,
    renormalize: bool,
    activation: str | Activation,
    implementation: str | None,
) -> Float[Array, "*batch H"]:
    """Routes every row of x and runs its experts; leading dimensions are flattened and restored.

    Logits are products of x and the router accumulated in float32.
    """
    if x.ndim < 1 or x.shape[-1] != gate_up.k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be H = {gate_up.k}")
    rows = x.reshape(-1, x.shape[-1])
    with jax.numpy_dtype_promotion("standard"):  # the casts below are explicit
        common = jnp.promote_types(x.dtype, router.dtype)
    logits = jnp.matmul(
        rows.astype(common),
        router.astype(common),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    weights, ids = route(logits, top_k=top_k, renormalize=renormalize)
    y = fused_moe(rows, gate_up, down, weights, ids, activation=activation, implementation=implementation)
    return y.reshape(x.shape)


def check_block(
    gate_up: MarlinWeights, down: MarlinWeights, router: Float[Array, "H E"], top_k: int, activation: str | Activation
) -> None:
    """Raises TypeError or ValueError, naming the argument, unless the parts make up one block."""
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    halves = 2 if get_activation(activation).gated else 1
    if (down.num_experts, halves * down.k, down.n) != (gate_up.num_experts, gate_up.n, gate_up.k):
        raise ValueError(
            f"down has (E, K, N) = {(down.num_experts, down.k, down.n)}; with gate_up and activation {activation!r} "
            f"it must be {(gate_up.num_experts, gate_up.n // halves, gate_up.k)}"
        )
    if not hasattr(router, "dtype") or not jnp.issubdtype(router.dtype, jnp.floating):
        raise TypeError(f"router has dtype {getattr(router, 'dtype', type(router))}; it must be floating point")
    check_shape("router", router, (gate_up.k, gate_up.num_experts), "(H, E)")
    check_top_k(top_k, gate_up.num_experts)


def layer_parts(layer: MoELayer) -> dict[str, Any]:
    """The arguments of `MarlinMoE` that make up a loaded layer.

    Raises:
        TypeError: `layer` is not a `MoELayer`.
        ValueError: the layer has something that `MarlinMoE` has no place for; all of it is named.
    """
    if not isinstance(layer, MoELayer):
        raise TypeError(f"layer is a {type(layer).__name__}; it must be a jax_marlin_moe.checkpoint.MoELayer")
    held = {"gate_up", "down", "router", "routing", "activation", "norm_epsilon"}  # the last is of another's norm
    excess = [
        f"{field.name} is not None"
        for field in dataclasses.fields(layer)
        if field.name not in held and getattr(layer, field.name) is not None
    ]
    plain = Routing(layer.routing.top_k, renormalize=layer.routing.renormalize)
    excess += [
        f"routing.{field.name} is {getattr(layer.routing, field.name)!r}, not {getattr(plain, field.name)!r}"
        for field in dataclasses.fields(plain)
        if getattr(layer.routing, field.name) != getattr(plain, field.name)
    ]
    if excess:
        raise ValueError(
            f"layer has what MarlinMoE cannot hold: {'; '.join(excess)}. It must be a softmax router and its experts "
            "alone: call the MoELayer itself, which is a pytree"
        )
    return {
        "gate_up": layer.gate_up,
        "down": layer.down,
        "router": layer.router,
        "top_k": layer.routing.top_k,
        "renormalize": layer.routing.renormalize,
        "activation": layer.activation,
    }


def initial_experts(
    key: Array,
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    activation: str | Activation,
    weight_format: str,
    group_size: int | Literal["customary"] | None,
    dtype: DTypeLike,
) -> tuple[MarlinWeights, MarlinWeights]:
    """`gate_up` and `down` of normal random weights with variance 1 / K."""
    halves = 2 if get_activation(activation).gated else 1
    experts = partial(
        random_experts, num_experts=num_experts, weight_format=weight_format, group_size=group_size, scale_dtype=dtype
    )
    first, second = jax.random.split(key)
    return experts(first, k=hidden, n=halves * intermediate), experts(second, k=intermediate, n=hidden)
