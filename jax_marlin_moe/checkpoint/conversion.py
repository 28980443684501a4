"""`convert`: a checkpoint into the packed form, layer by layer."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from jax.typing import DTypeLike

from jax_marlin_moe.checkpoint import packed
from jax_marlin_moe.checkpoint.loading import Checkpoint


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    report: Callable[[int, int], None] = lambda layer, bytes_written: None,
) -> None:
    """Writes all mixture-of-experts layers of a checkpoint in the packed form.

    One layer is in memory at a time. The manifest is written last: a folder that lacks it is not finished.
    `load_moe_layer(destination, layer)` maps a layer back without repacking.

    Args:
        source: a folder that `load_moe_layer` takes.
        destination: a folder to make; must be empty or new.
        quantize: as in `load_moe_layer`, with the next two.
        group_size: see there.
        scale_dtype: see there.
        report: called with the number and the bytes of each layer when it is written.

    Raises:
        FileExistsError: the destination holds something.
        ValueError: the source has no such layers, is packed already, or `load_moe_layer` refuses one.
    """
    folder = pathlib.Path(destination)
    checkpoint = Checkpoint(source, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype)
    if checkpoint.manifest is not None:
        raise ValueError(f"{source} is packed already")
    if not checkpoint.layers:
        raise ValueError(f"{source} has no layers with experts")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; pass a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[int, Any] = {}
    for number in checkpoint.layers:
        entries[number] = packed.write_layer(folder, number, checkpoint.load(number))
        report(number, (folder / entries[number]["file"]).stat().st_size)
    packed.write_manifest(folder, entries, pathlib.Path(source).name)
