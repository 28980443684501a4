"""Where codes, scales and zero points lie in packed words, a second time: docs/formats.md, "Marlin layout"."""

import numpy as np

_PAIR_ORDER = {4: np.asarray([0, 4, 1, 5, 2, 6, 3, 7]), 8: np.asarray([0, 2, 1, 3]), 16: np.asarray([0, 1])}


def _fold(fields: np.ndarray, bits: int) -> np.ndarray:
    """[..., pf] codes, the i-th at bit `bits * i`, to int32 words."""
    shifts = np.uint32(bits) * np.arange(32 // bits, dtype=np.uint32)
    return np.bitwise_or.reduce(fields.astype(np.uint32) << shifts, axis=-1).view(np.int32)


def _spread(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_fold`."""
    shifts = np.uint32(bits) * np.arange(32 // bits, dtype=np.uint32)
    fields = words.view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return fields.astype(np.uint16 if bits == 16 else np.uint8)


def _code_places(rows: int, columns: int, bits: int):
    """Where code [k, n] lies: docs/formats.md, "Marlin layout". Packed tile, word and position in it."""
    k, n = np.arange(rows)[:, None], np.arange(columns)[None]
    r, c = k % 16, n % 64
    w, b, col = c // 16, c % 16 // 8, c % 8
    lane, i = 4 * col + r % 8 // 2, r % 2 + 2 * (r // 8) + 4 * b
    if bits == 4:
        return k // 16, n // 64 * 128 + lane * 4 + w, _PAIR_ORDER[4][i]
    if bits == 8:
        return k // 16, n // 64 * 256 + lane * 8 + 2 * w + b, _PAIR_ORDER[8][i % 4]
    return k // 16, n // 64 * 512 + lane * 16 + 4 * w + i // 2, i % 2


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """[E, K, N] to [E, K / 16, words]."""
    experts, rows, columns = codes.shape
    fields = np.zeros((experts, rows // 16, columns * bits // 2, 32 // bits), codes.dtype)
    fields[:, *_code_places(rows, columns, bits)] = codes
    return _fold(fields, bits)


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`."""
    _, tiles, words = packed.shape
    return _spread(packed, bits)[:, *_code_places(16 * tiles, 2 * words // bits, bits)]


def _scale_places(columns: int) -> np.ndarray:
    """Grouped order: docs/formats.md, "Scales, zero points and bias"."""
    n = np.arange(columns)
    return n // 64 * 64 + 8 * (n % 8) + n % 64 // 8


def order_scales(scales: np.ndarray) -> np.ndarray:
    """[..., N] in grouped order."""
    ordered = np.empty_like(scales)
    ordered[..., _scale_places(scales.shape[-1])] = scales
    return ordered


def natural_scales(scales: np.ndarray) -> np.ndarray:
    """The inverse of `order_scales`."""
    return scales[..., _scale_places(scales.shape[-1])]


def _zero_places(columns: int, bits: int):
    """Where the integer zero point of a column lies: docs/formats.md, "Scales, zero points and bias"."""
    n = np.arange(columns)
    unit, col, t = n // 64, n % 8, n % 64 // 8
    word = unit * 8 + col if bits == 4 else unit * 16 + 2 * col + t // 4
    return word, _PAIR_ORDER[bits][t % (32 // bits)]


def pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """[E, G, N] integer zero points to words."""
    fields = np.zeros((*zeros.shape[:-1], zeros.shape[-1] * bits // 32, 32 // bits), np.uint8)
    fields[..., *_zero_places(zeros.shape[-1], bits)] = zeros
    return _fold(fields, bits)


def unpack_zeros(words: np.ndarray, columns: int, bits: int) -> np.ndarray:
    """The inverse of `pack_zeros`."""
    return _spread(words, bits)[..., *_zero_places(columns, bits)]
