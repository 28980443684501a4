"""Checks of values that more than one scheme needs. They read numbers, so they need concrete arrays."""

import numpy as np


def bad_block_scales(scale: np.ndarray, *, exponent: bool) -> str | None:
    """What is wrong with block scales given as bit patterns (e8m0 if `exponent`, e4m3 otherwise), or None."""
    if exponent:
        return "NaN (e8m0 255)" if (scale == 255).any() else None
    if ((scale & 0x7F) == 0x7F).any():
        return "NaN (e4m3 0x7F or 0xFF)"
    return "negative values" if (scale > 0x80).any() else None


def row_order(index: np.ndarray, group_size: int) -> np.ndarray | None:
    """Rows sorted by their groups [..., K]; None where they already are.

    Raises:
        ValueError: a group has another number of rows than `group_size` (the last one: the rest).
    """
    k = index.shape[-1]
    natural = np.arange(k, dtype=np.int32) // group_size
    if (index == natural).all():
        return None
    order = np.argsort(index, axis=-1, kind="stable").astype(np.int32)
    if not (np.take_along_axis(index, order, axis=-1) == natural).all():
        raise ValueError(
            f"g_idx does not put exactly K / groups = {group_size} rows into each of {natural[-1] + 1} groups; such a "
            "matrix cannot be packed by groups: requantise it without desc_act or with static_groups"
        )
    return order
