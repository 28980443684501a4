"""Tensors of small checkpoints, scheme by scheme, with what they mean in numpy; and a block in float64."""

import checkpoint_files as files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle

H, I, E = 128, 64, 4


E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16


def weight(rng, n, k, dtype=BF16):
    return (rng.normal(size=(n, k)) * k**-0.5).astype(dtype)


def router(rng, name="model.layers.0.mlp.gate.weight"):
    return {name: rng.normal(size=(E, H)).astype(BF16)}


def check(layer, gate, up, down):
    """Dense [E, K, N] in float64 against the packed weights."""
    gate_up = np.concatenate([gate, up], axis=2) if gate is not None else up
    np.testing.assert_allclose(oracle.dense(layer.gate_up), gate_up, rtol=2**-22, atol=0)
    np.testing.assert_allclose(oracle.dense(layer.down), down, rtol=2**-22, atol=0)


def expected_block(layer, x, gate, up, down, activation, biases=(0.0, 0.0, 0.0)):
    """float64, with the router's choice taken from the layer."""
    weights, ids = (np.asarray(a, np.float64) for a in layer.route(jax.device_put(x)))
    out = np.zeros_like(x, np.float64)
    bg, bu, bd = (np.broadcast_to(b, (E, 1)) if np.ndim(b) == 0 else b for b in biases)
    for t, (row, chosen) in enumerate(zip(weights, ids.astype(int), strict=True)):
        for w, e in zip(row, chosen, strict=True):
            source = x[t] * w if layer.routing.apply_on_input else x[t]
            g = source @ gate[e] + bg[e] if gate is not None else None
            u = source @ up[e] + bu[e]
            y = activation(g, u) @ down[e] + bd[e]
            out[t] += y if layer.routing.apply_on_input else w * y
    return out


def run_and_compare(layer, rng, gate, up, down, activation, biases=(0.0, 0.0, 0.0), extra=None):
    x = rng.normal(size=(9, H)).astype(np.float16).astype(np.float64)
    y = np.asarray(layer(jnp.asarray(x, jnp.float16)), np.float64)
    answer = expected_block(layer, x, gate, up, down, activation, biases)
    if extra is not None:
        answer += extra(x)
    assert np.linalg.norm(y - answer) <= 2e-3 * np.linalg.norm(answer)


def silu(g, u):
    return g / (1 + np.exp(-g)) * u


def clamped(g, u):
    g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
    return (u + 1) * g / (1 + np.exp(-1.702 * g))


def expert_tensors(rng, make, names=("gate_proj", "up_proj", "down_proj"), prefix="model.layers.0.mlp.experts"):
    """Tensors of all experts from `make(rng, n, k) -> (tensors by suffix, dense [K, N])`, and the dense stacks."""
    tensors, dense = {}, [[] for _ in names]
    for e in range(E):
        for i, name in enumerate(names):
            found, value = make(rng, *((H, I) if name in ("down_proj", "w2") else (I, H)))
            tensors |= {f"{prefix}.{e}.{name}{suffix}": tensor for suffix, tensor in found.items()}
            dense[i].append(value)
    return tensors, [np.stack(part) for part in dense]


def fp8_block(suffix, scale_dtype=np.float32):
    def make(rng, n, k):
        codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
        scale = 2.0 ** rng.integers(-9, -5, (-(-n // 128), -(-k // 128)))
        scale = scale.astype(scale_dtype)
        spread = scale.astype(np.float64).repeat(128, 0)[:n].repeat(128, 1)[:, :k]
        return {".weight": codes, suffix: scale}, (codes.astype(np.float64) * spread).T

    return make


def fp8_rows(kind):
    def make(rng, n, k):
        codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
        shape = {"tensor": (), "channel": (n, 1), "group": (n, -(-k // 128))}[kind]
        scale = rng.uniform(0.001, 0.01, shape).astype(BF16)
        found = {".weight": codes, ".weight_scale": scale, ".input_scale": np.float32(1)}
        wide = scale.astype(np.float64)
        wide = wide.repeat(128, 1)[:, :k] if kind == "group" else wide
        return found, (codes.astype(np.float64) * wide).T

    return make


def packed_fp4(weight_suffix, scale_suffix, weight_dtype, scale_dtype):
    def make(rng, n, k):
        data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        bits = rng.integers(118, 125, (n, k // 32), dtype=np.uint8)
        found = {weight_suffix: data.view(weight_dtype), scale_suffix: bits.view(scale_dtype)}
        return found, files.fp4(data, 2.0 ** (bits.astype(float) - 127))

    return make


def mxfp8(rng, n, k):
    codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
    bits = rng.integers(116, 120, (n, k // 32), dtype=np.uint8)
    dense = codes.astype(np.float64) * (2.0 ** (bits.astype(float) - 127)).repeat(32, 1)
    return {".weight": codes, ".weight_scale": bits}, dense.T


def gptq8(zeros, plus):
    return gptq(8, 32, zeros, plus)


def gptq(bits, group, zeros, plus):
    """`group` -1 is one group."""

    def make(rng, n, k):
        size = k if group == -1 else group
        codes, shape = rng.integers(0, 2**bits, (k, n)), (k // size, n)
        z = np.full(shape, 2 ** (bits - 1)) if zeros is None else rng.integers(1, 2**bits, shape)
        scale = rng.uniform(0.001, 0.002, shape).astype(np.float16)
        rows = np.arange(k) // size
        found = {
            ".qweight": files.join(codes, bits, 0),
            ".qzeros": files.join(z - plus, bits, 1),
            ".scales": scale,
            ".g_idx": rows.astype(np.int32),
        }
        return found, (codes - z[rows]) * scale.astype(float)[rows]

    return make


def compressed(bits, group, symmetric, dtype, shuffled=False):
    """`group` -1 is one group."""

    def make(rng, n, k):
        size = k if group == -1 else group
        codes, groups = rng.integers(0, 2**bits, (n, k)), k // size
        z = np.full((n, groups), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (n, groups))
        scale = rng.uniform(0.01, 0.02, (n, groups)).astype(dtype)
        rows = np.arange(k) // size
        if shuffled:  # the same for gate and up of an expert, as their input is
            rows = np.random.default_rng(k).permutation(rows)
        found = {
            ".weight_packed": files.join(codes, bits, 1),
            ".weight_scale": scale,
            ".weight_shape": np.asarray([n, k]),
        }
        if shuffled:
            found[".weight_g_idx"] = rows.astype(np.int32)
        if not symmetric:
            found[".weight_zero_point"] = files.join(z, bits, 0)
        return found, ((codes - z[:, rows]) * scale.astype(float)[:, rows]).T

    return make


def int_quantized(bits, group, symmetric, dtype, shape=None):
    """Signed integers in bytes of their own; `group` -1 is one group, whose scales may have another `shape`."""

    def make(rng, n, k):
        size, half = k if group == -1 else group, 2 ** (bits - 1)
        codes, groups = rng.integers(-half, half, (n, k)).astype(np.int8), k // size
        z = np.zeros((n, groups), np.int8) if symmetric else rng.integers(-half, half, (n, groups)).astype(np.int8)
        scale = rng.uniform(0.01, 0.02, {None: (n, groups), "row": (n,), "one": (1,)}[shape]).astype(dtype)
        wide = np.broadcast_to(scale.astype(float).reshape(-1, 1) if shape else scale.astype(float), (n, groups))
        rows = np.arange(k) // size
        found = {".weight": codes, ".weight_scale": scale, ".input_scale": np.float32(0.02)}
        if not symmetric:
            found[".weight_zero_point"] = z
        return found, ((codes.astype(int) - z[:, rows]) * wide[:, rows]).T

    return make


def w4afp8(group, dtype=np.float32):
    """Two signed codes in a byte, the even input feature in the low nibble."""

    def make(rng, n, k):
        codes = rng.integers(-8, 8, (n, k))
        scale = rng.uniform(0.01, 0.02, (n, k // group)).astype(dtype)
        data = (codes[:, ::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8)
        found = {".weight": data.view(np.int8), ".weight_scale_inv": scale}
        return found, (codes * scale.astype(float).repeat(group, 1)).T

    return make


def hqq(bits, dtype=np.float16, size=64):
    """`size` -1 is one group."""

    def make(rng, n, k):
        group = k if size == -1 else size
        codes = rng.integers(0, 2**bits, (n * k // group, group), dtype=np.uint8)
        half = len(codes) // 2
        data = codes[:half] << 4 | codes[half:] if bits == 4 else codes
        scale, zero = (rng.uniform(low, high, (len(codes), 1)).astype(dtype) for low, high in ((0.01, 0.02), (3, 9)))
        found = {
            ".W_q": data,
            ".scale": scale,
            ".zero": zero,
            ".axis": np.asarray(1),
            ".nbits": np.asarray(bits),
            ".group_size": np.asarray(group),
            ".shape": np.asarray([n, k]),
        }
        return found, ((codes - zero.astype(float)) * scale.astype(float)).reshape(n, k).T

    return make


def ct_config(bits=4, group=32, symmetric=True, **weights):
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    } | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False}


HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}


def modelopt_nvfp4(rng, n, k, group=16):
    data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    blocks = rng.integers(0, 0x7F, (n, k // group), dtype=np.uint8).view(E4M3)
    factor = np.float32(rng.uniform(0.01, 0.1))
    found = {".weight": data, ".weight_scale": blocks, ".weight_scale_2": factor}
    return found, files.fp4(data, blocks, float(factor))


MODULE = "model.layers.{}.mlp.experts.*"
