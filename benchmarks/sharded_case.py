"""What `benchmarks.sharded` times: blocks of a model over the cards of a mesh, by recipe."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from benchmarks.sharded_profile import module_of
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import ModelShape
from jax_marlin_moe.measure.random_layers import random_routings
from jax_marlin_moe.ops.fused_moe import share_of_block
from jax_marlin_moe.ops.sums import rounded_sum, scattered_sum
from jax_marlin_moe.sharding import parallel_experts
from jax_marlin_moe.sharding.exchange import find_route, send, send_back
from jax_marlin_moe.sharding.specs import matrix_specs

EXPERT, TENSOR = "expert", "tensor"
AXES = (EXPERT, TENSOR)
COPIES = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a block is over cards.

    Attributes:
        name: of the kind and the exchange.
        expert: cards along the axis of the experts.
        tensor: cards along the axis of the intermediate dimension.
        exchange: of rows, where the tokens are over the cards, too; None where every card has all of them.
        shares: the dtype of the cards' shares on their way to their sum.
        copies: whether XLA copies shares between two cards by their copy engines, not by NCCL's kernels.
    """

    name: str
    expert: int
    tensor: int
    exchange: str | None = None
    shares: str = "float32"
    copies: bool = False

    @property
    def kind(self) -> str:
        """Its name without the exchange and the shares: which weights a card has."""
        return self.name.removesuffix("-bf16").removesuffix("-peer").removesuffix(f"-{self.exchange}")

    @property
    def between(self) -> str:
        """The name of what goes between the cards without experts: two cards' sums are the same for both kinds."""
        one = self.name if self.exchange or not (self.expert == 1 or self.tensor == 1) else self.name.partition("-")[2]
        return f"{one or 'sum'} between"

    @property
    def sizes(self) -> tuple[int, int]:
        """Of both axes."""
        return self.expert, self.tensor

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of more than one card."""
        return tuple(axis for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes over which tokens are."""
        return self.axes if self.exchange else ()


def recipes(cards: int) -> list[Recipe]:
    """All that so many cards have; experts and the intermediate dimension together from four cards on."""
    kinds = {"ep": (cards, 1), "tp": (1, cards)}
    if cards >= 4 and cards % 2 == 0:
        kinds["ep-tp"] = (2, cards // 2)
    found = [Recipe(kind, *sizes) for kind, sizes in kinds.items()]
    found += [Recipe(f"{kind}-bf16", *sizes, shares="bfloat16") for kind, sizes in kinds.items()]
    if cards == 2:
        found += [Recipe(f"{kind}-peer", *sizes, copies=True) for kind, sizes in kinds.items()]
    for kind, sizes in kinds.items():
        found.append(Recipe(f"{kind}-gather", *sizes, "gather"))
        if sizes[0] > 1:
            found.append(Recipe(f"{kind}-ragged", *sizes, "ragged"))
    return found


def blocks_of(tokens: int) -> int:
    """Blocks of a chain: a call lasts some milliseconds."""
    return 8 if tokens <= 1024 else 4 if tokens <= 4096 else 2


def _hashed(*extents: int, last: Any = None) -> jax.Array:
    """Random words that depend on their place alone; `last` has the places along the last axis."""
    last = jnp.arange(extents[-1], dtype=jnp.uint32) if last is None else last
    words = last.reshape((1,) * (len(extents) - 1) + (-1,))
    for axis in range(len(extents) - 1):
        place = lax.broadcasted_iota(jnp.uint32, extents, axis)
        words = (words ^ (place + jnp.uint32(1013904223 * (axis + 1) % 2**32))) * jnp.uint32(2654435761)
        words = words ^ (words >> 15)
    return lax.bitcast_convert_type(words * jnp.uint32(2246822519), jnp.int32)


def _matrix(shape: ModelShape, weight_format: str, k: int, n: int, shares: int = 0) -> jmm.MarlinWeights:
    """All experts of a matrix (k, n); `shares` is for how many cards gate and up are laid out."""
    row = get_format(weight_format)
    experts, per_column = shape.num_experts, 16 // row.codes_per_word
    place = jnp.arange(per_column * n, dtype=jnp.uint32)
    if shares:  # gate and up of each share, where they are in [gate | up]
        share = per_column * n // (2 * shares)
        rank, half, rest = place // (2 * share), place // share % 2, place % share
        place = half * (shares * share) + rank * share + rest
    packed = _hashed(experts, k // 16, per_column * n, last=place)
    group = shape.grouped(row).group_size
    kind, value, factors = (jnp.bfloat16, 0.25 / k**0.5, None)
    if row.has_global_scales:
        kind, value, factors = jnp.uint8, 0x38, jnp.full((experts, n // 64), 0.4 / k**0.5, jnp.float32)
    scales = jnp.full((experts, k // group, n), value, kind)
    layout = f"a16/{n // shares}" if shares else "a16"
    return jmm.MarlinWeights(packed, scales, None, None, None, row, group, layout, factors)


def _block_of(shape: ModelShape, weight_format: str, shares: int) -> tuple[jmm.MarlinWeights, jmm.MarlinWeights]:
    """Both matrices of a block."""
    hidden, inner = shape.hidden, shape.intermediate
    return _matrix(shape, weight_format, hidden, 2 * inner, shares), _matrix(shape, weight_format, inner, hidden)


def _first_share(make: Any, specs: Any, sizes: dict[str, int]) -> Any:
    """What the first rank has of the weights that `make` returns."""

    def first(leaf: jax.Array, one: P) -> jax.Array:
        parts = [1 if axis is None else sizes[axis] for axis in one] + [1] * (leaf.ndim - len(one))
        return leaf[tuple(slice(extent // size) for extent, size in zip(leaf.shape, parts, strict=True))]

    return jax.tree.map(first, make(), specs)


def _unit_rows(x: jax.Array) -> jax.Array:
    """Rows of unit length: blocks in a row would overflow."""
    scale = lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
    return (x * scale).astype(x.dtype)


def _chained(block: Any, x: jax.Array, matrices: Any, weights: jax.Array, ids: jax.Array) -> jax.Array:
    """Blocks one after another."""
    return lax.scan(lambda h, slots: (_unit_rows(block(h, *matrices, *slots)), None), x, (weights, ids))[0]


def _alone(experts: int, mapped: bool, x: jax.Array, matrices: Any, weights: jax.Array, ids: jax.Array) -> jax.Array:
    """The chain of what the first card computes, fed by itself."""
    kernels = "cuda" if jax.default_backend() == "gpu" else "cpu"

    def share(x, gate_up, down, weights, ids):
        gate_up = dataclasses.replace(gate_up, layout="a16")
        every = jnp.arange(experts, dtype=jnp.int32)
        expert_map = jnp.where(every < gate_up.num_experts, every, -1) if mapped else None
        options = {"activation": "silu", "expert_map": expert_map, "implementation": kernels}
        options |= {"out_dtype": jnp.dtype(jnp.float32), "rounded_to": x.dtype}
        return share_of_block(x, gate_up, down, weights, ids, **options).astype(x.dtype)

    return _chained(share, x, matrices, weights, ids)


def _exchanged(recipe: Recipe, experts: int, x: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
    """The chain of what goes between the cards, without experts."""

    def between(x, weights, ids):
        if not recipe.tokens:
            return rounded_sum(lax.pcast(x, recipe.axes, to="varying").astype(recipe.shares), recipe.axes, x.dtype)
        if recipe.exchange == "gather":
            x, weights, ids = (lax.all_gather(rows, recipe.axes, tiled=True) for rows in (x, weights, ids))
            y = x.astype(jnp.float32) * (weights.sum(-1, keepdims=True) + ids[:, :1])
            return scattered_sum(y, recipe.axes, x.dtype)
        weights, ids = (lax.all_gather(rows, EXPERT, tiled=True) for rows in (weights, ids))
        owner = (ids // (experts // recipe.expert)).reshape(recipe.expert, -1, ids.shape[1])
        wanted = (owner[None] == jnp.arange(recipe.expert)[:, None, None, None]).any(-1)
        route, _ = find_route(wanted, EXPERT, ids.shape[1], None)
        return send_back(route, send(route, x).astype(jnp.float32) + weights[0, 0])

    return lax.scan(lambda h, slots: (between(h, *slots).astype(h.dtype), None), x, (weights, ids))[0]


@functools.cache
def _routings(shape: ModelShape, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Router weights and ids, [count, tokens, top_k]."""
    ids = random_routings(shape.num_experts, shape.top_k, tokens, count)
    weights = np.random.default_rng(7).uniform(0.5, 1.5, ids.shape).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True), ids


class Case:
    """One model and format: weights by recipe, and the programs of all of them.

    Args:
        shape: of the model's block.
        weight_format: a name of the format registry.
        devices: the cards.
        ranks: of the recipes: as many as cards, or more, of which the first card then is the first.
    """

    def __init__(self, shape: ModelShape, weight_format: str, devices: list[Any], ranks: int) -> None:
        self.shape, self.weight_format, self.devices, self.ranks = shape, weight_format, devices, ranks
        self._weights: dict[str, Any] = {}
        make = partial(_block_of, shape, weight_format)
        on_first = jax.sharding.SingleDeviceSharding(devices[0])
        self._weights["one"] = jax.jit(partial(make, 0), out_shardings=on_first)()
        for recipe in recipes(ranks):
            if recipe.name != recipe.kind:
                continue
            make_laid_out = partial(make, recipe.tensor if recipe.tensor > 1 else 0)
            specs = self._specs(recipe, jax.eval_shape(make_laid_out))
            first = partial(_first_share, make_laid_out, specs, dict(zip(AXES, recipe.sizes, strict=True)))
            self._weights[f"{recipe.kind} alone"] = jax.jit(first, out_shardings=on_first)()
            if self.together_runs:
                mesh = self._mesh(recipe)
                placed = jax.tree.map(lambda one, mesh=mesh: NamedSharding(mesh, one), specs, is_leaf=_is_spec)
                self._weights[recipe.kind] = jax.jit(make_laid_out, out_shardings=placed)()

    @property
    def together_runs(self) -> bool:
        """Whether there is a card for each rank."""
        return self.ranks == len(self.devices)

    def _mesh(self, recipe: Recipe) -> Mesh:
        cards = np.asarray(self.devices).reshape(recipe.sizes)
        return Mesh(cards, AXES, axis_types=(AxisType.Auto,) * 2)

    def _specs(self, recipe: Recipe, block: Any) -> Any:
        expert, tensor = ((axis,) if axis in recipe.axes else () for axis in AXES)
        return matrix_specs(block[0], expert, tensor), matrix_specs(block[1], expert, (), tensor)

    def _rows(self, tokens: int, place: Any, slots: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = jax.random.normal(jax.random.key(8), (tokens, self.shape.hidden), jnp.bfloat16)
        weights, ids = _routings(self.shape, tokens, blocks_of(tokens))
        return jax.device_put(x, place), jax.device_put(weights, slots), jax.device_put(ids, slots)

    def one(self, tokens: int) -> tuple[Any, tuple]:
        """The compiled chain of one card, and its arguments."""
        x, weights, ids = self._rows(tokens, self.devices[0], self.devices[0])
        return _compiled("one", partial(_chained, jmm.fused_moe), x, self._weights["one"], weights, ids)

    def alone(self, recipe: Recipe, tokens: int) -> tuple[Any, tuple]:
        """That of what the first card computes, by itself."""
        x, weights, ids = self._rows(tokens, self.devices[0], self.devices[0])
        run = partial(_alone, self.shape.num_experts, recipe.expert > 1)
        name = f"{recipe.kind} alone"
        return _compiled(name, run, x, self._weights[name], weights, ids)

    def together(self, recipe: Recipe, tokens: int) -> tuple[Any, tuple]:
        """That of all cards."""
        run = partial(
            parallel_experts,
            expert=EXPERT if recipe.expert > 1 else (),
            tensor=TENSOR if recipe.tensor > 1 else (),
            tokens=recipe.tokens,
            exchange=recipe.exchange or "gather",
            share_dtype=recipe.shares,
        )
        return self._over_cards(recipe, recipe.name, tokens, partial(_chained, run), self._weights[recipe.kind])

    def between(self, recipe: Recipe, tokens: int) -> tuple[Any, tuple]:
        """That of what goes between the cards, without experts."""
        run = partial(_exchanged, recipe, self.shape.num_experts)
        return self._over_cards(recipe, f"{recipe.name} between", tokens, run)

    def _over_cards(self, recipe: Recipe, name: str, tokens: int, run: Any, *matrices: Any) -> tuple[Any, tuple]:
        mesh, over = self._mesh(recipe), P(recipe.tokens or None)
        slots = P(None, *over)
        x, weights, ids = self._rows(tokens, NamedSharding(mesh, over), NamedSharding(mesh, slots))
        specs = over, *(self._specs(recipe, block) for block in matrices), slots, slots
        body = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=over)
        return _compiled(name, body, x, *matrices, weights, ids, options=COPIES if recipe.copies else None)

    def imbalance(self, recipe: Recipe, tokens: int) -> float:
        """Choices of the experts of the busiest card over those of the mean one."""
        _, ids = _routings(self.shape, tokens, blocks_of(tokens))
        owner = ids // (self.shape.num_experts // recipe.expert)
        counts = np.stack([(owner == rank).sum((1, 2)) for rank in range(recipe.expert)])
        return float(np.mean(counts.max(0) / counts.mean(0)))


def _compiled(name: str, function: Any, *arguments: Any, options: Any = None) -> tuple[Any, tuple]:
    def chain(*arguments: Any) -> jax.Array:
        return function(*arguments)

    chain.__name__ = module_of(name).removeprefix("jit_")
    return jax.jit(chain, compiler_options=options).lower(*arguments).compile(), arguments


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)
