"""`load_moe_layer` and `load_moe_layers`: layers of a checkpoint, as its tool wrote it or as `convert` did."""

import functools
import logging
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.checkpoint import packed_form
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.checkpoint.family import Family
from jax_marlin_moe.checkpoint.model_tensors import ModelTensors
from jax_marlin_moe.checkpoint.schemes.plain import Target
from jax_marlin_moe.checkpoint.source import Source
from jax_marlin_moe.checkpoint.tensors import read_json
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.progress import progress_bar
from jax_marlin_moe.sharding.moe_sharding import MoESharding
from jax_marlin_moe.sharding.placement import check_devices
from jax_marlin_moe.stacked_layer import StackedMoELayer, stack_layers
from jax_marlin_moe.weights import MarlinWeights

_LOGGER = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_moe_layer(
    path: str | os.PathLike,
    layer: int | str,
    *,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    families: Sequence[Family] = FAMILIES,
    sharding: MoESharding | None = None,
) -> MoELayer:
    """Loads one mixture-of-experts layer of a checkpoint: bit for bit where it is quantised.

    Which layers have experts, and how they are stored, is decided by the tensors that exist; docs/support.md lists the
    schemes and the model families. Float scales keep the dtype that they have on disk. Only this layer's tensors are
    read, one linear at a time, so the host needs little more memory than the packed layer. An act-order of the down
    matrices is folded into the columns of gate and up. Shared experts are packed where the file has them quantised, and
    stay dense arrays where it has not. A packed one that is n times as wide as an expert, and packed alike, becomes a
    stack of n (`SharedExpert.split`), so that one launch runs all experts; where it does not, the log of level INFO has
    the reason.

    Args:
        path: the folder with config.json and safetensors files, or one that `convert` wrote.
        layer: its number, from 0; or what the names of its tensors begin with, such as "model.layers.61" or
            "mtp.layers.0" for a layer of multi-token prediction, which the numbers do not count;
            `Checkpoint(path).layer_names` lists them.
        quantize: for plain bfloat16, float16 or float32 experts, the format to quantise them to; "bf16" and "fp16"
            keep those of 16 bits as they are. Layers that are quantised stay as they are, where others are plain; where
            none is, `quantize` is refused.
        group_size: for `quantize`, as in `jax_marlin_moe.quantize`.
        scale_dtype: likewise; by default the dtype of the file.
        families: rows of model families, of which the first that has the config's `model_type` counts. For a family
            that the package does not know, pass `(*jax_marlin_moe.checkpoint.FAMILIES, row)`.
        sharding: the layer is then over the devices of a mesh, as `jax_marlin_moe.sharding.place` puts it. Each process
            reads the tensors of its experts alone, and of each its columns of gate and up and its rows of down; of
            an act-order of down, of HQQ, and where scales of plain weights follow from whole matrices, it reads whole
            matrices, one at a time. The shared expert is read by all. Of a folder that `convert` wrote, no digests are
            compared, which are those of whole files.

    Returns:
        The packed experts, on JAX's default device or over those of the sharding, and what routing needs.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: the model, its quantisation or the layer is not supported, or a tensor is missing, not known, or
            does not fit the config. Messages name the file, the tensor, what was expected and what was found.
    """
    checkpoint = Checkpoint(path, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype, families=families)
    return checkpoint.load(layer, sharding)


@overload
def load_moe_layers(
    path: str | os.PathLike,
    *,
    layers: Sequence[int] | None = None,
    stacked: Literal[False] = False,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    families: Sequence[Family] = FAMILIES,
    sharding: MoESharding | None = None,
) -> Iterator[tuple[int, MoELayer]]: ...


@overload
def load_moe_layers(
    path: str | os.PathLike,
    *,
    layers: Sequence[int] | None = None,
    stacked: Literal[True],
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    families: Sequence[Family] = FAMILIES,
    sharding: MoESharding | None = None,
) -> StackedMoELayer: ...


def load_moe_layers(
    path: str | os.PathLike,
    *,
    layers: Sequence[int] | None = None,
    stacked: bool = False,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    families: Sequence[Family] = FAMILIES,
    sharding: MoESharding | None = None,
) -> Iterator[tuple[int, MoELayer]] | StackedMoELayer:
    """All mixture-of-experts layers in ascending order.

    Args:
        path: as for `load_moe_layer`.
        layers: numbers of the layers to load, in this order; by default all that have experts.
        stacked: whether they become one `StackedMoELayer`, for loops over layers. They must be alike; one layer is in
            memory beside the stack.
        quantize: as for `load_moe_layer`.
        group_size: likewise.
        scale_dtype: likewise.
        families: likewise.
        sharding: likewise; a stack is over the devices too.

    Returns:
        An iterator that loads a layer when it comes to it, and yields its number and the layer; or the stack, whose
        l-th layer is the l-th of `layers`.

    Raises:
        FileNotFoundError: as `load_moe_layer`.
        ValueError: likewise; or layers that are stacked differ, in what the message names.
    """
    checkpoint = Checkpoint(path, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype, families=families)
    numbers = list(checkpoint.layers if layers is None else layers)
    loaded = _loaded(checkpoint, numbers, sharding)
    if not stacked:
        return loaded
    try:
        return stack_layers((layer for _, layer in loaded), len(numbers))
    except ValueError as error:
        raise ValueError(f"{checkpoint.folder}, whose layers {numbers} are stacked: {error}") from None


class Checkpoint:
    """An opened checkpoint folder, of either kind: its layers that have experts, and the rest of the model.

    Args:
        path: the folder.
        quantize: as for `load_moe_layer`.
        group_size: likewise.
        scale_dtype: likewise.
        families: likewise.

    Attributes:
        contents: the manifest of the packed form, or the folder as its tool wrote it; both have `layers` and `load`.
        layers: numbers of the layers with experts, ascending, without those for multi-token prediction.
        layer_names: of each layer, what the names of its tensors begin with, which `load` takes too; also of layers for
            multi-token prediction. Empty for the packed form.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        quantize: str | None = None,
        group_size: int | Literal["customary"] | None = "customary",
        scale_dtype: DTypeLike | None = None,
        families: Sequence[Family] = FAMILIES,
    ) -> None:
        _check_folder(path)
        _check_families(families)
        self.folder = pathlib.Path(path)
        manifest = packed_form.read_manifest(self.folder)
        if manifest is not None and quantize is not None:
            raise ValueError(f"{self.folder} is packed already; quantize={quantize!r} is for plain weights")
        target = Target.of(quantize, group_size, scale_dtype)
        self.contents: packed_form.Manifest | Source = (
            Source(self.folder, target, families) if manifest is None else manifest
        )
        self.layers = self.contents.layers
        self.layer_names = self.contents.layer_names if isinstance(self.contents, Source) else []

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json; raises FileNotFoundError where there is none."""
        return read_json(self.folder / "config.json")

    @property
    def tensor_names(self) -> list[str]:
        """Names that `tensor` takes, sorted; in a folder that `convert` wrote, those beside the experts of `layers`."""
        return sorted(self._tensors.files.names)

    def tensor(self, name: str) -> jax.Array:
        """Reads one tensor as it is in the file: an embedding, a norm, a bias.

        Args:
            name: as in the file, such as "model.embed_tokens.weight".

        Returns:
            An array in the dtype of the file, float8 included. Integers of 64 bits that fit into 32 become int32
            unless `jax_enable_x64` is set.

        Raises:
            TypeError: the name is not a string.
            ValueError: there is no such tensor, or JAX cannot hold its values without `jax_enable_x64`.
        """
        return self._tensors.tensor(_checked_name(name))

    def linear(self, name: str, *, scaled_input: bool = False) -> MarlinWeights | jax.Array:
        """Reads one linear, quantised or not: of attention, of a dense layer, the head.

        Args:
            name: the module, such as "model.layers.0.self_attn.q_proj", without ".weight".
            scaled_input: whether the caller multiplies the rows by the tensor `pre_quant_scale` beside the linear,
                which AWQ of ModelOpt has. Without it such a linear is refused, unless all factors are 1.

        Returns:
            A stack of one packed matrix (K, N), with the bias that the file has, where the linear is quantised, in any
            scheme that experts may have; `quantize` of the checkpoint is for experts alone. Else the dense array
            [K, N] in the dtype of the file, whose bias is a tensor of its own.

        Raises:
            TypeError: the name is not a string.
            ValueError: there is no such linear, or it is stored in a way that is not supported.
        """
        return self._tensors.linear(_checked_name(name), scaled_input=scaled_input)

    @functools.cached_property
    def _tensors(self) -> ModelTensors:
        return self.contents.model_tensors()

    def activation_dtype(self, layer: int | str) -> ByteDtype | None:
        """What the config says that rows of a layer's routed experts are quantised to.

        Args:
            layer: as for `load`.

        Returns:
            What the layer's `activation_dtype` is then: "float8_e4m3fn_g128" for FP8 with blocks of 128 x 128, say, and
            None where the config says nothing of activations, or something that there is no product for.

        Raises:
            ValueError: the layer has no experts, or `convert` wrote the folder before it kept what the config says.
        """
        layer = self._checked(layer)
        if isinstance(self.contents, Source):
            return self.contents.reader(layer).activation_dtype()
        assert isinstance(layer, int), "the packed form has numbers alone"
        return self.contents.activation_dtype(layer)

    def load(self, layer: int | str, sharding: MoESharding | None = None) -> MoELayer:
        """Loads one layer; arguments and errors as for `load_moe_layer`."""
        if sharding is not None:
            check_devices(sharding)
        layer = self._checked(layer)
        if isinstance(layer, str):
            assert isinstance(self.contents, Source), "the packed form has numbers alone"
            return self.contents.load(layer, sharding)
        start = time.perf_counter()
        loaded = self.contents.load(layer, sharding)
        _LOGGER.info("layer %d of %s in %.2f s: %r", layer, self.folder, time.perf_counter() - start, loaded)
        return loaded

    def _checked(self, layer: int | str) -> int | str:
        """The layer, a number as Python's own; raises TypeError or ValueError unless it has experts."""
        if isinstance(layer, str):
            if not isinstance(self.contents, Source) or layer not in self.layer_names:
                found = ", ".join(self.layer_names) or "none, as it is packed" * (not isinstance(self.contents, Source))
                raise ValueError(
                    f"{self.folder}: layer {layer!r} has no experts; names of such layers: {found or 'none'}"
                )
            return layer
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise TypeError(f"layer is {layer!r}; it must be a number, or the name of a layer")
        layer = int(layer)
        if layer not in self.layers:
            found = f"{self.layers[0]} to {self.layers[-1]}" if self.layers else "none"
            further = self.layer_names[len(self.layers) :]
            more = f"; others, by name: {', '.join(further)}" if further else ""
            raise ValueError(f"{self.folder}: layer {layer} has no experts; layers with experts: {found}{more}")
        return layer


def _loaded(
    checkpoint: "Checkpoint", numbers: Sequence[int], sharding: MoESharding | None
) -> Iterator[tuple[int, MoELayer]]:
    """The layers, one by one, with a line on a terminal that counts them."""
    with progress_bar("layers", len(numbers)) as bar:
        for number in numbers:
            layer = checkpoint.load(number, sharding)
            bar.update()
            yield number, layer


def _checked_name(name: str) -> str:
    """The name of a tensor or a module. Raises TypeError unless it is a string: a number is a layer's."""
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string, as in the file, such as 'lm_head'")
    return name


def _check_families(families: Sequence[Family]) -> None:
    """Raises TypeError unless they are rows of families."""
    if not isinstance(families, Sequence):
        raise TypeError(
            f"families has type {type(families).__name__}; it must be a sequence of rows, as (*FAMILIES, row)"
        )
    for number, row in enumerate(families):
        if not isinstance(row, Family):
            raise TypeError(
                f"families[{number}] has type {type(row).__name__}; it must be a jax_marlin_moe.checkpoint.Family"
            )


def _check_folder(path: str | os.PathLike) -> None:
    """Raises an error, with advice, where a path is empty, or is not a folder but looks like the id of a repository."""
    text = os.fspath(path)
    if not text:
        raise ValueError("path is empty; pass the folder of a checkpoint")
    if not os.path.exists(text) and isinstance(text, str) and _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"{text} is not a folder here; it looks like the id of a Hugging Face repository, which must be downloaded "
            f"first: `hf download {text} --local-dir {text.split('/')[1]}`, then pass that folder"
        )
