"""Blocks whose activations have 8 bits: random ones, and what they are in float64."""

import ml_dtypes
import numpy as np
from oracle import Experts, random_experts

DTYPES = ("float8_e4m3fn", "int8")
GROUPED = "float8_e4m3fn_g128"  # a scale for each 128 columns
LARGEST = {"float8_e4m3fn": np.float32(448), "int8": np.float32(127)}


def quantized(rows, dtype):
    """docs/formats.md, "8-bit activations": values in units of the scales, and the scales."""
    rows = np.float32(rows)
    if dtype == GROUPED:
        parts = [quantized(rows[:, k : k + 128], "float8_e4m3fn") for k in range(0, rows.shape[1], 128)]
        scales = [np.repeat(scales, values.shape[1], axis=1) for values, scales in parts]
        return np.concatenate([values for values, _ in parts], axis=1), np.concatenate(scales, axis=1)
    extent = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(2.0**-100))
    scales = extent * (1 / LARGEST[dtype])
    with np.errstate(all="ignore"):
        values = rows * (LARGEST[dtype] / extent)
        clipped = np.clip(values, -LARGEST[dtype], LARGEST[dtype])
        if dtype == "int8":
            return np.round(clipped), scales
        return np.float32(clipped.astype(ml_dtypes.float8_e4m3fn)), scales


def in_fixed_units(rows, scales, dtype="float8_e4m3fn"):
    """Values of the type nearest to rows in units of scales that are given, [rows] or one."""
    scales = np.broadcast_to(np.float32(scales).reshape(-1, 1), (len(rows), 1))
    clipped = np.clip(np.float32(rows) / scales, -LARGEST[dtype], LARGEST[dtype])
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


def product(rows, experts: Experts, chosen, dtype, scales=None):
    """Quantised rows times the matrices of their experts in float64; `scales` are fixed ones."""
    values, scales = quantized(rows, dtype) if scales is None else in_fixed_units(rows, scales, dtype)
    values, y = np.float64(values), np.zeros((len(rows), experts.n))
    for e, matrix in enumerate(experts.dense()):
        rows = values * np.float64(scales) @ matrix
        y[chosen == e] = rows[chosen == e] + (0 if experts.bias is None else experts.bias[e])
    return y


def quantized_block(first, second, x, weights, ids, dtype, x_scale=None, hidden_scales=None):
    """The block in float64 but for what is rounded: each row that a product reads, and the activation's result.

    Scales that are fixed are those of x, and of the rows between the products by expert; these are then not rounded to
    the type of x before.
    """
    slots = ids.reshape(-1)
    h = product(x.repeat(ids.shape[1], axis=0), first, slots, dtype, x_scale)
    gate, up = np.split(h, 2, axis=1)
    a = gate / (1 + np.exp(-gate)) * up
    if hidden_scales is None:
        y = product(a.astype(x.dtype), second, slots, dtype)
    else:
        y = product(a, second, slots, dtype, hidden_scales[np.clip(slots, 0, len(hidden_scales) - 1)])
    y *= ((slots >= 0) & (slots < first.num_experts))[:, None] * weights.reshape(-1, 1)
    return y.reshape(*ids.shape, -1).sum(1)


def relative_error(actual, wanted):
    return np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
