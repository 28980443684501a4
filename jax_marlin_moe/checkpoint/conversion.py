"""`convert`: a checkpoint into the packed form, layer by layer, over as many runs as it takes."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

import jax_marlin_moe
from jax_marlin_moe.checkpoint import packed_form
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.checkpoint.family import Family
from jax_marlin_moe.checkpoint.loading import Checkpoint
from jax_marlin_moe.checkpoint.source import Source
from jax_marlin_moe.checkpoint.tensors import read_json
from jax_marlin_moe.checkpoint.whole_files import PART, locked_folder, named_errors, sync_folder

# Files of these kinds hold the weights of a model, which the packed form has in its own files.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", PART)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    families: Sequence[Family] = FAMILIES,
    report: Callable[[int, int], None] = lambda layer, bytes_written: None,
) -> None:
    """Writes all mixture-of-experts layers of a checkpoint in the packed form, and everything else as it is.

    One layer is in memory at a time. `load_moe_layer(destination, layer)` maps a layer back without repacking. Tensors
    beside the experts are copied bit for bit, for `Checkpoint.tensor` and `Checkpoint.linear`, and so are config.json,
    the tokenizer and all other files of the source that are not weights, so the folder is a whole model. Layers
    for multi-token prediction, which are loaded by name, are copied with the rest.

    A run that ends early (killed, interrupted, disk full) leaves the files that it has finished and a record of them;
    `load_moe_layer` says that such a folder is not finished, and another run with the same source and options checks
    the digests of these files and goes on behind them. A run whose source is refused leaves nothing.

    Args:
        source: a folder that `load_moe_layer` takes.
        destination: a folder to make; must be empty or new, or hold what an earlier run has left.
        quantize: as in `load_moe_layer`, with the next two.
        group_size: see there.
        scale_dtype: see there.
        families: see there.
        report: called with the number and the bytes of each layer when it is in place, in this run or an earlier one.

    Raises:
        BlockingIOError: another process converts into the destination.
        FileExistsError: the destination holds something else, such as a conversion with another source or options.
        OSError: a file cannot be written; names it.
        ValueError: the source has no such layers, is packed already, or `load_moe_layer` refuses one.
    """
    for name, value in (("source", source), ("destination", destination)):
        if not os.fspath(value):
            raise ValueError(f"{name} is {value!r}; it must be a folder")
    folder = pathlib.Path(destination)
    checkpoint = Checkpoint(
        source, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype, families=families
    )
    if isinstance(checkpoint.contents, packed_form.Manifest):
        raise ValueError(f"{source} is packed already; source must be the folder that it was converted from")
    if not checkpoint.layers:
        raise ValueError(f"{source} has no layers with experts; it must have at least one")
    conversion = {
        "package": jax_marlin_moe.__version__,
        "quantize": quantize,
        "group_size": group_size,
        "scale_dtype": None if scale_dtype is None else jnp.dtype(scale_dtype).name,
        "source_files": _state_of_files(checkpoint.folder),
    }
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        try:
            _Run(folder, checkpoint, conversion, report).convert()
        except BaseException:
            for path in made:
                with contextlib.suppress(OSError):  # something is left in it
                    path.rmdir()
            raise


class _Run:
    """One run into a folder that is locked.

    Raises:
        FileExistsError: the folder holds something else than the beginning of this conversion.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        checkpoint: Checkpoint,
        conversion: Mapping[str, Any],
        report: Callable[[int, int], None],
    ) -> None:
        self.folder, self.checkpoint, self.conversion, self.report = folder, checkpoint, conversion, report
        self.record = folder / packed_form.UNFINISHED
        self.files = {number: folder / packed_form.file_of(number) for number in checkpoint.layers}
        self.others = {} if isinstance(checkpoint.contents, packed_form.Manifest) else _other_files(checkpoint.contents)
        self.digests: dict[str, str] = {}
        self.entries = self._earlier_entries()

    def convert(self) -> None:
        """Converts what is missing; the folder is finished when the record gets the manifest's name."""
        try:
            self._write_record()
            for number, path in self.files.items():
                if not (number in self.entries and _holds(path, self.entries[number]["sha256"])):
                    self.entries.pop(number, None)
                    with self._nothing_left_where_refused():
                        layer = self.checkpoint.load(number)
                        stated = self.checkpoint.activation_dtype(number)
                    self.entries[number] = packed_form.write_layer(self.folder, number, layer, stated)
                    self._write_record()
                self.report(number, path.stat().st_size)
            for name, write in self.others.items():
                if not (name in self.digests and _holds(self.folder / name, self.digests[name])):
                    self.digests[name] = write(self.folder / name)
                    self._write_record()
            with named_errors(self.record):
                os.replace(self.record, self.folder / packed_form.MANIFEST)
            sync_folder(self.folder)
        except BaseException:
            self._clear()
            raise

    def _write_record(self) -> None:
        source = self.checkpoint.folder.resolve().name
        packed_form.write_manifest(self.record, self.entries, source, self.conversion, others=self.digests)

    @contextlib.contextmanager
    def _nothing_left_where_refused(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError):  # the same source will never be converted with these options
            self.entries.clear()
            self.digests.clear()
            raise

    def _clear(self) -> None:
        """Removes what a next run could not use: all but the layers that the record names, and itself."""
        if (self.folder / packed_form.MANIFEST).exists():
            return
        with contextlib.suppress(OSError, ValueError):
            recorded = packed_form.read_entries(self.record) if self.entries and self.record.exists() else None
            for number, path in self.files.items():
                if recorded is None or number not in recorded.entries:
                    path.unlink(missing_ok=True)
            for name in self.others:
                if recorded is None or name not in (recorded.others or {}):
                    (self.folder / name).unlink(missing_ok=True)
            if recorded is None or not recorded.entries:
                self.record.unlink(missing_ok=True)

    def _earlier_entries(self) -> dict[int, Any]:
        """Layers that an earlier run has finished, from its record."""
        files = (self.record, *self.files.values(), *(self.folder / name for name in self.others))
        parts = {path.with_name(path.name + PART) for path in files}
        if not self.record.is_file():
            if (self.folder / packed_form.MANIFEST).exists():
                raise FileExistsError(f"{self.folder} holds a finished conversion; pass a new folder")
            if any(path not in parts for path in self.folder.iterdir()):
                raise FileExistsError(f"{self.folder} is not empty; pass a new folder")
            entries: dict[int, Any] = {}
        else:
            found = read_json(self.record).get("conversion")
            for key, value in self.conversion.items():
                other = found.get(key) if isinstance(found, dict) else None
                if other != value:
                    raise FileExistsError(
                        f"{self.folder} holds an unfinished conversion whose {key} is {other!r}, not {value!r}; delete "
                        "the folder, or pass a new one"
                    )
            recorded = packed_form.read_entries(self.record)
            entries = {number: dict(entry.values) for number, entry in recorded.entries.items()}
            self.digests.update(recorded.others or {})
        for path in parts:
            path.unlink(missing_ok=True)
        return entries


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except BlockingIOError:
            raise BlockingIOError(f"another process is converting into {folder}; wait for it") from None
        yield


def _other_files(source: Source) -> dict[str, Callable[[pathlib.Path], str]]:
    """The files that a folder has beside its layers, each with what writes it and returns its digest."""
    found: dict[str, Callable[[pathlib.Path], str]] = {}
    for number, (path, names) in enumerate(source.beside_experts().items(), start=1):
        file = source.files.open(names[0])
        assert file.path == path
        found[f"{packed_form.OTHERS}{number:05d}.safetensors"] = partial(
            packed_form.write_tensors, source=file, names=names
        )
    for path in sorted(source.folder.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".safetensors.index.json")
        if path.is_file() and not weights and not path.name.startswith("."):
            found[path.name] = partial(packed_form.copy_file, source=path)
    return found


def _holds(path: pathlib.Path, digest: str) -> bool:
    """Whether a file is there with this digest."""
    return path.is_file() and packed_form.sha256(path) == digest


def _state_of_files(folder: pathlib.Path) -> str:
    """A digest of names, sizes and times of change of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
