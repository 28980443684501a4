"""Checkpoint tensors in numpy: safetensors files of any dtype, and what quantised linears in them mean.

Written from the formats' definitions; nothing here calls the package.
"""

import functools
import json
import pathlib

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(value): key for key, value in _DTYPES.items()}

E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column 8 c + this


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    header, parts, offset = {}, [], 0
    for name, value in tensors.items():
        data = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": _NAMES[np.asarray(value).dtype],
            "shape": list(np.shape(value)),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[start:stop], _DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors


def split(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Codes of int32 words in ascending order of the bits, spread along `axis`."""
    count = 32 // bits
    codes = (words.astype(np.int64)[..., None] >> (bits * np.arange(count))) & (2**bits - 1)
    codes = np.moveaxis(codes, -1, axis + 1)
    shape = list(words.shape)
    shape[axis] *= count
    return codes.reshape(shape)


def join(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The inverse of `split`."""
    count = 32 // bits
    moved = np.moveaxis(codes.astype(np.uint32), axis, -1)
    fields = moved.reshape(*moved.shape[:-1], -1, count) << (bits * np.arange(count, dtype=np.uint32))
    return np.ascontiguousarray(np.moveaxis(np.bitwise_or.reduce(fields, axis=-1), -1, axis)).view(np.int32)


def nibbles(data: np.ndarray, *, low_first: bool = True) -> np.ndarray:
    low, high = data.view(np.uint8) & 15, data.view(np.uint8) >> 4
    pair = (low, high) if low_first else (high, low)
    return np.stack(pair, axis=-1).reshape(*data.shape[:-1], -1)


def awq(t, m, *, group=64, columns=AWQ_COLUMNS) -> np.ndarray:
    spread = (np.arange(t[f"{m}.qweight"].shape[1])[:, None] * 8 + np.argsort(columns)).reshape(-1)
    codes, zeros = split(t[f"{m}.qweight"], 4, 1)[:, spread], split(t[f"{m}.qzeros"], 4, 1)[:, spread]
    rows = np.arange(codes.shape[0]) // group
    return (codes - zeros[rows]) * t[f"{m}.scales"].astype(np.float64)[rows]


def gptq(t, m, *, bits=4, plus=1) -> np.ndarray:
    codes, zeros = split(t[f"{m}.qweight"], bits, 0), split(t[f"{m}.qzeros"], bits, 1) + plus
    rows = t[f"{m}.g_idx"]
    return (codes - zeros[rows]) * t[f"{m}.scales"].astype(np.float64)[rows]


def pack_quantized(t, m, *, bits=4, offset=0) -> np.ndarray:
    codes = split(t[f"{m}.weight_packed"], bits, 1) - 2 ** (bits - 1) + offset
    n, k = t.get(f"{m}.weight_shape", codes.shape)  # a file need not have it
    codes = codes[:n, :k]
    scale = t[f"{m}.weight_scale"].astype(np.float64)
    group = -(-k // scale.shape[1])
    rows = np.arange(k) // group
    zeros = 0
    if f"{m}.weight_zero_point" in t:
        zeros = (split(t[f"{m}.weight_zero_point"], bits, 0)[:n] - 2 ** (bits - 1))[:, rows]
    return ((codes - zeros) * scale[:, rows]).T


def fp4(weight, scale, factor=1.0, *, low_first=True) -> np.ndarray:
    """[K, N] of bytes [N, K / 2]."""
    values = E2M1[nibbles(weight, low_first=low_first)]
    group = values.shape[1] // scale.shape[1]
    return (values * scale.astype(np.float64).repeat(group, axis=1) * factor).T


def nvfp4_compressed_tensors(t, m, **options) -> np.ndarray:
    factor = 1 / float(t[f"{m}.weight_global_scale"][0])
    return fp4(t[f"{m}.weight_packed"], t[f"{m}.weight_scale"], factor, **options)


def nvfp4_modelopt(t, m, **options) -> np.ndarray:
    return fp4(t[f"{m}.weight"], t[f"{m}.weight_scale"], float(t[f"{m}.weight_scale_2"]), **options)


def mxfp4_compressed_tensors(t, m, **options) -> np.ndarray:
    return fp4(t[f"{m}.weight_packed"], 2.0 ** (t[f"{m}.weight_scale"].astype(np.float64) - 127), **options)


def plain(t, m) -> np.ndarray:
    return t[f"{m}.weight"].astype(np.float64).T


def block(x, dense, router, *, top_k=2) -> np.ndarray:
    """Qwen3's layer in float64: softmax, the largest, renormalised, silu."""
    logits = x @ router
    p = np.exp(logits - logits.max(1, keepdims=True))
    out = np.zeros_like(x)
    for t, row in enumerate(p / p.sum(1, keepdims=True)):
        ids = np.argsort(-row)[:top_k]
        for e in ids:
            gate, up, down = dense[e]
            g = x[t] @ gate
            out[t] += row[e] / row[ids].sum() * ((g / (1 + np.exp(-g)) * (x[t] @ up)) @ down)
    return out


# By folder in tests/data: decoder, format, what it is quantised to on the way in.
GENUINE = {
    "ck_awq": (awq, "int4_zp", None),
    "ck_q3_gptq_False": (gptq, "int4", None),
    "ck_q3_gptq_True": (gptq, "int4", None),
    "ck_llmc_W4A16": (pack_quantized, "int4", None),
    "ck_llmc_W4A16_ASYM": (pack_quantized, "int4_zp", None),
    "ck_llmc_W8A16": (functools.partial(pack_quantized, bits=8), "int8", None),
    "ck_llmc_NVFP4A16": (nvfp4_compressed_tensors, "nvfp4", None),
    "ck_llmc_MXFP4A16": (mxfp4_compressed_tensors, "mxfp4", None),
    "ck_modelopt": (nvfp4_modelopt, "nvfp4", None),
}
