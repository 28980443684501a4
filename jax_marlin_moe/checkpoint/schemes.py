"""The quantisation schemes that the loader knows: one row each, found by `quant_method`."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_marlin_moe.checkpoint import awq, gptq
from jax_marlin_moe.checkpoint.tensors import TensorFolder, read_json
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way of storing quantised linears.

    Attributes:
        quant_method: its name in the quantisation config.
        own_file: a file of its own that may hold the config in place of config.json, and then names no method.
        parse: (config, source) to parameters; raises ValueError for variants that are not supported.
        read_matrix: (files, linears, k, n, parameters) to the packed matrix of all experts; `linears` lists per
            expert the modules (k, n) that stand side by side.
    """

    quant_method: str
    own_file: str
    parse: Callable[[Mapping[str, Any], object], Any]
    read_matrix: Callable[[TensorFolder, Sequence[Sequence[str]], int, int, Any], MarlinWeights]


SCHEMES = (
    Scheme("awq", "quant_config.json", awq.parse, awq.read_matrix),
    Scheme("gptq", "quantize_config.json", gptq.parse, gptq.read_matrix),
)


def find_scheme(folder: pathlib.Path, config: Mapping[str, Any]) -> tuple[Scheme, Any]:
    """The scheme of a checkpoint and its parameters.

    Args:
        folder: of the checkpoint.
        config: the contents of config.json; its `quantization_config` counts first.

    Raises:
        ValueError: there is no quantisation config, or a method or variant that is not supported.
    """
    quantization, source = config.get("quantization_config"), folder / "config.json"
    default_method = None
    if quantization is None:
        for scheme in SCHEMES:
            if (folder / scheme.own_file).is_file():
                source, default_method = folder / scheme.own_file, scheme.quant_method
                quantization = read_json(source)
                break
    if not isinstance(quantization, dict):
        raise ValueError(f"{source}: there is no quantization_config; the loader needs quantised experts")
    method = quantization.get("quant_method", default_method)
    for scheme in SCHEMES:
        if scheme.quant_method == method:
            return scheme, scheme.parse(quantization, source)
    known = ", ".join(scheme.quant_method for scheme in SCHEMES)
    raise ValueError(f"{source}: quant_method is {method!r}; the loader knows {known}")
