"""Layers and blocks over the ranks of a mesh: what each rank computes, and how its share joins the others'."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import arguments, reference_layer
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.expert_placement import slots_of
from jax_marlin_moe.layer import MoELayer, check_rows
from jax_marlin_moe.layer_slice import LayerSlice, is_slice, share_indices, spread_indices
from jax_marlin_moe.ops.four_numbers import WORDS
from jax_marlin_moe.ops.fused_moe import can_pack, share_of_block
from jax_marlin_moe.ops.layer_composition import shared_beside
from jax_marlin_moe.ops.sums import rounded_sum, scattered_sum, sends_packed, sum_of_packed
from jax_marlin_moe.ops.tangents import jvp_of, read_moving
from jax_marlin_moe.sharding.exchange import find_route, send, send_back, take_rows
from jax_marlin_moe.sharding.moe_sharding import MoESharding, check_axes
from jax_marlin_moe.sharding.shares import check_shares
from jax_marlin_moe.sharding.specs import Axes, as_axes, spec
from jax_marlin_moe.sharding.tensor_parallel import local_matrix
from jax_marlin_moe.shared_expert import SharedExpert
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
        tokens: axes of the mesh over which the first dimension of x is, and that of the result: those of the experts,
            of the intermediate dimension or any other, such as "data".
        exchange: how rows get to the experts over each axis of the experts that `tokens` names: "gather" gathers them
            on all ranks and scatters the sums, "ragged" sends a row to the ranks that have one of its experts, and one
            row back: in equal blocks on CPUs and cards, which without `capacity` move what "gather" moves, and by
            `jax.lax.ragged_all_to_all` elsewhere. No row is dropped: all ranks can get all rows. On a mesh of hosts and
            cards a row goes to a host once.
        capacity: for "ragged": rows that a rank gets at most over one axis; what is more, tokens of the last ranks
            first, is dropped and counted. Memory and time of the experts follow from it.
        share_dtype: of ranks' shares on their way to their sum: float32, or bfloat16 or float16 for half of the bytes
            and a rounding of every share more.
        router_input: as for `MoELayer`.
        implementation: as for `jax_marlin_moe.fused_moe`.

    Returns:
        The result; with `capacity` a tuple of it and of the choices of experts, int32, that were dropped.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: the layer is not laid out for the sharding, tokens do not divide, or an axis does not exist.
    """
    if not isinstance(sharding, MoESharding):
        raise TypeError(f"sharding is a {type(sharding).__name__}; it must be a jax_marlin_moe.sharding.MoESharding")
    if not isinstance(layer, MoELayer):
        raise TypeError(f"layer is a {type(layer).__name__}; it must be a MoELayer, of a stack the one that is called")
    check_rows(layer, x, token_ids, router_input)
    axes = as_axes("tokens", tokens)
    check_axes("tokens", axes, sharding.mesh)
    _check_exchange(exchange, capacity, [axis for axis in axes if axis in sharding.expert_axes])
    share = _share_dtype(share_dtype)
    ranks = sharding.size(axes)
    check_shares(f"x has {x.shape[0]} rows", x.shape[0], ranks, 1, "as many rows each", hint="append rows of zeros")
    layer = share_indices(layer)
    specs = jax.tree.map(_of_stack, sharding.specs(layer), layer, is_leaf=_is_leaf)
    leaves, structure = jax.tree.flatten(specs, is_leaf=_is_spec)
    run = _program(sharding, tuple(leaves), structure, axes, exchange, capacity, share, implementation)
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
    implementation: str | None,
) -> Callable[..., Any]:
    """One function for equal calls, so that an eager one is compiled once."""
    body = partial(
        _layer_of_rank,
        expert=sharding.expert_axes,
        tensor=sharding.tensor_axes,
        tokens=tokens,
        exchange=exchange,
        capacity=capacity,
        share=share,
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
        implementation: likewise.

    Returns:
        The rows' results, in the type of x: the same on all ranks of axes without tokens. With `capacity` a tuple of
        them and of the choices that were dropped, of the tokens of all ranks of `expert` and `tensor`.

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
    block = _Block(expert, tensor, tokens, exchange, capacity, _share_dtype(share_dtype), jnp.dtype(x.dtype))
    gate_up = local_matrix(gate_up)
    slots = gate_up.num_experts * block.size(expert)
    compute = partial(
        _experts_of_rank,
        activation=activation,
        slots=slots,
        rounded_to=block.rounded_to,
        implementation=implementation,
    )
    y, dropped = block.sum(compute, (gate_up, down), x, topk_weights, topk_ids, slots, None, x.dtype)
    return y if capacity is None else (y, block.total(dropped))


def _layer_of_rank(
    layer, x, token_ids, router_input, *, expert, tensor, tokens, exchange, capacity, share, implementation
):
    """`parallel_layer` of the tokens and weights of one rank."""
    layer = spread_indices(layer)
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    router_rows = x if router_input is None else router_input.reshape(x.shape)
    weights, ids = layer.route(router_rows, None if token_ids is None else token_ids.reshape(-1))
    rows, _ = arguments.as_rows("x", x)
    kept = None
    if layer.routing.identity_experts:
        kept = reference_layer.identity_sum(rows, weights, ids, layer.num_experts, rows.shape[1])
    if layer.placement is not None:
        ids = slots_of(ids, jnp.asarray(layer.placement), layer.num_experts)
    elif layer.routing.identity_experts:
        ids = jnp.where(ids < layer.num_experts, ids, -1)
    block = _Block(expert, tensor, tokens, exchange, capacity, share, jnp.dtype(x.dtype))
    matrices = gate_up, _ = local_matrix(layer.gate_up), layer.down
    slots = gate_up.num_experts * block.size(expert)
    compute = partial(
        _experts_of_rank,
        activation=layer.activation,
        slots=slots,
        rounded_to=block.rounded_to,
        implementation=implementation,
    )
    if layer.routing.apply_on_input:
        # Each slot is a row of its own, with weight 1.
        top_k = ids.shape[1]
        each = reference_layer.weighted_rows(rows, weights)
        y, dropped = block.sum(compute, matrices, each, jnp.ones((each.shape[0], 1)), ids.reshape(-1, 1), slots, None)
        y = y.reshape(rows.shape[0], top_k, y.shape[1]).sum(1)
        if layer.shared is not None:
            ones, none = jnp.ones((rows.shape[0], 1)), jnp.full((rows.shape[0], 1), -1, jnp.int32)
            y = (
                y
                + dataclasses.replace(block, expert=(), exchange="gather", capacity=None).sum(
                    None, None, rows, ones, none, slots, partial(_shared_of_rank, layer, block, implementation)
                )[0]
            )
    else:
        extra = None if layer.shared is None else partial(_shared_of_rank, layer, block, implementation)
        # What is added to something is not rounded before.
        dtype = x.dtype if kept is None else jnp.float32
        y, dropped = block.sum(compute, matrices, rows, weights, ids, slots, extra, dtype)
    if kept is not None:
        y = y + kept
    y = layer.normalized(y.astype(x.dtype)).reshape(shape)
    return y if capacity is None else (y, block.total(dropped))


def _experts_of_rank(matrices, x, weights, ids, *, out_dtype, activation, slots, rounded_to, implementation):
    """Sums over this rank's experts; ids count from the first of them."""
    gate_up, down = matrices
    # As many ids as there are experts of all ranks: kernels are chosen by the rows that an expert gets of them.
    here = jnp.arange(slots, dtype=jnp.int32)
    return share_of_block(
        x, gate_up, down, weights, ids,
        activation=activation,
        expert_map=jnp.where(here < gate_up.num_experts, here, -1),
        out_dtype=out_dtype,
        rounded_to=rounded_to,
        implementation=implementation,
    )  # fmt: skip


def _shared_of_rank(layer: MoELayer, block: "_Block", implementation: str | None, x: Array) -> Array:
    """float32 share of the shared expert: what is not cut is the first rank's alone."""
    shared = layer.shared
    assert shared is not None
    activation = get_activation(layer.activation if layer.shared_activation is None else layer.shared_activation)
    whole = [axis for axis in block.summed if axis in block.expert]
    gate = None if shared.gate is None else jnp.asarray(shared.gate)
    if isinstance(shared.gate_up, MarlinWeights):
        here = SharedExpert(local_matrix(shared.gate_up), shared.down, gate)
    else:
        here = SharedExpert(jnp.asarray(shared.gate_up), jnp.asarray(shared.down), gate)
        whole += block.tensor
    y = shared_beside(x, here, activation, implementation=implementation, rounded_to=block.rounded_to)
    first = jnp.bool_(True)
    for axis in whole:
        first = first & (lax.axis_index(axis) == 0)
    return jnp.where(first, y, 0) if whole else y


@dataclasses.dataclass(frozen=True)
class _Block:
    """How rows get to the ranks that have their experts, and sums back.

    Attributes:
        expert: axes of the experts.
        tensor: axes of the intermediate dimension.
        tokens: axes of the tokens.
        exchange: over those of `tokens` that are of the experts.
        capacity: as for `parallel_layer`.
        share: dtype of shares between ranks.
        rounded_to: dtype of the results in the end.
    """

    expert: Axes
    tensor: Axes
    tokens: Axes
    exchange: str
    capacity: int | None
    share: jnp.dtype
    rounded_to: jnp.dtype

    @property
    def summed(self) -> Axes:
        """Axes whose ranks have the same tokens: one all-reduce over all of them."""
        return tuple(axis for axis in (*self.expert, *self.tensor) if axis not in self.tokens)

    @property
    def gathered(self) -> Axes:
        """Axes of the intermediate dimension whose ranks have different tokens, which all of them need."""
        return tuple(axis for axis in self.tensor if axis in self.tokens)

    def size(self, axes: Axes) -> int:
        """Ranks along axes."""
        return lax.axis_size(axes) if axes else 1

    def sum(
        self,
        compute: Any,
        matrices: Any,
        x: Array,
        weights: Array,
        ids: Array,
        slots: int,
        extra: Any,
        dtype: Any = jnp.float32,
    ) -> tuple[Array, Array]:
        """Results of this rank's tokens, and the choices that were dropped on this rank.

        Args:
            compute: matrices, rows, router weights and local ids to shares of a dtype; None where there are no routed
                experts.
            matrices: of this rank's experts.
            x: rows.
            weights: of their choices.
            ids: of their choices; slots of all ranks.
            slots: how many there are.
            extra: rows to float32 shares that are added, or None.
            dtype: of the results.
        """
        if compute is not None and extra is None and self._packs_shares(matrices, x, dtype):
            return self._packed_sum(compute, matrices, x, weights, ids, slots, dtype), jnp.int32(0)
        if self.gathered:
            x, weights, ids = (lax.all_gather(rows, self.gathered, tiled=True) for rows in (x, weights, ids))
        y, dropped = jnp.float32(0), jnp.int32(0)
        if compute is not None:
            # What is added to something is not rounded before.
            out_dtype = self.share if extra is None else jnp.dtype(jnp.float32)
            y, dropped = self._over(
                self.expert, partial(compute, matrices, out_dtype=out_dtype), x, weights, ids, slots
            )
        if extra is not None:
            y = y + extra(x)
        if self.summed:
            y = rounded_sum(y.astype(self.share), self.summed, self.share if self.gathered else dtype)
        if self.gathered:
            y = scattered_sum(y.astype(self.share), self.gathered, self.rounded_to, dtype=dtype)
        return y.astype(dtype), dropped

    @property
    def _gathers(self) -> Axes:
        """Axes whose ranks have different tokens, all of which they gather, and whose sums they scatter."""
        return tuple(axis for axis in (*self.expert, *self.tensor) if axis in self.tokens)

    def _packs_shares(self, matrices: Any, x: Array, dtype: Any) -> bool:
        """Whether shares go to one sum as they are made, and cards send them packed."""
        axes, scattered = (self._gathers, True) if self._gathers else (self.summed, False)
        sent = any(axis in self.expert for axis in self._gathers) and (self.exchange != "gather" or len(axes) > 1)
        if not axes or sent or {*self.summed, *self._gathers} != {*axes} or self.share != jnp.float32:
            return False
        rows = x.shape[0] * self.size(self._gathers)
        return can_pack(matrices[1]) and sends_packed((rows, matrices[1].n), dtype, axes, scattered=scattered)

    def _packed_sum(
        self, compute: Any, matrices: Any, x: Array, weights: Array, ids: Array, slots: int, dtype: Any
    ) -> Array:
        """The sum of shares that cards pack where they make them."""
        gathers, of_all = self._gathers, dataclasses.replace(self, tokens=())
        if gathers:
            x, weights, ids = (lax.all_gather(rows, gathers, tiled=True) for rows in (x, weights, ids))

        def shares(out_dtype: Any, matrices: Any, x: Array, weights: Array, ids: Array) -> Array:
            run = partial(compute, matrices, out_dtype=out_dtype)
            return of_all._over(self.expert, run, x, weights, ids, slots)[0]

        def plain(*operands: Any) -> Array:
            y = shares(jnp.dtype(jnp.float32), *operands)
            return scattered_sum(y, gathers, dtype, dtype=dtype) if gathers else rounded_sum(y, self.summed, dtype)

        def packed(*operands: Any) -> Array:
            return sum_of_packed(shares(WORDS, *operands), gathers or self.summed, dtype, scattered=bool(gathers))

        @jax.custom_jvp
        def total(*operands: Any) -> Array:
            return lax.platform_dependent(*operands, cuda=packed, default=plain)

        def derivative(operands: Any, tangents: Any) -> tuple[Array, Array]:
            moving = jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, tangents)
            _, dot = jvp_of(plain, *read_moving(operands, moving))
            return total(*operands), dot

        total.defjvp(derivative, symbolic_zeros=True)
        return total(matrices, x, weights, ids)

    def total(self, dropped: Array) -> Array:
        """The choices that were dropped on all ranks."""
        axes = tuple(dict.fromkeys((*self.expert, *self.tokens)))
        return lax.psum(dropped, axes) // self.size(self.gathered)

    def _over(self, axes: Axes, compute: Any, x: Array, weights: Array, ids: Array, slots: int) -> tuple[Array, Array]:
        """Sums over the ranks of `axes`, those of `summed` excepted. Ids count from the first slot of the ranks."""
        if not axes:
            return compute(x, weights, ids), jnp.int32(0)
        axis, *rest = axes
        ranks = self.size((axis,))
        width, me = slots // ranks, lax.axis_index(axis)
        inner = partial(self._over, tuple(rest), compute)

        def own(ids: Array) -> Array:
            return jnp.where((ids >= 0) & (ids // width == me), ids % width, -1)

        if axis not in self.tokens:
            return inner(x, weights, own(ids), width)
        all_weights, all_ids = (lax.all_gather(rows, axis, tiled=True) for rows in (weights, ids))
        if self.exchange == "gather":
            y, dropped = inner(lax.all_gather(x, axis, tiled=True), all_weights, own(all_ids), width)
            return scattered_sum(y.astype(self.share), axis, self.rounded_to), dropped
        tokens, top_k = ids.shape
        owner = jnp.where(all_ids >= 0, all_ids // width, -1).reshape(ranks, tokens, top_k)
        wanted = (owner[None] == jnp.arange(ranks)[:, None, None, None]).any(-1)
        route, lost = find_route(wanted, axis, top_k, self.capacity)
        received = take_rows(own(all_ids), route.who, -1)
        y, dropped = inner(send(route, x), take_rows(all_weights, route.who, 0), received, width)
        here = jnp.sum(lost[..., None] & (owner == me), dtype=jnp.int32)
        return send_back(route, y.astype(self.share)), dropped + here


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
    return is_slice(node) or _is_spec(node)


def _is_spec(node: Any) -> bool:
    return isinstance(node, jax.sharding.PartitionSpec)


def _of_stack(one: jax.sharding.PartitionSpec, leaf: Any) -> Any:
    """The spec of a leaf, which may be a slice of a stack."""
    if not isinstance(leaf, LayerSlice):
        return one
    index = None if leaf.index is None else spec()
    return LayerSlice(jax.sharding.PartitionSpec(None, *one), index, leaf.group)  # type: ignore[arg-type]
