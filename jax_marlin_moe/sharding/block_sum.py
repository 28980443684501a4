"""Blocks over the ranks of a mesh: how rows get to the ranks that have their experts, and sums back."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.ops.four_numbers import WORDS
from jax_marlin_moe.ops.fused_moe import can_pack
from jax_marlin_moe.ops.sums import rounded_sum, scattered_sum, sends_packed, sum_of_packed, where_packed
from jax_marlin_moe.ops.tangents import jvp_of, read_moving
from jax_marlin_moe.sharding.exchange import find_route, send, send_back, take_rows
from jax_marlin_moe.sharding.specs import Axes
from jax_marlin_moe.weights import MarlinWeights


class Experts(NamedTuple):
    """Those of one rank.

    Attributes:
        compute: `(matrices, rows, router weights, ids, *, out_dtype)` to their shares; ids count from the first of
            them, and -1 has none.
        matrices: gate_up and down, and what multiplies the columns of their rows, or None.
        slots: how many experts, or places for them, all ranks have.
        packs: whether ranks on CUDA may pack their shares in the kernels that compute them (`packed_shares.py`).
    """

    compute: Callable[..., jax.Array]
    matrices: tuple[MarlinWeights, MarlinWeights, Array | None]
    slots: int
    packs: bool = True


@dataclasses.dataclass(frozen=True)
class BlockSum:
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
        experts: Experts | None,
        x: Float[Array, "tokens H"],
        weights: Float32[Array, "tokens top_k"],
        ids: Int32[Array, "tokens top_k"],
        extra: Callable[[jax.Array], jax.Array] | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple[Float[Array, "tokens H"], Int32[Array, ""]]:
        """Results of this rank's tokens, and the choices that were dropped on this rank.

        Args:
            experts: those of this rank; None where only `extra` adds anything.
            x: rows.
            weights: of their choices.
            ids: of their choices; slots of all ranks.
            extra: rows to float32 shares that are added, or None.
            dtype: of the results.
        """
        if experts is not None and experts.packs and extra is None and self._packs_shares(experts.matrices, x, dtype):
            return self._packed_sum(experts, x, weights, ids, dtype), jnp.int32(0)
        if self.gathered:
            x, weights, ids = (lax.all_gather(rows, self.gathered, tiled=True) for rows in (x, weights, ids))
        y, dropped = jnp.float32(0), jnp.int32(0)
        if experts is not None:
            # What is added to something is not rounded before.
            out_dtype = self.share if extra is None else jnp.dtype(jnp.float32)
            compute = partial(experts.compute, experts.matrices, out_dtype=out_dtype)
            y, dropped = self._over(self.expert, compute, x, weights, ids, experts.slots)
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

    def _packed_sum(self, experts: Experts, x: Array, weights: Array, ids: Array, dtype: Any) -> Array:
        """The sum of shares that cards pack where they make them."""
        gathers, of_all = self._gathers, dataclasses.replace(self, tokens=())
        if gathers:
            x, weights, ids = (lax.all_gather(rows, gathers, tiled=True) for rows in (x, weights, ids))

        def shares(out_dtype: Any, matrices: Any, x: Array, weights: Array, ids: Array) -> Array:
            run = partial(experts.compute, matrices, out_dtype=out_dtype)
            return of_all._over(self.expert, run, x, weights, ids, experts.slots)[0]

        def plain(*operands: Any) -> Array:
            y = shares(jnp.dtype(jnp.float32), *operands)
            return scattered_sum(y, gathers, dtype, dtype=dtype) if gathers else rounded_sum(y, self.summed, dtype)

        def packed(*operands: Any) -> Array:
            return sum_of_packed(shares(WORDS, *operands), gathers or self.summed, dtype, scattered=bool(gathers))

        @jax.custom_jvp
        def total(*operands: Any) -> Array:
            return where_packed(packed, plain, *operands)

        def derivative(operands: Any, tangents: Any) -> tuple[Array, Array]:
            moving = jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, tangents)
            _, dot = jvp_of(plain, *read_moving(operands, moving))
            return total(*operands), dot

        total.defjvp(derivative, symbolic_zeros=True)
        return total(experts.matrices, x, weights, ids)

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
