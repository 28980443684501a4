"""Layers and blocks over the ranks of a mesh: the calls, which `rank` and `block_sum` compute."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import arguments
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.expert_placement import slots_of
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.layer import MoELayer, check_rows
from jax_marlin_moe.layer_slice import LayerSlice, is_slice, share_indices
from jax_marlin_moe.sharding.block_sum import BlockSum
from jax_marlin_moe.sharding.moe_sharding import MoESharding, check_axes
from jax_marlin_moe.sharding.rank import RowQuantization, experts_of_rank, layer_of_rank
from jax_marlin_moe.sharding.shares import check_shares
from jax_marlin_moe.sharding.specs import Axes, as_axes, is_spec, spec
from jax_marlin_moe.weights import MarlinWeights

Exchange = Literal["gather", "ragged"]


def parallel_layer(
    layer: MoELayer,
    x: Float[Array, "*batch H"],
    sharding: MoESharding,
    token_ids: Int32[Array, "*batch"] | None = None,
    *,
    tokens: str | Axes = (),
    exchange: Exchange = "gather",
    capacity: int | None = None,
    share_dtype: DTypeLike = jnp.float32,
    router_input: Float[Array, "*batch H"] | None = None,
    activation_dtype: ByteDtype | DTypeLike | None = None,
    implementation: str | None = None,
) -> Any:
    """A layer over the devices of a mesh, as `layer(x)` on one: router, routed experts, shared expert.

    Ranks' shares are summed in float32, unless `share_dtype` says otherwise, and rounded once. With `tokens=()` every
    device has all tokens, and one all-reduce sums the shares: right for decoding. With tokens over the axes of the
    experts, rows are exchanged.

    Args:
        layer: what `place` returned, or `load_moe_layer(..., sharding=)`, or one layer of such a stack.
        x: as for `MoELayer`.
        sharding: what the layer was placed by.
        token_ids: as for `MoELayer`.
        tokens: axes of the mesh over which the first dimension of x and of the result is sharded: those of the experts,
            those of the intermediate dimension, or any other, such as "data".
        exchange: how rows reach the experts along the axes of the experts that `tokens` names. "gather": all ranks
            gather all rows, and the sums are scattered. "ragged": a row is sent once to each rank that has one of its
            experts, and one row comes back. On CPUs and cards this is an all-to-all of equal blocks, which without
            `capacity` moves as much as "gather"; elsewhere it is `jax.lax.ragged_all_to_all`. No row is dropped: every
            rank has room for all rows. On a mesh of hosts and cards a row is sent to a host once.
        capacity: for "ragged": the most rows that a rank receives along one axis. Choices beyond it, those of the last
            ranks' tokens first, are dropped and counted. Memory and time of the experts follow from it.
        share_dtype: in which ranks send their shares to the sum: float32, or bfloat16 or float16, which halve the bytes
            and round every share once more.
        router_input: as for `MoELayer`.
        activation_dtype: as for `MoELayer`. Rows are sent in their own type, and quantised where they are multiplied.
            Where the intermediate dimension is over devices and a scale of whole rows is computed in the call, ranks
            find the largest magnitude together, and the values that the bytes stand for are multiplied in 16 bits. With
            fixed scales and those of groups, rows are multiplied as on one device.
        implementation: as for `jax_marlin_moe.fused_moe`.

    Returns:
        The result; with `capacity` a tuple of it and of the number of choices of experts, int32, that were dropped.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: the layer is not laid out for the sharding, tokens do not divide, or an axis does not exist.
    """
    if not isinstance(sharding, MoESharding):
        raise TypeError(
            f"sharding has type {type(sharding).__name__}; it must be a jax_marlin_moe.sharding.MoESharding"
        )
    if not isinstance(layer, MoELayer):
        raise TypeError(
            f"layer has type {type(layer).__name__}; it must be a MoELayer, of a stack the one that is called"
        )
    check_rows(layer, x, token_ids, router_input)
    byte_dtype = as_byte_dtype(activation_dtype)
    axes = as_axes("tokens", tokens)
    check_axes("tokens", axes, sharding.mesh)
    _check_exchange(exchange, capacity, [axis for axis in axes if axis in sharding.expert_axes])
    share = _share_dtype(share_dtype)
    ranks = sharding.size(axes)
    check_shares(f"x has {x.shape[0]} rows", x.shape[0], ranks, 1, "as many rows each", hint="append rows of zeros")
    layer = share_indices(layer)
    specs = jax.tree.map(_of_stack, sharding.specs(layer), layer, is_leaf=_is_leaf)
    leaves, structure = jax.tree.flatten(specs, is_leaf=is_spec)
    run = _program(sharding, tuple(leaves), structure, axes, exchange, capacity, share, byte_dtype, implementation)
    return run(layer, x, token_ids, router_input)


@functools.lru_cache(maxsize=256)
def _program(
    sharding: MoESharding,
    leaves: tuple[jax.sharding.PartitionSpec, ...],
    structure: Any,
    tokens: Axes,
    exchange: Exchange,
    capacity: int | None,
    share: jnp.dtype,
    activation_dtype: ByteDtype | None,
    implementation: str | None,
) -> Callable[..., Any]:
    """One function for equal calls, so that an eager one is compiled once."""
    body = partial(
        layer_of_rank,
        expert=sharding.expert_axes,
        tensor=sharding.tensor_axes,
        tokens=tokens,
        exchange=exchange,
        capacity=capacity,
        share=share,
        activation_dtype=activation_dtype,
        implementation=implementation,
    )
    rows = spec(tokens)
    run = jax.shard_map(
        body,
        mesh=sharding.mesh,
        in_specs=(jax.tree.unflatten(structure, leaves), rows, rows, rows),
        out_specs=rows if capacity is None else (rows, spec()),
    )

    def call(layer: MoELayer, *arguments: Any) -> Any:
        if AxisType.Explicit in sharding.mesh.axis_types:  # over automatic axes XLA sees to it
            arguments = jax.tree.map(
                lambda one: jax.sharding.reshard(one, NamedSharding(sharding.mesh, rows)), arguments
            )
        return run(layer, *arguments)

    return jax.jit(call, inline=True)


def parallel_experts(
    x: Float[Array, "tokens H"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    *,
    expert: str | Axes = (),
    tensor: str | Axes = (),
    tokens: str | Axes = (),
    exchange: Exchange = "gather",
    capacity: int | None = None,
    share_dtype: DTypeLike = jnp.float32,
    placement: Int32[Array, " slots"] | None = None,
    num_experts: int | None = None,
    activation: str | Activation = "silu",
    activation_dtype: ByteDtype | DTypeLike | None = None,
    x_scale: Float32[Array, ""] | None = None,
    intermediate: IntermediateQuantizer | None = None,
    implementation: str | None = None,
) -> Any:
    """A block of experts inside `jax.shard_map`: `fused_moe` of all ranks' experts, for the tokens of this rank.

    Args:
        x: this rank's tokens, as for `fused_moe`.
        gate_up: this rank's share, by the specs of `partition_specs` or of `MoESharding`.
        down: likewise.
        topk_weights: of this rank's tokens.
        topk_ids: likewise; experts of all ranks.
        expert: axes over which the experts are, the outermost first.
        tensor: axes over which the intermediate dimension is.
        tokens: the axes, of those two kinds, over which tokens are; over the others all ranks have the same tokens.
        exchange: as for `parallel_layer`.
        capacity: likewise.
        share_dtype: likewise.
        placement: the expert in each slot, of all ranks, where they are not in order or more than once.
        num_experts: that ids may name, with `placement`.
        activation: as for `fused_moe`.
        activation_dtype: as for `fused_moe`, over `tensor` as for `parallel_layer`.
        x_scale: with `activation_dtype`, as for `fused_moe`.
        intermediate: as for `fused_moe`, with the scales of this rank's experts.
        implementation: as for `fused_moe`.

    Returns:
        The rows' results, in the type of x: the same on all ranks of axes without tokens. With `capacity` a tuple of
        them and of the number of dropped choices, over the tokens of all ranks of `expert` and `tensor`.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value.
    """
    expert, tensor, tokens = (
        as_axes(name, axes) for name, axes in (("expert", expert), ("tensor", tensor), ("tokens", tokens))
    )
    _check_exchange(exchange, capacity, [axis for axis in tokens if axis in expert])
    if placement is not None:
        if num_experts is None:
            raise ValueError("num_experts is None; with a placement, pass how many experts ids may name")
        topk_ids = slots_of(topk_ids, placement, num_experts)
    block = BlockSum(expert, tensor, tokens, exchange, capacity, _share_dtype(share_dtype), jnp.dtype(x.dtype))
    if activation_dtype is None and x_scale is not None:
        raise ValueError("x_scale is not None and activation_dtype None; it must be None: rows stay in 16 bits")
    quantization = RowQuantization(as_byte_dtype(activation_dtype), x_scale, intermediate)
    experts = experts_of_rank(block, gate_up, down, activation, implementation, quantization=quantization)
    y, dropped = block.sum(experts, x, topk_weights, topk_ids, dtype=x.dtype)
    return y if capacity is None else (y, block.total(dropped))


def _check_exchange(exchange: str, capacity: int | None, axes: list[str]) -> None:
    if exchange not in ("gather", "ragged"):
        raise ValueError(f"exchange is {exchange!r}; it must be 'gather' or 'ragged'")
    if capacity is None:
        return
    if exchange != "ragged" or not axes:
        raise ValueError(
            f"capacity is {capacity}, and exchange {exchange!r} over the axes {tuple(axes)}; only 'ragged' over axes "
            "that tokens and experts share has a capacity: without one nothing is dropped"
        )
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity is {capacity!r}; it must be a positive number of rows")


def _share_dtype(share_dtype: DTypeLike) -> jnp.dtype:
    """What shares have between ranks; raises TypeError unless they can have it."""
    share = arguments.as_dtype("share_dtype", share_dtype)
    if share not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"share_dtype is {share}; it must be float32, bfloat16 or float16")
    return share


def _is_leaf(node: Any) -> bool:
    return is_slice(node) or is_spec(node)


def _of_stack(one: jax.sharding.PartitionSpec, leaf: Any) -> Any:
    """The spec of a leaf, which may be a slice of a stack."""
    if not isinstance(leaf, LayerSlice):
        return one
    index = None if leaf.index is None else spec()
    return LayerSlice(jax.sharding.PartitionSpec(None, *one), index, leaf.group)  # type: ignore[arg-type]
