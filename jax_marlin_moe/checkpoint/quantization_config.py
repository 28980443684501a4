"""Finds the quantisation config of a checkpoint, in whichever file it is."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jax_marlin_moe.checkpoint.keys import Keys, short
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import check_keys
from jax_marlin_moe.checkpoint.schemes import METHODS
from jax_marlin_moe.checkpoint.tensors import read_json


def find_quantization(folder: pathlib.Path, config: Mapping[str, Any]) -> Quantization:
    """The quantisation config of a checkpoint; method None where it has none.

    Args:
        folder: of the checkpoint.
        config: the contents of config.json.

    Raises:
        ValueError: a method that is not supported, or a key that is not known or would change the weights in a way that
            the loader cannot follow; names file and key.
    """
    source = folder / "config.json"
    found: Mapping[str, Any] | None = None
    default: str | None = None
    outer = Keys(config, source)
    for holder in (outer, outer.object("text_config", None, null=True)):
        for name in ("quantization_config", "compression_config"):
            if holder is not None and found is None:
                inner = holder.object(name, None, null=True)
                found = inner.values if inner is not None and inner.values else None
    if found is None:
        for row in METHODS.values():
            if row.file is not None and (folder / row.file).is_file():
                source, default = folder / row.file, row.name
                found = read_json(source)
                break
    if found is None:
        return Quantization(None, {}, source)
    nested = Keys(found, source).object("quantization", None, null=True)
    if nested is not None:
        found = {**{key: value for key, value in found.items() if key != "quantization"}, **nested.values}
    method = found.get("quant_method", default)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{source}: quant_method is {short(method)}; the loader knows {', '.join(METHODS)}")
    check_keys(METHODS[method], Keys(found, source))
    return Quantization(method, found, source)
