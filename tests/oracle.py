"""What the ops compute, in float64 numpy, from codes that no packing has touched.

It states docs/formats.md, "Marlin layout", "Scales, zero points and bias", "Numerics" and "The expert block" anew.

Nothing here calls the package but to name the result: formats, packing and arithmetic are stated a second time.
Arrays are put on the device by `jax.device_put`: `jnp.asarray` compiles a program for every shape.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from oracle_layout import natural_scales, order_scales, pack_codes, pack_zeros, unpack_codes, unpack_zeros

import jax_marlin_moe as jmm


def _e2m1_values():
    """Sign, two exponent bits with bias 1, one mantissa bit."""
    code = np.arange(16)
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return np.where(code >> 3, -magnitude, magnitude)


def _e4m3_values():
    """Sign, four exponent bits with bias 7, three mantissa bits; all ones is NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude = np.where(code & 127 == 127, np.nan, magnitude)
    return np.where(code >> 7, -magnitude, magnitude)


def _e8m0_values():
    return np.where(np.arange(256) == 255, np.nan, 2.0 ** (np.arange(256) - 127.0))


def _float_values(exponent_bits, mantissa_bits):
    """Of 16 bits: sign, exponent and mantissa as IEEE 754 has them."""
    code = np.arange(1 << 16)
    exponent, mantissa = code >> mantissa_bits & (1 << exponent_bits) - 1, code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    fraction = np.where(exponent == 0, 0, 1) + mantissa / 2.0**mantissa_bits
    magnitude = fraction * 2.0 ** (np.maximum(exponent, 1) - float(bias))
    magnitude[exponent == (1 << exponent_bits) - 1] = np.nan  # infinities too: no weight is one
    return np.where(code >> 15, -magnitude, magnitude)


BF16, FP16 = _float_values(8, 7), _float_values(5, 10)
E2M1, E4M3, E8M0 = _e2m1_values(), _e4m3_values(), _e8m0_values()


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a format's name says: values of the codes, baked zero, stored zeros, values of scale bytes."""

    bits: int
    values: np.ndarray
    zero_point: int | None
    zeros: str | None
    scale_bytes: np.ndarray | None
    group_sizes: tuple[int, ...]
    per_channel: bool
    has_global_scales: bool = False


FACTS = {
    "int4": Facts(4, np.arange(16.0), 8, None, None, (16, 32, 64, 128), True),
    "int4_zp": Facts(4, np.arange(16.0), None, "integer", None, (16, 32, 64, 128), True),
    "int4_fzp": Facts(4, np.arange(16.0), None, "float", None, (64, 128), True),
    "int8": Facts(8, np.arange(256.0), 128, None, None, (32, 64, 128), True),
    "int8_zp": Facts(8, np.arange(256.0), None, "integer", None, (32, 64, 128), True),
    "int8_fzp": Facts(8, np.arange(256.0), None, "float", None, (64, 128), True),
    "fp8": Facts(8, E4M3, 0, None, None, (128,), True),
    "nvfp4": Facts(4, E2M1, 0, None, E4M3, (16,), False, has_global_scales=True),
    "mxfp4": Facts(4, E2M1, 0, None, E8M0, (32,), False),
    "mxfp8": Facts(8, E4M3, 0, None, E8M0, (32,), False),
    "bf16": Facts(16, BF16, 0, None, None, (128,), True),
    "fp16": Facts(16, FP16, 0, None, None, (128,), True),
}


def scale_dtypes(weight_format: str) -> tuple[str, ...]:
    return ("bfloat16", "float16", "float32") if FACTS[weight_format].scale_bytes is None else ("uint8",)


def group_sizes(weight_format: str) -> tuple[int | None, ...]:
    facts = FACTS[weight_format]
    return (*facts.group_sizes, None) if facts.per_channel else facts.group_sizes


def _padded(array: np.ndarray, rows: int, columns: int, value=0) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, rows), (0, columns)), constant_values=value)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Matrices `(value(codes) - zeros) * scales * global_scales`, rows in packed order.

    codes [E, K, N] uint8; scales [E, ceil(K / group_size), N], bytes where the format has bytes; zeros like scales or
    None; bias [E, N] or None; input_order [E, K] or None; global_scales [E, ceil(N / 64)] or None.
    """

    weight_format: str
    group_size: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    bias: np.ndarray | None = None
    input_order: np.ndarray | None = None
    global_scales: np.ndarray | None = None

    @property
    def facts(self) -> Facts:
        return FACTS[self.weight_format]

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def n(self) -> int:
        return self.codes.shape[2]

    def dense(self) -> np.ndarray:
        """[E, K, N], rows in the order in which they meet x."""
        group = np.arange(self.k) // self.group_size
        facts = self.facts
        scales = self.scales.astype(np.float64) if facts.scale_bytes is None else facts.scale_bytes[self.scales]
        zeros = float(facts.zero_point or 0) if self.zeros is None else self.zeros.astype(np.float64)[:, group]
        scaled = (facts.values[self.codes] - zeros) * scales[:, group]
        if self.global_scales is not None:
            scaled *= self.global_scales.astype(np.float64).repeat(64, axis=1)[:, None, : self.n]
        if self.input_order is None:
            return scaled
        dense = np.empty_like(scaled)
        for e, order in enumerate(self.input_order):
            dense[e, order] = scaled[e]
        return dense

    def packed(self) -> jmm.MarlinWeights:
        """In Marlin order, padded to whole tiles with codes of value zero and scales of zero."""
        facts, rows, columns = self.facts, -self.k % 16, -self.n % 64
        codes = _padded(self.codes, rows, columns, facts.zero_point or 0)
        zeros = None if self.zeros is None else _padded(self.zeros, 0, columns)
        if zeros is not None:
            zeros = jax.device_put(pack_zeros(zeros, facts.bits) if facts.zeros == "integer" else order_scales(zeros))
        return jmm.MarlinWeights(
            packed=jax.device_put(pack_codes(codes, facts.bits)),
            scales=jax.device_put(order_scales(_padded(self.scales, 0, columns))),
            zeros=zeros,
            bias=None if self.bias is None else jax.device_put(np.pad(self.bias, ((0, 0), (0, columns)))),
            input_order=None if self.input_order is None else jax.device_put(self.input_order),
            format=jmm.FORMATS[self.weight_format],
            group_size=min(self.group_size, self.k),
            global_scales=None if self.global_scales is None else jax.device_put(self.global_scales),
            row_padding=rows,
            column_padding=(columns,) if columns else (),
        )


def unpacked(weights: jmm.MarlinWeights) -> Experts:
    """What packed weights hold, without the rows' padding and with that of the columns."""
    facts = FACTS[weights.format.name]
    scales, zeros = np.asarray(weights.scales), None
    if facts.zeros == "integer":
        zeros = unpack_zeros(np.asarray(weights.zeros), scales.shape[-1], facts.bits)
    elif facts.zeros == "float":
        zeros = natural_scales(np.asarray(weights.zeros))
    return Experts(
        weight_format=weights.format.name,
        group_size=weights.group_size,
        codes=unpack_codes(np.asarray(weights.packed), facts.bits)[:, : weights.k],
        scales=natural_scales(scales),
        zeros=zeros,
        input_order=None if weights.input_order is None else np.asarray(weights.input_order),
        global_scales=None if weights.global_scales is None else np.asarray(weights.global_scales),
    )


def dense(weights: jmm.MarlinWeights) -> np.ndarray:
    """[E, K, N] in float64: the values of packed weights."""
    padded, paddings = unpacked(weights).dense(), weights.column_padding or (0,)
    parts = np.split(padded, len(paddings), axis=-1)
    return np.concatenate([part[..., : part.shape[-1] - n] for part, n in zip(parts, paddings, strict=True)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Joined:
    """Matrices side by side, each padded apart: [gate | up]."""

    parts: tuple[Experts, ...]

    @property
    def num_experts(self) -> int:
        return self.parts[0].num_experts

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def bias(self) -> np.ndarray | None:
        biases = [part.bias for part in self.parts]
        return None if biases[0] is None else np.concatenate(biases, axis=-1)

    def dense(self) -> np.ndarray:
        return np.concatenate([part.dense() for part in self.parts], axis=-1)

    def packed(self) -> jmm.MarlinWeights:
        return jmm.concatenate_columns([part.packed() for part in self.parts])


def random_experts(
    rng,
    num_experts,
    k,
    n,
    *,
    weight_format="int4",
    group_size=None,
    scale_dtype=jnp.bfloat16,
    bias=False,
    reordered=False,
) -> Experts:
    """Experts whose products with unit-variance rows have about unit variance."""
    facts = FACTS[weight_format]
    groups = -(-k // (group_size or k))
    shape = (num_experts, groups, n)
    codes = rng.integers(0, 2**facts.bits, (num_experts, k, n), dtype=np.uint8 if facts.bits <= 8 else np.uint16)
    if facts.values is E4M3:
        codes &= 0xBF  # magnitudes below 2: no NaN, and the small ones count
    if facts.bits == 16:  # of normal numbers: hardly any pattern is one that weights have
        numbers = rng.normal(size=codes.shape).astype(jnp.bfloat16 if facts.values is BF16 else np.float16)
        codes = numbers.view(np.uint16)
    target = 1 / (facts.values[codes].std() * np.sqrt(k))
    global_scales = None
    if facts.scale_bytes is E4M3:
        scales = rng.integers(1, 0x38, shape, dtype=np.uint8)  # up to 1; the first seven are subnormal
        factor = target / np.sqrt(np.mean(E4M3[scales] ** 2))
        if facts.has_global_scales:
            global_scales = (factor * rng.uniform(0.25, 1.5, (num_experts, -(-n // 64)))).astype(np.float32)
    elif facts.scale_bytes is E8M0:
        scales = (127 + round(math.log2(target)) + rng.integers(-3, 2, shape)).astype(np.uint8)
    else:
        scales = (rng.uniform(0.5, 1.5, shape) * target).astype(scale_dtype)
    zeros = None
    if facts.zeros == "integer":
        zeros = rng.integers(0, 2**facts.bits, shape, dtype=np.uint8)
    elif facts.zeros == "float":
        zeros = rng.uniform(-1, 2**facts.bits, shape).astype(scale_dtype)
    return Experts(
        weight_format=weight_format,
        group_size=group_size or k,
        codes=codes,
        scales=scales,
        zeros=zeros,
        bias=rng.normal(size=(num_experts, n)).astype(np.float32) if bias else None,
        input_order=np.argsort(rng.random((num_experts, k)), axis=1).astype(np.int32) if reordered else None,
        global_scales=global_scales,
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


def products(rows, experts: Experts | Joined, served, weights_dtype=np.float64) -> np.ndarray:
    """`rows[s] @ W[served[s]] + bias[served[s]]`, zero where nothing serves: [slots, N]."""
    dense = experts.dense().astype(weights_dtype).astype(np.float64)
    out = np.zeros((len(served), experts.n))
    for e in np.unique(served[served >= 0]):
        of_expert = served == e
        out[of_expert] = rows[of_expert].astype(np.float64) @ dense[e]
        out[of_expert] += 0 if experts.bias is None else experts.bias[e]
    return out


def grouped_product(x, experts: Experts, ids, *, expert_map=None, router_weights=None) -> np.ndarray:
    """What `moe_gemm` computes: [tokens * top_k, N]."""
    served = local_experts(ids, experts.num_experts, expert_map)
    out = products(x.repeat(ids.shape[1], axis=0), experts, served)
    return out if router_weights is None else out * router_weights.reshape(-1, 1)


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


_OF_ONE_VALUE = {
    "identity": lambda z: z,
    "silu": lambda z: z * _sigmoid(z),
    "gelu": lambda z: z / 2 * np.vectorize(math.erfc, otypes=[np.float64])(-z / np.sqrt(2)),
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
}
UNGATED = {"identity": "identity", "relu2": "relu2"} | {
    f"{name}_ungated": name for name in ("silu", "gelu", "gelu_tanh", "relu")
}
_GATED = {"none": "identity", "relu2_gated": "relu2"} | {name: name for name in ("silu", "gelu", "gelu_tanh", "relu")}


def activate(h, activation="silu", parameters=()) -> np.ndarray:
    """docs/formats.md, "The expert block", of [gate | up] columns or of all of them."""
    if activation in UNGATED:
        return _OF_ONE_VALUE[UNGATED[activation]](h)
    gate, up = np.split(h, 2, axis=1)
    if activation in _GATED:
        return _OF_ONE_VALUE[_GATED[activation]](gate) * up
    if activation == "swiglu_step":
        (limit,) = parameters
        return np.minimum(gate * _sigmoid(gate), limit) * np.clip(up, -limit, limit)
    if activation == "situ":
        beta, linear_beta = parameters
        up = up if math.isinf(linear_beta) else linear_beta * np.tanh(up / linear_beta)
        return beta * np.tanh(gate / beta) * _sigmoid(gate) * up
    assert activation == "swiglu"
    limit, alpha, beta = parameters
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * _sigmoid(alpha * gate) * (up + beta)


def expert_block(
    x,
    gate_up: Experts | Joined,
    down: Experts,
    router_weights,
    ids,
    *,
    expert_map=None,
    activation="silu",
    parameters=(),
    weights_dtype=np.float64,
) -> np.ndarray:
    """What `fused_moe` computes: [tokens, H]. The activation is rounded to the type of x, weights to theirs."""
    tokens, top_k = ids.shape
    served = local_experts(ids, gate_up.num_experts, expert_map)
    h = products(x.repeat(top_k, axis=0), gate_up, served, weights_dtype)
    activated = activate(h, activation, parameters).astype(x.dtype)
    y = products(activated, down, served, weights_dtype) * router_weights.reshape(-1, 1)
    return y.reshape(tokens, top_k, down.n).sum(1)


_RELATIVE_ERROR = {"float16": 1e-3, "bfloat16": 5e-3}  # docs/formats.md, "Numerics", of a product


def _cosine(a, b) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 if norms == 0 and not a.any() and not b.any() else float((a * b).sum() / norms)


def assert_product_close(actual, expected) -> None:
    """docs/formats.md, "Numerics" for a product, per row: one wrong row does not drown in the others."""
    limit = _RELATIVE_ERROR[jnp.dtype(actual.dtype).name]
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error, norm = np.linalg.norm(actual - expected, axis=1), np.linalg.norm(expected, axis=1)
    assert (error <= limit * norm).all(), f"relative error {np.max(error / np.maximum(norm, 1e-30))} over {limit}"
    if actual.size:
        assert _cosine(actual, expected) >= 0.999


def assert_block_close(actual, expected) -> None:
    """docs/formats.md, "Numerics" for an expert block, and the bound of a product on each row beside it."""
    assert_product_close(actual, expected)
    assert_block_accepted(actual, expected)


def assert_block_accepted(actual, expected) -> None:
    """docs/formats.md, "Numerics" for an expert block, and the bound of a product on all rows together."""
    limit = _RELATIVE_ERROR[jnp.dtype(actual.dtype).name]
    actual = np.asarray(actual).astype(np.float64)
    assert np.linalg.norm(actual - expected) <= limit * np.linalg.norm(expected)
    np.testing.assert_allclose(actual, expected, atol=0.05, rtol=0.02)
    if actual.size:
        assert _cosine(actual, expected) >= 0.9999
