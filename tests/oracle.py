"""What the ops compute, in float64 numpy, from codes that no packing has touched.

Only `Experts.packed` calls the package: to hand it the same matrices in its own layout.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from jax_marlin_moe import layout


@dataclasses.dataclass(frozen=True)
class Experts:
    """Matrices `(codes - zeros) * scales`, rows in packed order.

    codes [E, K, N] uint8; scales [E, G, N]; zeros [E, G, N] or None for 8; bias [E, N] or None; input_order [E, K]
    or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bias: np.ndarray | None
    input_order: np.ndarray | None

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def n(self) -> int:
        return self.codes.shape[2]

    def dense(self) -> np.ndarray:
        """[E, K, N], rows in the order in which they meet x."""
        repeats = self.codes.shape[1] // self.scales.shape[1]
        zeros = 8.0 if self.zeros is None else self.zeros.astype(np.float64).repeat(repeats, axis=1)
        scaled = (self.codes.astype(np.float64) - zeros) * self.scales.astype(np.float64).repeat(repeats, axis=1)
        if self.input_order is None:
            return scaled
        dense = np.empty_like(scaled)
        for e, order in enumerate(self.input_order):
            dense[e, order] = scaled[e]
        return dense

    def packed(self) -> jmm.MarlinWeights:
        def device(array):
            return None if array is None else jnp.asarray(array)

        return jmm.MarlinWeights(
            packed=layout.pack(device(self.codes)),
            scales=layout.permute_scales(device(self.scales)),
            zeros=None if self.zeros is None else layout.pack_zeros(device(self.zeros)),
            bias=device(self.bias),
            input_order=device(self.input_order),
            format=jmm.FORMATS["int4" if self.zeros is None else "int4_zp"],
        )


def random_experts(
    rng, num_experts, k, n, *, group_size=None, scale_dtype=jnp.bfloat16, zeros=False, bias=False, reordered=False
) -> Experts:
    """Experts whose products with unit-variance rows have about unit variance."""
    groups = k // (group_size or k)
    scales = rng.uniform(0.5, 1.5, (num_experts, groups, n)) / (4.6 * np.sqrt(k))
    return Experts(
        codes=rng.integers(0, 16, (num_experts, k, n), dtype=np.uint8),
        scales=scales.astype(scale_dtype),
        zeros=rng.integers(0, 16, (num_experts, groups, n), dtype=np.uint8) if zeros else None,
        bias=rng.normal(size=(num_experts, n)).astype(np.float32) if bias else None,
        input_order=np.argsort(rng.random((num_experts, k)), axis=1).astype(np.int32) if reordered else None,
    )


def random_rows(rng, rows, columns, dtype) -> np.ndarray:
    return rng.normal(size=(rows, columns)).astype(dtype)


def random_routing(rng, tokens, top_k, num_experts, kind="distinct"):
    """Router weights and ids [tokens, top_k]; `kind` says how the ids are spread."""
    ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k]
    if kind == "one":
        ids = np.full_like(ids, num_experts - 1)
    elif kind == "few":
        ids = rng.choice([0, num_experts - 2], size=ids.shape)
    elif kind == "duplicates":
        ids = ids[:, :1].repeat(top_k, axis=1)
    elif kind == "holes":
        strays = rng.choice([-1, num_experts, num_experts + 7, -(2**31), 2**31 - 1], size=ids.shape)
        ids = np.where(rng.random(ids.shape) < 0.4, strays, ids)
    elif kind != "distinct":
        raise ValueError(kind)
    weights = rng.uniform(0.1, 1.0, (tokens, top_k))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32), ids.astype(np.int32)


def local_experts(ids, num_experts, expert_map=None) -> np.ndarray:
    """The expert that serves each slot, -1 where none does."""
    flat = np.asarray(ids).reshape(-1)
    served = [int(e) if 0 <= e < (num_experts if expert_map is None else len(expert_map)) else -1 for e in flat]
    if expert_map is not None:
        served = [int(expert_map[e]) if e >= 0 else -1 for e in served]
    return np.asarray([e if 0 <= e < num_experts else -1 for e in served], np.int64)


def products(rows, experts: Experts, served) -> np.ndarray:
    """`rows[s] @ W[served[s]] + bias[served[s]]`, zero where nothing serves: [slots, N]."""
    dense = experts.dense()
    out = np.zeros((len(served), experts.n))
    for slot, e in enumerate(served):
        if e >= 0:
            out[slot] = rows[slot].astype(np.float64) @ dense[e]
            out[slot] += 0 if experts.bias is None else experts.bias[e]
    return out


def grouped_product(x, experts: Experts, ids, *, expert_map=None, router_weights=None) -> np.ndarray:
    """What `moe_gemm` computes: [tokens * top_k, N]."""
    served = local_experts(ids, experts.num_experts, expert_map)
    out = products(x.repeat(ids.shape[1], axis=0), experts, served)
    return out if router_weights is None else out * router_weights.reshape(-1, 1)


def expert_block(x, gate_up: Experts, down: Experts, router_weights, ids, *, expert_map=None) -> np.ndarray:
    """What `fused_moe` computes: [tokens, H]. The activation is rounded to the type of x, nothing else is."""
    tokens, top_k = ids.shape
    served = local_experts(ids, gate_up.num_experts, expert_map)
    gate, up = np.split(products(x.repeat(top_k, axis=0), gate_up, served), 2, axis=1)
    activated = (gate / (1 + np.exp(-gate)) * up).astype(x.dtype)
    y = products(activated, down, served) * router_weights.reshape(-1, 1)
    return y.reshape(tokens, top_k, down.n).sum(1)


_RELATIVE_ERROR = {"float16": 1e-3, "bfloat16": 5e-3}  # FORMATS section 6, of a product


def _cosine(a, b) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 if norms == 0 and not a.any() and not b.any() else float((a * b).sum() / norms)


def assert_product_close(actual, expected) -> None:
    """FORMATS section 6 for a product, for every row by itself: one wrong row does not drown in the others."""
    limit = _RELATIVE_ERROR[jnp.dtype(actual.dtype).name]
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error, norm = np.linalg.norm(actual - expected, axis=1), np.linalg.norm(expected, axis=1)
    assert (error <= limit * norm).all(), f"relative error {np.max(error / np.maximum(norm, 1e-30))} over {limit}"
    if actual.size:
        assert _cosine(actual, expected) >= 0.999


def assert_block_close(actual, expected) -> None:
    """FORMATS section 6 for an expert block, and the bound of a product on each row beside it."""
    assert_product_close(actual, expected)
    actual = np.asarray(actual).astype(np.float64)
    np.testing.assert_allclose(actual, expected, atol=0.05, rtol=0.02)
    if actual.size:
        assert _cosine(actual, expected) >= 0.9999
