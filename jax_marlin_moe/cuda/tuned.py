"""Measured schemes for whole blocks: the table that ships with the package, and the user's own beside the cache.

A table maps a block (its shapes and formats) and a number of tokens to the scheme that was fastest on a card of that
architecture. Blocks that are in neither table, or only with token counts further off than a factor of the root of
two, are left to the cost model of tiles.py.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import tempfile

from jax_marlin_moe.cuda import cache
from jax_marlin_moe.cuda.tiles import BlockScheme, Tile, WgmmaTile

_SHIPPED = pathlib.Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class BlockKey:
    """What a measured scheme depends on, beside the number of tokens."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int
    codes: tuple[str, str]

    def __str__(self) -> str:
        return (
            f"E{self.num_experts} k{self.top_k} H{self.hidden} I{self.intermediate} "
            f"g{self.group_size} {self.codes[0]}/{self.codes[1]}"
        )


def lookup(key: BlockKey, tokens: int, architecture: str) -> BlockScheme | None:
    """The measured scheme for the nearest number of tokens, the user's table first.

    Within a factor of the root of two: further off, an expert's rows fill other blocks.
    """
    for path in (user_path(architecture), _SHIPPED / f"{architecture}.json"):
        entries = _load(path).get(str(key), {}) if path is not None else {}
        distance = {measured: abs(math.log2(int(measured) / tokens)) for measured in entries}
        if distance and min(distance.values()) <= 0.5:
            return _decode(entries[min(distance, key=lambda measured: distance[measured])])
    return None


def record(
    key: BlockKey, tokens: int, architecture: str, scheme: BlockScheme, path: pathlib.Path | None = None
) -> None:
    """Stores a scheme in the user's table, or in `path`; a directory that cannot be written is no error."""
    path = path or user_path(architecture)
    if path is None:
        return
    table = {name: dict(entries) for name, entries in _load(path).items()}
    entries = table.setdefault(str(key), {})
    entries[str(tokens)] = {
        "routing": scheme.routing,
        "gate_up": list(dataclasses.astuple(scheme.gate_up)),
        "down": list(dataclasses.astuple(scheme.down)),
        "overlaps": scheme.overlaps,
    }
    table[str(key)] = dict(sorted(entries.items(), key=lambda item: int(item[0])))
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(count)}: {json.dumps(entry)}" for count, entry in rows.items())
        + "\n }"
        for name, rows in sorted(table.items())
    ]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(temporary, path)


def user_path(architecture: str) -> pathlib.Path | None:
    """The user's table, or None when the cache is off."""
    root = cache.directory()
    return None if root is None else root / f"tuned-{architecture}.json"


def _load(path: pathlib.Path) -> dict:
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=8)
def _parse(path: pathlib.Path, modified: int) -> dict:
    blocks = json.loads(path.read_text())
    # What 0.1.0 stored has no routing: passed over, as an overlap was not measured either.
    return {name: {count: row for count, row in rows.items() if "routing" in row} for name, rows in blocks.items()}


def _decode(entry: dict) -> BlockScheme:
    tiles = _decode_tile(entry["gate_up"]), _decode_tile(entry["down"])
    return BlockScheme(entry["routing"], *tiles, overlaps=entry["overlaps"])


def _decode_tile(fields: list) -> Tile | WgmmaTile:
    """A `WgmmaTile` ends with a truth value; a `Tile` may leave out that it has no cluster."""
    kind = WgmmaTile if isinstance(fields[-1], bool) else Tile
    return kind(*fields)
