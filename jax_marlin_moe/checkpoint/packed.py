"""The packed form on disk: one safetensors file a layer and a manifest, mapped back without repacking.

`jax_marlin_moe.json` has the version of the form, and per layer a file, its SHA-256, and all that is not an array:
format, padding, routing, activation. A file holds the leaves of the layer by their paths (`gate_up.packed`), dtypes as
they are in memory, each at a multiple of 64 bytes.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.activations import Activation, get_activation, make_activation
from jax_marlin_moe.checkpoint.layer import MoELayer, SharedExpert, check_layer
from jax_marlin_moe.checkpoint.tensors import SafetensorsFile, check_file_name, read_json
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.ops.arguments import check_weights
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.weights import MarlinWeights

MANIFEST = "jax_marlin_moe.json"
VERSION = 1

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8"}
_ALIGNMENT = 64  # bytes; what XLA wants of host memory
_CHUNK = 1 << 24  # bytes hashed or copied at a time


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a packed folder: `entries` by layer."""

    folder: pathlib.Path
    entries: Mapping[int, Mapping[str, Any]]

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, ascending."""
        return sorted(self.entries)

    def load(self, layer: int) -> MoELayer:
        """Maps a layer back.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: the file has another checksum, or does not hold what the manifest says.
        """
        entry = self.entries[layer]
        path = self.folder / entry["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {MANIFEST} names it")
        found = _sha256(path)
        if found != entry["sha256"]:
            raise ValueError(f"{path} has SHA-256 {found}; {MANIFEST} says {entry['sha256']}: the file is damaged")
        file = SafetensorsFile(path)
        leaves = {}
        for name in (name for name in file.infos if not name.endswith(_GAP)):
            leaves[name] = _copy(file, name)
            file.drop_pages()
        try:
            loaded = _layer_from(leaves, entry["layer"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {MANIFEST} does not describe the file: {error!r}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {MANIFEST} does not describe the file: {error}") from None
        check_layer(path, loaded)
        return loaded


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """The manifest of a folder, None where it has none.

    Raises:
        ValueError: it is malformed, of a newer version, or names a file outside the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    values = read_json(path)
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path}: version is {version!r}; it must be a positive integer")
    if version > VERSION:
        raise ValueError(
            f"{path}: version is {version}; this package reads up to {VERSION}: update it, or convert the source again"
        )
    layers = values.get("layers")
    if not isinstance(layers, dict):
        raise ValueError(f"{path} has no layers")
    numbers: dict[int, str] = {}
    for number, entry in layers.items():
        if not (number.isascii() and number.isdecimal() and len(number) <= 9):
            raise ValueError(f"{path}: layers has the key {number!r}; it must be the number of a layer")
        if numbers.setdefault(int(number), number) != number:
            raise ValueError(
                f"{path}: layers has the keys {numbers[int(number)]!r} and {number!r}; each layer must be there once"
            )
        if not isinstance(entry, dict) or not {"file", "sha256", "layer"} <= entry.keys():
            raise ValueError(f"{path}: an entry of layers lacks file, sha256 or layer")
        check_file_name(path, entry["file"])
        facts = entry["layer"]
        if not isinstance(facts, dict) or not all(isinstance(facts.get(key), dict) for key in ("matrices", "routing")):
            raise ValueError(f"{path}: layer {number} lacks matrices or routing; each must be an object")
        if not all(isinstance(about, dict) and "format" in about for about in facts["matrices"].values()):
            raise ValueError(f"{path}: a matrix of layer {number} lacks its format")
    return Manifest(folder, {int(number): entry for number, entry in layers.items()})


def write_layer(folder: pathlib.Path, number: int, layer: MoELayer) -> dict[str, Any]:
    """Writes the file of a layer; returns its entry of the manifest."""
    leaves, facts = _leaves_of(layer)
    name = f"layer-{number:05d}.safetensors"
    header: dict[str, Any] = {"__metadata__": {"format": "jax_marlin_moe", "version": str(VERSION)}}
    offset, padding = 0, {}
    for leaf, array in leaves.items():
        size = array.size * array.dtype.itemsize
        header[leaf] = {
            "dtype": _NAMES[jnp.dtype(array.dtype).name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
        # safetensors allows no holes, so a gap is a tensor of its own.
        gap = -offset % _ALIGNMENT
        if gap:
            header[f"{leaf}{_GAP}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            offset += gap
        padding[leaf] = gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with (folder / name).open("wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for leaf, array in leaves.items():
            flat = np.asarray(array).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, _CHUNK):
                write(flat[start : start + _CHUNK].data)
            write(b"\0" * padding[leaf])
    return {"file": name, "sha256": digest.hexdigest(), "layer": facts}


def write_manifest(folder: pathlib.Path, entries: Mapping[int, Any], source: str) -> None:
    """Writes the manifest; without it the folder is no packed checkpoint, so it comes last."""
    values = {
        "version": VERSION,
        "source": source,
        "layers": {str(number): entry for number, entry in sorted(entries.items())},
    }
    temporary = folder / f"{MANIFEST}.part"
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


_GAP = ".gap"
_WEIGHT_LEAVES = ("packed", "scales", "zeros", "bias", "input_order", "global_scales")
_LAYER_LEAVES = (
    "router", "router_bias", "correction_bias", "expert_scale", "router_input_scale", "token_experts",
)  # fmt: skip


def _leaves_of(layer: MoELayer) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays by path, and everything else."""
    leaves: dict[str, jax.Array] = {}
    facts: dict[str, Any] = {
        "routing": dataclasses.asdict(layer.routing),
        "activation": _activation_facts(layer.activation),
        "norm_epsilon": layer.norm_epsilon,
        "matrices": {},
    }

    def add(path: str, value: Any) -> None:
        if isinstance(value, MarlinWeights):
            for name in _WEIGHT_LEAVES:
                if getattr(value, name) is not None:
                    leaves[f"{path}.{name}"] = getattr(value, name)
            facts["matrices"][path] = {
                "format": value.format.name,
                "layout": value.layout,
                "row_padding": value.row_padding,
                "column_padding": list(value.column_padding),
            }
        elif value is not None:
            leaves[path] = value

    add("gate_up", layer.gate_up)
    add("down", layer.down)
    for name in _LAYER_LEAVES:
        add(name, getattr(layer, name))
    if layer.shared is not None:
        for name in ("gate_up", "down", "gate"):
            add(f"shared.{name}", getattr(layer.shared, name))
    return leaves, facts


def _layer_from(leaves: Mapping[str, jax.Array], facts: Mapping[str, Any]) -> MoELayer:
    """The inverse of `_leaves_of`."""
    known = {f"{path}.{name}" for path in facts["matrices"] for name in _WEIGHT_LEAVES}
    known |= {*_LAYER_LEAVES, "shared.gate_up", "shared.down", "shared.gate"}
    unknown = sorted(leaves.keys() - known)
    if unknown:
        raise ValueError(f"it says nothing of {unknown[0]}; the layer would be loaded without it")

    def matrix(path: str) -> Any:
        if path not in facts["matrices"]:
            return leaves.get(path)
        about = facts["matrices"][path]
        weights = MarlinWeights(
            **{name: leaves.get(f"{path}.{name}") for name in _WEIGHT_LEAVES},  # type: ignore[arg-type]
            format=get_format(about["format"]),
            layout=about["layout"],
            row_padding=about["row_padding"],
            column_padding=tuple(about["column_padding"]),
        )
        check_weights(path, weights)
        return weights

    shared = None
    if matrix("shared.down") is not None:
        shared = SharedExpert(matrix("shared.gate_up"), matrix("shared.down"), leaves.get("shared.gate"))
    return MoELayer(
        gate_up=matrix("gate_up"),
        down=matrix("down"),
        routing=Routing(**facts["routing"]),
        activation=_activation_from(facts["activation"]),
        shared=shared,
        norm_epsilon=facts["norm_epsilon"],
        **{name: leaves[name] if name == "router" else leaves.get(name) for name in _LAYER_LEAVES},  # type: ignore[arg-type]
    )


def _activation_facts(activation: str | Activation) -> dict[str, Any]:
    act = get_activation(activation)
    # JSON has no infinity.
    return {"name": act.name, "parameters": [str(value) for value in act.parameters]}


def _activation_from(facts: Mapping[str, Any]) -> str | Activation:
    activation = make_activation(facts["name"], [float(value) for value in facts["parameters"]])
    return activation if activation.parameters else activation.name


def _copy(file: SafetensorsFile, name: str) -> jax.Array:
    """A tensor in memory of its own, so that nothing depends on the file any more; large ones expert by expert."""
    view = file.read(name)
    if view.nbytes <= _CHUNK:
        return jax.block_until_ready(jnp.array(view, copy=True))
    leaf = jnp.empty(view.shape, view.dtype)
    for index in range(view.shape[0]):
        leaf = jax.block_until_ready(_put(leaf, view[index], np.int32(index)))
        file.drop_pages()
    return leaf


@partial(jax.jit, donate_argnums=0)
def _put(leaf: jax.Array, part: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, part, index, 0)


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe(file: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Leaves of a layer's file: dtype, shape and bytes."""
    found = {}
    for name, info in SafetensorsFile(file).infos.items():
        if not name.endswith(_GAP):
            width = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1}[info.dtype]
            found[name] = (info.dtype, info.shape, width * math.prod(info.shape))
    return found
