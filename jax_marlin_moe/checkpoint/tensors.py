"""Tensors of a checkpoint folder by name: safetensors files, memory-mapped, checked before they are read."""

import contextlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then uses
import numpy as np
from safetensors import SafetensorError, safe_open

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError, naming the file, if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


class TensorFolder:
    """Reads tensors by name, whichever file of the folder they are in. A context manager.

    Only the tensors asked for are read; files are opened when first needed and closed together.

    Args:
        folder: holds `model.safetensors.index.json` with the files that it names, or one safetensors file.

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors file in it.
        ValueError: the index is malformed, or names a file outside the folder; several files and no index.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._open: dict[pathlib.Path, Any] = {}
        self._exit = contextlib.ExitStack()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; pass the folder that holds config.json")
        index = folder / _INDEX
        if index.is_file():
            self._files = _indexed_files(index)
            return
        path = _only_file(folder)
        self._files = dict.fromkeys(self._file(path).keys(), path)

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._exit.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._files)

    def file_of(self, name: str) -> pathlib.Path:
        """The file that holds tensor `name`; raises ValueError, naming the folder, if none does."""
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._files[name]

    def read(self, name: str, shape: Sequence[int], dtypes: Sequence[str]) -> np.ndarray:
        """Reads one tensor.

        Args:
            name: as in the file.
            shape: what its shape must be.
            dtypes: safetensors names of the dtypes that it may have, such as "F16" or "BF16".

        Raises:
            ValueError: no file holds it, its shape or dtype is another, or the file is damaged.
        """
        path = self.file_of(name)
        try:
            view = self._file(path).get_slice(name)
            found_shape, found_dtype = tuple(view.get_shape()), view.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {error}") from None
        if found_shape != tuple(shape):
            raise ValueError(f"{path}: tensor {name} has shape {found_shape}; it must be {tuple(shape)}")
        if found_dtype not in dtypes:
            raise ValueError(f"{path}: tensor {name} has dtype {found_dtype}; it must be {' or '.join(dtypes)}")
        return self._file(path).get_tensor(name)

    def _file(self, path: pathlib.Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = self._exit.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        return self._open[path]


def _indexed_files(index: pathlib.Path) -> dict[str, pathlib.Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    for name in set(names.values()):
        # An index comes with a download: it must not reach files elsewhere on the machine.
        if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
            raise ValueError(f"{index} names the file {name!r}; it must be a plain file name in the same folder")
    return {tensor: index.parent / name for tensor, name in names.items()}


def _only_file(folder: pathlib.Path) -> pathlib.Path:
    if (folder / _SINGLE).is_file():
        return folder / _SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder} holds neither {_INDEX} nor a safetensors file")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} safetensors files and no {_INDEX} that says what is where")
    return found[0]


def stack_experts_side_by_side(
    files: TensorFolder,
    linears: Sequence[Sequence[str]],
    suffix: str,
    shape: Sequence[int],
    dtypes: Sequence[str],
) -> np.ndarray:
    """Reads one tensor of every expert linear: experts stacked, the linears of an expert joined by columns.

    Args:
        files: where to read.
        linears: per expert the module names whose columns stand side by side: (gate, up), or (down,).
        suffix: the tensor of each module, such as "qweight".
        shape: of one module's tensor; its last axis follows the output columns.
        dtypes: safetensors names of the dtypes allowed.

    Returns:
        [experts, *shape[:-1], parts * shape[-1]].
    """
    parts, width = len(linears[0]), shape[-1]
    stacked: np.ndarray | None = None
    for e, modules in enumerate(linears):
        for j, module in enumerate(modules):
            tensor = files.read(f"{module}.{suffix}", shape, dtypes)
            if stacked is None:
                stacked = np.empty((len(linears), *shape[:-1], parts * width), tensor.dtype)
            elif tensor.dtype != stacked.dtype:
                raise ValueError(
                    f"{files.file_of(f'{module}.{suffix}')}: tensor {module}.{suffix} has dtype {tensor.dtype}; it "
                    f"must be {stacked.dtype}, as in {linears[0][0]}"
                )
            stacked[e, ..., j * width : (j + 1) * width] = tensor
    assert stacked is not None
    return stacked


def check_scales(files: TensorFolder, linears: Sequence[Sequence[str]], suffix: str, scales: np.ndarray) -> None:
    """Raises ValueError, naming file and tensor, where scales are infinite or no numbers."""
    finite = np.isfinite(scales.astype(np.float32))
    if finite.all():
        return
    expert, *_, column = (int(i) for i in np.argwhere(~finite)[0])
    module = linears[expert][column * len(linears[expert]) // scales.shape[-1]]
    name = f"{module}.{suffix}"
    raise ValueError(f"{files.file_of(name)}: tensor {name} holds infinities or NaN; every scale must be finite")
