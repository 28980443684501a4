"""Sizes that fall into equal shares, and errors that name those that do."""

import math

from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.weights import MarlinWeights

APPEND_ZEROS = (
    "append zeros to the intermediate dimension of the dense gate, up (columns) and down (rows) before they are "
    "packed; they change no result"
)


def group_rows(weights: MarlinWeights) -> int | None:
    """Rows under one scale, None where one scale covers any number of them."""
    return None if weights.num_groups == 1 and weights.format.per_channel else weights.group_size


def inner_share(size: int, group: int | None, ranks: int, *, pad: bool = False) -> int:
    """Columns of gate, and rows of down, that each rank has of an intermediate dimension: whole tiles and groups.

    Args:
        size: I, without padding.
        group: of `group_rows` of down.
        ranks: how many.
        pad: whether the last ranks may have zeros where the shares are not equal; the padding of the last tile and
            group always may be there.

    Raises:
        ValueError: there are no equal shares, and `pad` is False.
    """
    unit = math.lcm(TILE_N, TILE_K if group is None else group)
    units = -(-size // unit)
    if ranks < 1 or (units % ranks and not pad):
        rows = TILE_K if group is None else group
        check_shares(
            f"down has K = {size} rows",
            size,
            ranks,
            unit,
            f"whole tiles of {TILE_N} columns of gate_up and whole groups of {rows} rows of down",
            hint=f"{APPEND_ZEROS}, or pass pad=True",
        )
    return -(-units // ranks) * unit


def check_shares(what: str, size: int, ranks: int, step: int, shares: str, *, hint: str) -> None:
    """Raises ValueError unless `size` is `ranks` times a multiple of `step`; names the nearest sizes and counts."""
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    unit = ranks * step
    if size % unit == 0:
        return
    below = size // unit * unit
    nearest = f"{below} and {below + unit}" if below else f"{unit}"
    fitting = [count for count in range(1, size // step + 1) if size % (count * step) == 0]
    raise ValueError(
        f"{what}; {ranks} ranks need a multiple of {unit}, shares of {shares}: the nearest are {nearest}"
        + (f"; {size} falls into shares for {' or '.join(map(str, fitting))} ranks" if fitting else "")
        + f"; otherwise {hint}"
    )
