"""Measured schemes for whole blocks: the table that ships with the package, and the user's own beside the cache.

A table maps a block (its shapes and formats) and a number of tokens to the scheme that was fastest on a card of that
architecture. Blocks that are in neither table, or only with other token counts (`lookup`), are left to the cost model
of choose.py.

    {"version": 2,
     "E8 k2 H4096 I14336 g128 int4/int4": {
      "16": {"routing": "grouped", "gate_up": ["mma", 16, ...], "down": ["wgmma", 16, ...], "overlaps": true}}}

A tile is its kind and the fields of `MmaTile` or `WgmmaTile`. Version 1 has neither kinds nor a number of its own: a
tile that ends with a truth value is a `WgmmaTile` there. Rows are checked one by one: what is not understood is
skipped, with one warning for each table, and `record` keeps it.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import typing
import warnings

from jax_marlin_moe.cuda import cache
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.scheme import KERNELS, BlockScheme, SlotRouting, Tile
from jax_marlin_moe.cuda.token_ranges import most_tokens

_VERSION = 2
_VERSION_KEY = "version"
_MOST_BYTES = 16 << 20  # of a table; the shipped one has some 20 KB
_MOST_FIELD = 1 << 20  # of a tile's numbers
_ROW = {"routing", "gate_up", "down", "overlaps"}

_SHIPPED = pathlib.Path(__file__).parent / "scheme_tables"


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

    Within a factor of the root of two: further off, an expert's rows fill other blocks. Of counts that share a program
    with others (`most_tokens`), one of the same range: with many rows a quarter more fills other blocks already.
    """
    most = most_tokens(tokens)
    for path in (user_path(architecture), _SHIPPED / f"{architecture}.json"):
        schemes = _schemes(path).get(str(key), {}) if path is not None else {}
        distance = {
            measured: abs(math.log2(measured / tokens)) for measured in schemes if most_tokens(measured) == most
        }
        if distance and min(distance.values()) <= 0.5:
            return schemes[min(distance, key=lambda measured: distance[measured])]
    return None


def record(
    key: BlockKey, tokens: int, architecture: str, scheme: BlockScheme, path: pathlib.Path | None = None
) -> None:
    """Stores a scheme in the user's table, or in `path`; a directory that cannot be written is not an error.

    Rows and fields that this version does not understand stay as they are, but for the row that is stored. A file that
    is not a table is moved aside, and a table of a newer version is left alone, with a warning.
    """
    path = path or user_path(architecture)
    if path is None:
        return
    with contextlib.suppress(OSError):
        try:
            table = _read(path)
        except FileNotFoundError:
            table = {}
        except _NewerVersionError as error:
            warnings.warn(f"{path}: {error}; nothing is stored", UserWarning, stacklevel=2)
            return
        except ValueError as error:
            aside = path.with_name(path.name + ".unreadable")
            os.replace(path, aside)
            warnings.warn(f"{path}: {error}; it is now {aside}", UserWarning, stacklevel=2)
            table = {}
        rows = table.get(str(key))
        rows = {**(rows if isinstance(rows, dict) else {}), str(tokens): _encode(scheme)}
        # Numbers of tokens in their order, before what is none.
        table[str(key)] = dict(sorted(rows.items(), key=lambda row: (_tokens(row[0]) or math.inf, row[0])))
        cache.write_file(path, _text(table).encode())


def user_path(architecture: str) -> pathlib.Path | None:
    """The user's table, or None when the cache is off."""
    root = cache.directory()
    return None if root is None else root / f"tuned-{architecture}.json"


class _NewerVersionError(ValueError):
    """A table of a version that may mean something else by the same words."""


def _read(path: pathlib.Path) -> dict:
    """The table as it is written; ValueError for what is not a table, OSError for what cannot be read."""
    try:
        table = json.loads(cache.read_regular_file(path, _MOST_BYTES))
    except RecursionError:
        raise ValueError("is nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"holds {type(table).__name__}; it must hold an object of blocks")
    version = table.get(_VERSION_KEY, 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"version is {version!r}; it must be a positive integer")
    if version > _VERSION:
        raise _NewerVersionError(f"version is {version}; it must be at most {_VERSION}: update jax_marlin_moe")
    return table


def _schemes(path: pathlib.Path) -> dict[str, dict[int, BlockScheme]]:
    try:
        status = path.stat()
    except OSError:
        return {}
    return _parse(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _parse(path: pathlib.Path, modified: int, size: int) -> dict[str, dict[int, BlockScheme]]:
    """What is understood of a table; warns of the rest, once for each state of the file."""
    schemes: dict[str, dict[int, BlockScheme]] = {}
    faults: list[str] = []
    try:
        table = _read(path)
    except OSError:
        return {}
    except ValueError as error:
        table = {}
        faults.append(f"the table {error}")
    for name, rows in table.items():
        if name == _VERSION_KEY:
            continue
        if not isinstance(rows, dict):
            faults.append(f"{name!r} holds {type(rows).__name__}; it must hold an object of rows")
            continue
        for count, row in rows.items():
            # What 0.1.0 stored has no routing: passed over, as an overlap was not measured either.
            if isinstance(row, dict) and "direct" in row and "routing" not in row:
                continue
            try:
                tokens = _tokens(count)
                if tokens is None:
                    raise ValueError(f"{count[:20]!r} is not a number of tokens")
                schemes.setdefault(name, {})[tokens] = _decode(row)
            except ValueError as error:
                faults.append(f"{name!r}, row {count[:20]!r}: {error}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        warnings.warn(
            f"{path}: skipped what is not understood: {faults[0]}{more}; delete it or tune again",
            UserWarning,
            stacklevel=4,
        )
    return schemes


def _tokens(count: str) -> int | None:
    return int(count) if re.fullmatch("[1-9][0-9]{0,9}", count) else None


def _encode(scheme: BlockScheme) -> dict:
    return {
        "routing": scheme.routing,
        "gate_up": _encode_tile(scheme.gate_up),
        "down": _encode_tile(scheme.down),
        "overlaps": scheme.overlaps,
    }


def _encode_tile(tile: Tile) -> list:
    (kind,) = (name for name, kernel in KERNELS.items() if isinstance(tile, kernel.tile))
    return [kind, *dataclasses.astuple(tile)]


def _text(table: dict) -> str:
    """JSON with a line for each row."""
    lines = [f" {json.dumps(_VERSION_KEY)}: {_VERSION}"]
    for name, rows in sorted(item for item in table.items() if item[0] != _VERSION_KEY):
        if isinstance(rows, dict) and rows:
            entries = ",\n".join(f"  {json.dumps(count)}: {json.dumps(row)}" for count, row in rows.items())
            lines.append(f" {json.dumps(name)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(rows)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _decode(row: object) -> BlockScheme:
    """ValueError where a row has other fields than these, or values of other types."""
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}; it must be an object")
    if row.keys() != _ROW:
        raise ValueError(f"it has {', '.join(sorted(row)) or 'nothing'}; it must have {', '.join(sorted(_ROW))}")
    routings = typing.get_args(SlotRouting)
    if row["routing"] not in routings:
        raise ValueError(f"routing is {row['routing']!r}; it must be one of {', '.join(routings)}")
    if not isinstance(row["overlaps"], bool):
        raise ValueError(f"overlaps is {row['overlaps']!r}; it must be true or false")
    tiles = (_decode_tile(product, row[product]) for product in ("gate_up", "down"))
    return BlockScheme(row["routing"], *tiles, overlaps=row["overlaps"])


def _decode_tile(product: str, fields: object) -> Tile:
    """Of either version; an `MmaTile` of version 1 may lack the cluster, which is 1."""
    if not isinstance(fields, list) or not fields:
        raise ValueError(f"{product} is {str(fields)[:80]!r}; it must be a list, a kind and numbers")
    named = isinstance(fields[0], str)
    name = fields[0] if named else "wgmma" if isinstance(fields[-1], bool) else "mma"
    if name not in KERNELS:
        raise ValueError(f"{product} is a tile of kind {name[:20]!r}; it must be one of {', '.join(sorted(KERNELS))}")
    kind, values = KERNELS[name].tile, fields[1:] if named else fields
    declared = dataclasses.fields(kind)
    required = len(declared) - (kind is MmaTile and not named)
    if not required <= len(values) <= len(declared):
        raise ValueError(f"{product} has {len(values)} fields behind its kind; {name} has {len(declared)}")
    for field, value in zip(declared, values, strict=False):
        if field.type in (bool, "bool"):
            if not isinstance(value, bool):
                raise ValueError(f"{product} has {field.name} {str(value)[:20]!r}; it must be true or false")
        elif type(value) is not int or not 1 <= value <= _MOST_FIELD:
            raise ValueError(f"{product} has {field.name} {str(value)[:20]!r}; it must be in [1, {_MOST_FIELD}]")
    return kind(*values)
