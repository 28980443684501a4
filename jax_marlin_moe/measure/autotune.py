"""Measures schemes for a block on the card at hand and stores the fastest beside the kernel cache."""

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.cuda import tuned
from jax_marlin_moe.cuda.compiler import CompilationError, compile_cubin, compute_capability, target_architecture
from jax_marlin_moe.cuda.plan import MOST_GROUPED_SLOTS, Plan, block_key, gemm_shape
from jax_marlin_moe.cuda.tiles import (
    TOKEN_TILES,
    BlockScheme,
    GemmShape,
    SlotRouting,
    Tile,
    WgmmaTile,
    block_sizes,
    candidates,
    expected_blocks,
    predicted_microseconds,
)
from jax_marlin_moe.measure.random_layers import random_routings
from jax_marlin_moe.measure.replay import ReplayedPlan, block_operands, plan_block
from jax_marlin_moe.weights import MarlinWeights

# Tiles of either product that are tried together with as many of the other.
_PAIRED_TILES = 3
# Of rest before each sample that decides: replays in a row drive the card into its power limit sooner or later.
_PAUSE_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A scheme and its device times in microseconds."""

    scheme: BlockScheme
    block_us: float
    gate_up_us: float
    down_us: float


def autotune(
    layers: Sequence[tuple[MarlinWeights, MarlinWeights]],
    *,
    tokens: int,
    top_k: int,
    dtype: DTypeLike = jnp.bfloat16,
    activation: str = "silu",
    candidates_per_product: int = 24,
    repetitions: int = 12,
    table: pathlib.Path | None = None,
) -> Measurement:
    """Finds the fastest scheme for a block of `tokens` tokens under uniform routing, and remembers it.

    What the tables have already is among the candidates. Later calls of `fused_moe` with these shapes use the winner
    when they are lowered.

    Args:
        layers: (gate_up, down) pairs; several, so that together they exceed the L2 cache.
        tokens: rows of x.
        top_k: experts per token.
        dtype: of x.
        activation: between the products.
        candidates_per_product: tiles measured for each product and block size, best predicted first.
        repetitions: routings in one replay.
        table: where to store the winner instead of the user's table.

    Raises:
        ValueError: no tile serves the products.
    """
    architecture = target_architecture()
    capability = compute_capability(architecture)
    act = get_activation(activation)
    gate_up, down = layers[0]
    experts, slots = gate_up.num_experts, tokens * top_k
    ids = random_routings(experts, top_k, tokens, repetitions, seed=1)  # other ones than the benches draw
    x = jax.random.normal(jax.random.key(0), (tokens, gate_up.k), dtype)
    router = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)
    operands = block_operands(x, layers, [router] * repetitions, ids)
    hit = float(np.mean([len(np.unique(chosen)) for chosen in ids]))

    def plan(scheme: BlockScheme) -> Plan:
        return plan_block(x, gate_up, down, top_k=top_k, activation=act, scheme=scheme)

    def compiles(scheme: BlockScheme) -> bool:
        try:
            compile_cubin(plan(scheme).source, architecture)
        except CompilationError:  # the register budget of one candidate is no reason to stop
            return False
        return True

    def compiled(schemes: Sequence[BlockScheme]) -> list[BlockScheme]:
        with ThreadPoolExecutor() as pool:
            return [scheme for scheme, good in zip(schemes, pool.map(compiles, schemes), strict=True) if good]

    def replayed(scheme: BlockScheme) -> ReplayedPlan:
        return ReplayedPlan(plan(scheme), operands, [jax.ShapeDtypeStruct((tokens, down.padded_n), x.dtype)])

    def measure(scheme: BlockScheme) -> Measurement:
        with contextlib.closing(replayed(scheme)) as kernels:
            products = [[kernels.plan.position(stage)] for stage in ("gate_up", "down")]
            times = [statistics.median(kernels.microseconds(k, samples=5)) for k in (None, *products)]
        return Measurement(scheme, *times)

    def rested_block_us(scheme: BlockScheme) -> float:
        with contextlib.closing(replayed(scheme)) as kernels:
            return statistics.median(kernels.microseconds(samples=9, pause_seconds=_PAUSE_SECONDS))

    key = block_key(gate_up, down, top_k)
    shapes = gemm_shape(gate_up, act.gated, x.dtype), gemm_shape(down, False, x.dtype)
    known = tuned.lookup(key, tokens, architecture)
    finalists = [known] if known is not None and known.fits(*shapes, capability) else []
    for routing, block in _block_sizes(tokens, slots, experts, shapes[0], capability):
        blocks = slots if routing == "direct" else max(hit, expected_blocks(slots, experts, experts, block))
        ranked = []
        for shape in shapes:
            tiles = candidates(shape, block, capability)
            tiles.sort(key=partial(predicted_microseconds, shape, expected_blocks=blocks, rows=slots / blocks))
            ranked.append(tiles[:candidates_per_product])
        if not all(ranked):  # no tile of this size serves one of the products
            continue
        count = max(map(len, ranked))
        schemes = [BlockScheme(routing, *(tiles[i % len(tiles)] for tiles in ranked)) for i in range(count)]
        measured = [measure(scheme) for scheme in compiled(schemes)]
        if not measured:
            continue
        # What is fastest alone need not be in a block: how a product ends decides how the next one begins. So the
        # fastest few of either product meet in pairs, with and without an overlap.
        pairs = [
            BlockScheme(routing, *tiles)
            for tiles in itertools.product(_fastest_tiles(measured, "gate_up"), _fastest_tiles(measured, "down"))
        ]
        finalists += [*compiled(pairs), min(measured, key=lambda m: m.block_us).scheme]
    if not finalists:
        raise ValueError(f"no kernel tile serves {shapes[0]} and {shapes[1]} with {tokens} tokens on {architecture}")
    block_us = {}
    for finalist, overlaps in itertools.product(dict.fromkeys(finalists), (True, False)):
        scheme = dataclasses.replace(finalist, overlaps=overlaps)
        block_us[scheme] = rested_block_us(scheme)
    best = min(block_us, key=block_us.__getitem__)
    if best.routing == "grouped":
        aligned = dataclasses.replace(best, routing="aligned")
        block_us[aligned] = rested_block_us(aligned)
    winner = min(block_us, key=block_us.__getitem__)
    tuned.record(key, tokens, architecture, winner, table)
    return dataclasses.replace(measure(winner), block_us=block_us[winner])


def _fastest_tiles(measured: Sequence[Measurement], product: str) -> list[Tile | WgmmaTile]:
    """The tiles of "gate_up" or "down" that took the least time alone, best first."""
    ranked = sorted(measured, key=lambda m: getattr(m, f"{product}_us"))
    return list(dict.fromkeys(getattr(m.scheme, product) for m in ranked))[:_PAIRED_TILES]


def _block_sizes(
    tokens: int, slots: int, experts: int, shape: GemmShape, capability: int
) -> list[tuple[SlotRouting, int]]:
    """(routing, rows of a block) worth measuring."""
    if tokens == 1:
        return [("direct", TOKEN_TILES[0])]
    routing: SlotRouting = "grouped" if slots <= MOST_GROUPED_SLOTS else "aligned"
    sizes = [(routing, size) for size in block_sizes(slots, experts, shape, capability)]
    return [*sizes, ("direct", TOKEN_TILES[0])] if slots <= 32 else sizes
