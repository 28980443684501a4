"""Blocks whose activations have 8 bits: random ones, and what they are in float64."""

import ml_dtypes
import numpy as np
from oracle import Experts, random_experts

DTYPES = ("float8_e4m3fn", "int8")
LARGEST = {"float8_e4m3fn": np.float32(448), "int8": np.float32(127)}


def quantized(rows, dtype):
    """docs/formats.md, "8-bit activations": values in units of the scales, and the scales."""
    rows = np.float32(rows)
    extent = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(2.0**-100))
    scales = extent * (1 / LARGEST[dtype])
    with np.errstate(all="ignore"):
        values = rows * (LARGEST[dtype] / extent)
        clipped = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
        if dtype == "int8":
            return np.round(clipped), scales
        return np.float32(clipped.astype(ml_dtypes.float8_e4m3fn)), scales


def random_block(rng, tokens, experts, hidden, inner, *, dtype, scale_dtype, top_k=2, **options):
    """gate_up, down, x, router weights and ids; some slots have no expert, one row is of zeros."""
    options |= {"scale_dtype": scale_dtype}
    first = random_experts(rng, experts, hidden, 2 * inner, **options)
    second = random_experts(rng, experts, inner, hidden, **options)
    x = (rng.normal(size=(tokens, hidden)) * np.exp(rng.normal(size=(tokens, 1)))).astype(dtype)
    ids = rng.integers(0, experts, (tokens, top_k)).astype(np.int32)
    x[0] = 0
    ids[1, 0], ids[2] = -1, experts
    return first, second, x, rng.uniform(0.5, 1.5, (tokens, top_k)).astype(np.float32), ids


def product(rows, experts: Experts, chosen, dtype):
    """Quantised rows times the matrices of their experts in float64."""
    values, scales = quantized(rows, dtype)
    values, y = np.float64(values), np.zeros((len(rows), experts.n))
    for e, matrix in enumerate(experts.dense()):
        y[chosen == e] = (values @ matrix * scales)[chosen == e] + (0 if experts.bias is None else experts.bias[e])
    return y


def quantized_block(first, second, x, weights, ids, dtype):
    """The block in float64 but for what is rounded: each row that a product reads, and the activation's result."""
    slots = ids.reshape(-1)
    gate, up = np.split(product(x.repeat(ids.shape[1], axis=0), first, slots, dtype), 2, axis=1)
    y = product((gate / (1 + np.exp(-gate)) * up).astype(x.dtype), second, slots, dtype)
    y *= ((slots >= 0) & (slots < first.num_experts))[:, None] * weights.reshape(-1, 1)
    return y.reshape(*ids.shape, -1).sum(1)


def relative_error(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
