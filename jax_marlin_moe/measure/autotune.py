"""Measures schemes for a block on the card at hand and stores the fastest beside the kernel cache."""

import contextlib
import pathlib
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.block_scheme import block_key, measured_scheme
from jax_marlin_moe.cuda.compiler import CompilationError, compile_cubin, compute_capability, target_architecture
from jax_marlin_moe.cuda.grouped_gemm import gemm_shape
from jax_marlin_moe.cuda.program import Plan
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.propose import propose
from jax_marlin_moe.measure.random_layers import random_routings
from jax_marlin_moe.measure.replay import ReplayedPlan, operands_by_routing, plan_block
from jax_marlin_moe.measure.samples import Measurement
from jax_marlin_moe.measure.search import search
from jax_marlin_moe.shared_expert import packed_alike
from jax_marlin_moe.weights import MarlinWeights

# Of rest before each sample that decides: replays in a row drive the card into its power limit sooner or later.
_PAUSE_SECONDS = 0.01


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
    shared: Sequence[tuple[MarlinWeights, MarlinWeights]] = (),
) -> Measurement:
    """Finds the fastest scheme for a block of `tokens` tokens under uniform routing, and remembers it.

    What the tables have already is among the candidates. Later calls of `fused_moe` with these shapes use the winner
    when they are lowered, those of `moe_layer` where they have as many shared experts.

    Args:
        layers: (gate_up, down) pairs; several, so that together they exceed the L2 cache.
        tokens: rows of x.
        top_k: experts per token.
        dtype: of x.
        activation: between the products.
        candidates_per_product: tiles measured for each product and token tile, best predicted first.
        repetitions: routings in one replay.
        table: where to store the winner instead of the user's table.
        shared: of each layer, the experts that every token visits in the same kernels, packed as the others.

    Raises:
        ValueError: no tile fits the products, or shared experts are not packed as the others.
    """
    architecture = target_architecture()
    capability = compute_capability(architecture)
    gate_up, down = layers[0]
    ids = random_routings(gate_up.num_experts, top_k, tokens, repetitions, seed=1)  # other ones than the benches draw
    count = _shared_experts(layers, shared)
    every = np.arange(gate_up.num_experts, gate_up.num_experts + count, dtype=ids.dtype)
    ids = np.concatenate([ids, np.broadcast_to(every, (*ids.shape[:2], count))], axis=-1)
    timer = _Timer(layers, shared, ids, jnp.dtype(dtype), get_activation(activation), architecture)
    key = block_key(gate_up, down, top_k, count)
    shapes = gemm_shape(gate_up, timer.activation.gated, timer.x.dtype), gemm_shape(down, False, timer.x.dtype)
    groups = propose(
        *shapes,
        tokens=tokens,
        top_k=top_k,
        experts_hit=float(np.mean([len(np.unique(chosen)) for chosen in ids])),
        capability=capability,
        tiles_per_product=candidates_per_product,
        shared=count,
    )
    known = measured_scheme(gate_up, down, top_k, tokens, architecture, count)
    best = search(groups, known if known is not None and known.fits(*shapes, capability) else None, timer)
    if best is None:
        raise ValueError(f"no kernel tile fits {shapes[0]} and {shapes[1]} with {tokens} tokens on {architecture}")
    tables.record(key, tokens, architecture, best.scheme, table)
    return best


def _shared_experts(
    layers: Sequence[tuple[MarlinWeights, MarlinWeights]], shared: Sequence[tuple[MarlinWeights, MarlinWeights]]
) -> int:
    """How many of them a layer has; raises ValueError where they are no further experts of the layers."""
    if not shared:
        return 0
    if len(shared) != len(layers):
        raise ValueError(f"shared has {len(shared)} layers; it must have {len(layers)}, as layers has")
    pairs = [pair for both in zip(layers, shared, strict=True) for pair in zip(*both, strict=True)]
    if not all(packed_alike(*pair) for pair in pairs):
        raise ValueError("shared is not packed as layers; it must have their formats, groups and sizes, without biases")
    return shared[0][0].num_experts


class _Timer:
    """Times schemes of one block on the card."""

    def __init__(
        self,
        layers: Sequence[tuple[MarlinWeights, MarlinWeights]],
        shared: Sequence[tuple[MarlinWeights, MarlinWeights]],
        ids: np.ndarray,
        dtype: jnp.dtype,
        activation: Activation,
        architecture: str,
    ) -> None:
        repetitions, tokens, slots = ids.shape
        self.gate_up, self.down = layers[0]
        self.x = jax.random.normal(jax.random.key(0), (tokens, self.gate_up.k), dtype)
        self.activation = activation
        self._architecture = architecture
        self._shared = shared[0][0].num_experts if shared else 0
        self._top_k = slots - self._shared
        router = jnp.full((tokens, slots), 1 / slots, jnp.float32)
        self._operands = operands_by_routing(self.x, layers, [router] * repetitions, ids, shared)

    def compiled(self, schemes: Sequence[BlockScheme]) -> list[BlockScheme]:
        """Those of the schemes that compile: the register budget of one candidate is no reason to stop."""
        with ThreadPoolExecutor() as pool:
            return [s for s, compiles in zip(schemes, pool.map(self._compiles, schemes), strict=True) if compiles]

    def measure(self, scheme: BlockScheme) -> Measurement:
        """Medians of five samples, of the block and of each product."""
        with contextlib.closing(self._replayed(scheme)) as kernels:
            products = [[kernels.plan.position(stage)] for stage in ("gate_up", "down")]
            times = [statistics.median(kernels.microseconds(k, samples=5)) for k in (None, *products)]
        return Measurement(scheme, *times)

    def rested_block_us(self, scheme: BlockScheme) -> float:
        """The median of nine samples with a rest before each."""
        with contextlib.closing(self._replayed(scheme)) as kernels:
            return statistics.median(kernels.microseconds(samples=9, pause_seconds=_PAUSE_SECONDS))

    def _plan(self, scheme: BlockScheme) -> Plan:
        return plan_block(
            self.x,
            self.gate_up,
            self.down,
            top_k=self._top_k,
            activation=self.activation,
            scheme=scheme,
            shared=self._shared,
        )

    def _compiles(self, scheme: BlockScheme) -> bool:
        try:
            compile_cubin(self._plan(scheme).source, self._architecture)
        except CompilationError:
            return False
        return True

    def _replayed(self, scheme: BlockScheme) -> ReplayedPlan:
        results = [jax.ShapeDtypeStruct((self.x.shape[0], self.down.padded_n), self.x.dtype)]
        return ReplayedPlan(self._plan(scheme), self._operands, results)
