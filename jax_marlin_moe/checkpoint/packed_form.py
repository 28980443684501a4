"""The packed form on disk: one safetensors file per layer and a manifest, mapped back without repacking.

`jax_marlin_moe.json` has the version of the form and, per layer, a file and its SHA-256. A file holds the leaves of the
layer by their paths (`gate_up.packed`), dtypes as they are in memory, each at a multiple of 64 bytes; and in its
metadata, as JSON, the layer's number, its facts (formats, group sizes, padding, routing, activation), and what the
source's config says that its rows are quantised to. So the digest covers what the arrays mean as well as the arrays.

Version 1 has the facts in the manifest, where no digest covers them, and no group size, which followed from the shapes.
Such folders load, every fact checked for its type and range; to have their facts covered, convert the source again.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.checkpoint.facts import Facts, layer_from, leaves_and_facts, read_facts
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.model_tensors import ModelTensors
from jax_marlin_moe.checkpoint.quantization_config import find_quantization
from jax_marlin_moe.checkpoint.schemes import METHODS
from jax_marlin_moe.checkpoint.sharded import load_block, put_rest, share_of_views, without_experts
from jax_marlin_moe.checkpoint.tensors import SafetensorsFile, TensorFolder, TensorInfo, check_file_name, read_json
from jax_marlin_moe.checkpoint.whole_files import PART, whole_file
from jax_marlin_moe.layer import MoELayer, check_layer
from jax_marlin_moe.sharding.moe_sharding import MoESharding

MANIFEST = "jax_marlin_moe.json"
UNFINISHED = "jax_marlin_moe.unfinished.json"
VERSION = 2

_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8"}
_ALIGNMENT = 64  # bytes; the alignment that XLA requires of host memory
_CHUNK = 1 << 24  # bytes hashed or copied at a time
_GAP = ".gap"
# Files of tensors beside the experts begin with this, a number behind it.
OTHERS = "others-"
# What says how linears are quantised.
_QUANTIZATION_FILES = ("config.json", *(row.file for row in METHODS.values() if row.file is not None))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a packed folder.

    Attributes:
        folder: the folder.
        version: of the form.
        entries: by layer, its file and digest.
        others: digests of the files of everything else, by name: tensors of the model beside its experts as their tool
            wrote them, config.json, the tokenizer. None where the form was written without them.
    """

    folder: pathlib.Path
    version: int
    entries: Mapping[int, Keys]
    others: Mapping[str, str] | None = None

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, ascending."""
        return sorted(self.entries)

    def load(self, layer: int, sharding: MoESharding | None = None) -> MoELayer:
        """Maps a layer back.

        Args:
            layer: its number.
            sharding: over whose devices it is. Each process then reads its share of the experts, and no digest is
                compared, which would be that of the whole file.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: the file has another checksum, or does not hold what its facts say.
        """
        path = self._path(layer)
        if sharding is not None:
            return self._load_sharded(path, layer, sharding)
        _check_digest(path, self.entries[layer].text("sha256"))
        file = SafetensorsFile(path)
        facts = self._facts(layer, file)
        leaves = {}
        for name in (name for name in file.infos if not name.endswith(_GAP)):
            leaves[name] = _copy(file, name)
            file.drop_pages()
        return _layer_of(path, leaves, facts)

    def describe(self, layer: int) -> tuple[Facts, int]:
        """The facts of a layer and the bytes of its leaves, from the header of its file; errors as for `load`."""
        file = SafetensorsFile(self._path(layer))
        size = sum(file.read(name).nbytes for name in file.infos if not name.endswith(_GAP))
        return self._facts(layer, file), size

    def activation_dtype(self, layer: int) -> ByteDtype | None:
        """What the config of the source says; as for `Checkpoint.activation_dtype`.

        Args:
            layer: its number.

        Raises:
            FileNotFoundError: its file is missing.
            ValueError: the file was written before it had this, or holds something else in its place.
        """
        file = SafetensorsFile(self._path(layer))
        keys = None if self.version == 1 else _read_metadata(file)
        if keys is None or "activation_dtype" not in keys:
            raise ValueError(
                f"{file.path} was written before layers said what their rows are quantised to; ask the folder that it "
                "was converted from, or convert that again"
            )
        name = keys.text("activation_dtype", None, null=True)
        try:
            return as_byte_dtype(name)
        except ValueError as error:
            raise ValueError(f"{file.path}: metadata.layer: {error}") from None

    def model_tensors(self) -> ModelTensors:
        """The tensors beside the experts; files are compared with their digests when they are opened.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder was written without them, or a file is damaged.
        """
        if self.others is None:
            raise ValueError(
                f"{self.folder} holds layers of experts alone; convert the checkpoint again to keep the rest of it"
            )
        paths = [self.folder / name for name in self.others if name.startswith(OTHERS)]
        config = self.folder / "config.json"
        for name in self.others:
            if name in _QUANTIZATION_FILES:
                self.check_other(self.folder / name)
        quantization = find_quantization(self.folder, read_json(config))
        return ModelTensors(TensorFolder(self.folder, among=paths, check=self.check_other), quantization)

    def check_other(self, path: pathlib.Path) -> None:
        """Raises an error unless one of `others` is there and is what it was."""
        assert self.others is not None
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {MANIFEST} names it")
        _check_digest(path, self.others[path.name])

    def _load_sharded(self, path: pathlib.Path, layer: int, sharding: MoESharding) -> MoELayer:
        file = SafetensorsFile(path)
        names = [name for name in file.infos if not name.endswith(_GAP)]
        views: Any = {name: file.read(name) for name in names}
        whole = _layer_of(path, views, self._facts(layer, file))
        (gate_up, down), _ = load_block(
            lambda share: share_of_views(whole, share, file.drop_pages),
            sharding,
            experts=whole.gate_up.num_experts,
            size=whole.down.k,
            row=whole.down.format,
            group_size=whole.down.rows_per_scale,
            activation=whole.activation,
        )
        rest = jax.tree.map(lambda view: jnp.array(view, copy=True), without_experts(whole))
        return put_rest(dataclasses.replace(rest, gate_up=gate_up, down=down), sharding)

    def _path(self, layer: int) -> pathlib.Path:
        path = self.folder / self.entries[layer].text("file")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; {MANIFEST} names it")
        if not path.is_file():  # to open a pipe would wait for ever
            raise ValueError(f"{path} is not a regular file; {MANIFEST} names it")
        return path

    def _facts(self, layer: int, file: SafetensorsFile) -> Facts:
        if self.version == 1:
            return read_facts(self.entries[layer].object("layer"), states_group_size=False)
        keys = _read_metadata(file)
        number = keys.integer("number")
        if number != layer:
            raise ValueError(f"{file.path} is of layer {number}; {MANIFEST} names it for layer {layer}")
        return read_facts(keys.object("facts"), states_group_size=True)


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """The manifest of a folder, None where it has none.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: the manifest is malformed, of a newer version, or names a file outside the folder; or `convert` has
            not finished the folder.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; pass the folder of a checkpoint")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; pass the folder of a checkpoint")
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / UNFINISHED).exists() or (folder / f"{UNFINISHED}{PART}").exists():
            raise ValueError(
                f"{folder}: this conversion was not finished; run convert again with the same source and options, and "
                "it goes on where it stopped"
            )
        return None
    return read_entries(path)


def read_entries(path: pathlib.Path) -> Manifest:
    """A manifest, finished or not; errors as for `read_manifest`."""
    keys = Keys(read_json(path), path)
    version = keys.integer("version", low=1)
    if version > VERSION:
        raise ValueError(
            f"{path}: version is {version}; this package reads up to {VERSION}: update it, or convert the source again"
        )
    layers = keys.object("layers")
    entries = {}
    for number in layers.values:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", number):
            other = number.lstrip("0") or "0"
            if other != number and other in layers:
                raise ValueError(f"{path}: layers has the keys {other!r} and {number!r}; each layer must be there once")
            raise ValueError(f"{path}: layers has the key {number!r:.100}; it must be the number of a layer")
        entry = layers.object(number)
        check_file_name(path, entry.values.get("file"))
        if entry.text("file") != file_of(int(number)):
            raise entry.fault("file", file_of(int(number)))
        if not re.fullmatch("[0-9a-f]{64}", entry.text("sha256")):
            raise entry.fault("sha256", "64 hexadecimal digits")
        entries[int(number)] = entry
    return Manifest(path.parent, version, entries, _read_others(path, keys))


def file_of(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer-{layer:05d}.safetensors"


def write_layer(
    folder: pathlib.Path, number: int, layer: MoELayer, activation_dtype: ByteDtype | None
) -> dict[str, Any]:
    """Writes the file of a layer; returns its entry of the manifest.

    Args:
        folder: of the packed form.
        number: of the layer.
        layer: the layer.
        activation_dtype: what the config of the source says that its rows are quantised to.
    """
    leaves, facts = leaves_and_facts(layer)
    described = json.dumps({"number": number, "facts": facts, "activation_dtype": activation_dtype}, allow_nan=False)
    metadata = {"format": "jax_marlin_moe", "version": str(VERSION), "layer": described}
    infos = {name: TensorInfo(_NAMES[jnp.dtype(leaf.dtype).name], leaf.shape) for name, leaf in leaves.items()}
    sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in leaves.items()}

    def content(name: str) -> np.ndarray:
        return np.asarray(leaves[name]).reshape(-1).view(np.uint8)

    digest = _write_tensors(folder / file_of(number), metadata, infos, sizes, content, alignment=_ALIGNMENT)
    return {"file": file_of(number), "sha256": digest}


def write_tensors(path: pathlib.Path, source: SafetensorsFile, names: Sequence[str]) -> str:
    """Writes some tensors of another file as they are; returns the digest of the file."""
    infos = {name: source.info(name) for name in names}
    sizes = {name: source.read_bytes(name).size for name in names}
    digest = _write_tensors(path, {"format": "pt"}, infos, sizes, source.read_bytes, alignment=1)
    source.drop_pages()
    return digest


def copy_file(path: pathlib.Path, source: pathlib.Path) -> str:
    """Writes a copy of a file; returns its digest."""
    digest = hashlib.sha256()
    with source.open("rb") as original, whole_file(path) as file:
        while chunk := original.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(
    path: pathlib.Path,
    entries: Mapping[int, Mapping[str, Any]],
    source: str,
    conversion: Mapping[str, Any],
    *,
    others: Mapping[str, str] | None = None,
) -> None:
    """Writes a manifest, finished or not.

    Args:
        path: `MANIFEST` or `UNFINISHED` in the folder. A folder without the first is not a packed checkpoint.
        entries: by layer, as `write_layer` returns them.
        source: name of the checkpoint.
        conversion: what else determines the content of the layers.
        others: digests of the files of everything else, by name; None for layers alone.
    """
    values: dict[str, Any] = {
        "version": VERSION,
        "source": source,
        "conversion": conversion,
        "layers": {str(number): entry for number, entry in sorted(entries.items())},
    }
    if others is not None:
        values["others"] = dict(sorted(others.items()))
    with whole_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def sha256(path: pathlib.Path) -> str:
    """The digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write_tensors(
    path: pathlib.Path,
    metadata: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    sizes: Mapping[str, int],
    content: Callable[[str], np.ndarray],
    *,
    alignment: int,
) -> str:
    """Writes a safetensors file; returns its digest.

    Args:
        path: the file.
        metadata: of the file.
        infos: its tensors, in their order.
        sizes: their bytes.
        content: the bytes of one.
        alignment: of the tensors, in bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, padding = 0, {}
    for name, info in infos.items():
        size = sizes[name]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + size]}
        offset += size
        # safetensors allows no holes, so a gap is a tensor of its own.
        gap = -offset % alignment
        if gap:
            header[f"{name}{_GAP}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            offset += gap
        padding[name] = gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with whole_file(path) as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little") + text)
        for name in infos:
            flat = content(name)
            for start in range(0, flat.size, _CHUNK):
                write(flat[start : start + _CHUNK].data)
            if padding[name]:
                write(b"\0" * padding[name])
    return digest.hexdigest()


def _read_others(path: pathlib.Path, keys: Keys) -> dict[str, str] | None:
    others = keys.object("others", None, null=True)
    if others is None:
        return None
    for name in others.values:
        check_file_name(path, name)
        if not re.fullmatch("[0-9a-f]{64}", others.text(name)):
            raise others.fault(name, "64 hexadecimal digits")
    return {name: others.text(name) for name in others.values}


def _read_metadata(file: SafetensorsFile) -> Keys:
    """What the metadata of a file says of its layer; raises ValueError unless that is a JSON object."""
    try:
        values = json.loads(file.metadata.get("layer", ""))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file.path}: metadata.layer is not valid JSON: {error}") from None
    return Keys({"layer": values}, file.path, "metadata.").object("layer")


def _check_digest(path: pathlib.Path, wanted: str) -> None:
    found = sha256(path)
    if found != wanted:
        raise ValueError(f"{path} has SHA-256 {found}; {MANIFEST} says {wanted}: the file is damaged")


def _layer_of(path: pathlib.Path, leaves: Mapping[str, jax.Array], facts: Facts) -> MoELayer:
    """A layer that fits together; errors as for `Manifest.load`."""
    try:
        loaded = layer_from(leaves, facts)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the facts of the layer do not describe the file: {error}") from None
    check_layer(path, loaded)
    return loaded


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
