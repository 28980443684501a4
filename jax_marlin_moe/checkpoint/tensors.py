"""Tensors of a checkpoint folder by name: safetensors files, memory-mapped, checked before they are read."""

import collections
import json
import math
import mmap
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl")
_JSON_LIMIT = 100_000_000  # bytes; the limit of safetensors for a header

# What each safetensors dtype is read as. The 8-bit floats are read as their bit patterns.
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = ("F16", "BF16", "F32")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything else, is not a regular file, has more than 100 MB, nests too deep, or has a key
            twice in one object. Messages name the file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; it must be a JSON file")
    with path.open("rb") as file:
        content = file.read(_JSON_LIMIT + 1)
    if len(content) > _JSON_LIMIT:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; a JSON file of a checkpoint must have at most {_JSON_LIMIT}"
        )
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: its lists or objects nest too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


class TensorInfo(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFile:
    """One safetensors file, mapped into memory: `read` gives views, no copies.

    Args:
        path: the file; its header and its length are checked when it is opened.

    Raises:
        ImportError: the package safetensors is missing.
        ValueError: the file is not a safetensors file, or is truncated.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            _check_header(path)
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._start = 8 + size
        self._entries = header

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """All tensors of the file."""
        return {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in self._entries.items()}

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; raises ValueError, naming the file, where it holds none of that name."""
        if name not in self._entries:
            raise ValueError(f"{self.path}: the file has no tensor {name}, although the index says so")
        entry = self._entries[name]
        return TensorInfo(entry["dtype"], tuple(entry["shape"]))

    def read(self, name: str) -> np.ndarray:
        """A view of a tensor, valid as long as it is referred to."""
        dtype, shape = self.info(name)
        if dtype not in _DTYPES:
            raise ValueError(f"{self.path}: tensor {name} has dtype {dtype}; it must be one of {', '.join(_DTYPES)}")
        start = self._start + self._entries[name]["data_offsets"][0]
        return np.frombuffer(self._map, _DTYPES[dtype], math.prod(shape), start).reshape(shape)

    def read_bytes(self, name: str) -> np.ndarray:
        """A view of the bytes of a tensor, of whatever dtype."""
        self.info(name)
        start, stop = self._entries[name]["data_offsets"]
        return np.frombuffer(self._map, np.uint8, stop - start, self._start + start)

    def drop_pages(self) -> None:
        """Gives the pages read so far back to the system; views stay valid and read them again."""
        if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class ShapeError(ValueError):
    """A tensor has another shape than its reader expects, who knows what says so."""


class TensorFolder:
    """Reads tensors by name, whichever file of the folder they are in.

    Files are opened when first needed. Names that were read or ignored are remembered, so that a loader can tell
    whether it has seen everything.

    Args:
        folder: holds `model.safetensors.index.json` with the files that it names, or safetensors files alone.
        among: the files that count, where the folder has others.
        check: called with each file before it is opened.

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors file in it.
        ValueError: the index is malformed, or names a file outside the folder; files share a name and there is no
            index; the folder holds pickles alone.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        among: Sequence[pathlib.Path] | None = None,
        check: Callable[[pathlib.Path], None] = lambda path: None,
    ) -> None:
        self.folder, self._check = folder, check
        self.seen: set[str] = set()
        self._open: dict[pathlib.Path, SafetensorsFile] = {}
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; pass the folder that holds config.json")
        index = folder / _INDEX
        if among is None and index.is_file():
            self._files = _indexed_files(index)
            return
        self._files = {}
        for path in _safetensors_files(folder) if among is None else among:
            for name in self._file(path).infos:
                if name in self._files:
                    raise ValueError(
                        f"{path}: tensor {name} is in {self._files[name].name} as well, and no {_INDEX} says "
                        "which counts"
                    )
                self._files[name] = path

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file_of(self, name: str) -> pathlib.Path:
        """The file that holds tensor `name`; raises ValueError, naming the folder, if none does."""
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._files[name]

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        path = self.file_of(name)
        return self._file(path).info(name)

    def dtype(self, name: str) -> str | None:
        """The safetensors dtype of a tensor, None where there is no such tensor."""
        return self.info(name).dtype if name in self._files else None

    def read(self, name: str, shape: Sequence[int], dtypes: Sequence[str]) -> np.ndarray:
        """A view of one tensor.

        Args:
            name: as in the file.
            shape: what its shape must be.
            dtypes: safetensors names of the dtypes that it may have, such as "F16" or "BF16".

        Raises:
            ValueError: no file holds it, its shape or dtype is another, or the file is damaged.
        """
        path = self.file_of(name)
        found = self._file(path).info(name)
        if found.shape != tuple(shape):
            raise ShapeError(f"{path}: tensor {name} has shape {found.shape}; it must be {tuple(shape)}")
        if found.dtype not in dtypes:
            raise ValueError(f"{path}: tensor {name} has dtype {found.dtype}; it must be {' or '.join(dtypes)}")
        self.seen.add(name)
        return self._file(path).read(name)

    def open(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor; errors as for `file_of`."""
        return self._file(self.file_of(name))

    def ignore(self, name: str) -> None:
        """Remembers a tensor that is known and not needed."""
        self.seen.add(name)

    def fault(self, name: str, text: str) -> ValueError:
        """An error about the contents of a tensor, with its file and name."""
        return ValueError(f"{self.file_of(name)}: tensor {name} {text}")

    def drop_pages(self) -> None:
        """Gives the pages of all open files back to the system.

        To be called between linears also where only small tensors were read: with each of them the system may map
        megabytes of the large ones beside it.
        """
        for file in self._open.values():
            file.drop_pages()

    def _file(self, path: pathlib.Path) -> SafetensorsFile:
        if path not in self._open:
            self._check(path)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {_INDEX} names it")
            self._open[path] = SafetensorsFile(path)
        return self._open[path]


def check_file_name(source: pathlib.Path, name: object) -> None:
    """Raises ValueError unless `name`, which `source` gives, is a plain file name.

    An index comes with a download: it must not reach files elsewhere on the machine.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
        raise ValueError(f"{source} names the file {name!r}; it must be a plain file name in the same folder")


def _indexed_files(index: pathlib.Path) -> dict[str, pathlib.Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map; it must have one, an object of tensor names and their files")
    for name in dict.fromkeys(names.values()):
        check_file_name(index, name)
    return {tensor: index.parent / name for tensor, name in names.items()}


def _safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds pickles ({pickles[0]}) and no safetensors file; loading a pickle runs code, so convert it "
            "to safetensors with the tool that wrote it"
        )
    raise FileNotFoundError(f"{folder} holds neither {_INDEX} nor a safetensors file")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} more than once")
    return value


def _check_header(path: pathlib.Path) -> None:
    """Raises ValueError unless the header of a file is valid and agrees with the length of the file."""
    try:  # not with this module: free-threaded Pythons have no wheel of it, and all but checkpoints works without
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{path} cannot be read: the package safetensors is missing ({error}); install it with "
            "`pip install safetensors`. It has no wheels for free-threaded Pythons; building its source takes Rust"
        ) from None
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None
