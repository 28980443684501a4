"""What a checkpoint says of its quantisation, in whichever file it says so."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jax_marlin_moe.checkpoint.tensors import read_json

# Files that may hold the config in place of config.json, and the method that they then mean.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
METHODS = ("awq", "gptq", "auto-round", "compressed-tensors", "modelopt", "modelopt_fp4", "fp8", "mxfp4", "hqq")
_MODELOPT_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "FP8", "MXFP8", "MXFP4", "MIXED_PRECISION", None)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A quantisation config.

    Attributes:
        method: `quant_method`, None where there is no config.
        config: its contents.
        source: the file that said so.
    """

    method: str | None
    config: Mapping[str, Any]
    source: pathlib.Path

    def integer(self, *keys: str, values: Mapping[str, Any] | None = None) -> int:
        """The first of `keys` that is there, an integer; raises ValueError, naming the file, otherwise."""
        values = self.config if values is None else values
        for key in keys:
            if key in values:
                if not isinstance(values[key], int) or isinstance(values[key], bool):
                    raise ValueError(f"{self.source}: {self.method} {key} is {values[key]!r}; it must be an integer")
                return values[key]
        raise ValueError(f"{self.source}: {self.method} {' or '.join(keys)} is missing")

    def module_rule(self, rules: Mapping[str, Any] | None, module: str) -> Mapping[str, Any]:
        """The overrides that GPTQModel's `dynamic` or auto-round's `extra_config` has for a module.

        A key is a regular expression, perhaps behind "+:"; keys behind "-:" leave modules unquantised, which their
        tensors show. The first that matches counts.
        """
        if not isinstance(rules or {}, dict):
            raise ValueError(f"{self.source}: {self.method} rules by module are {rules!r}; they must be an object")
        for pattern, values in (rules or {}).items():
            if not pattern.startswith("-:") and self.matches(pattern.removeprefix("+:"), module):
                return values if isinstance(values, dict) else {}
        return {}

    def matches(self, pattern: str, module: str) -> bool:
        """Whether a regular expression of the config matches a module; raises ValueError where it is none."""
        try:
            return re.match(pattern, module) is not None
        except re.error as error:
            raise ValueError(f"{self.source}: {pattern!r} is no regular expression: {error}") from None


def find_quantization(folder: pathlib.Path, config: Mapping[str, Any]) -> Quantization:
    """The quantisation config of a checkpoint; method None where it has none.

    Args:
        folder: of the checkpoint.
        config: the contents of config.json.

    Raises:
        ValueError: a method that is not supported, by name.
    """
    source = folder / "config.json"
    found: Any = None
    default: str | None = None
    for holder in (config, config.get("text_config") or {}):
        found = found or holder.get("quantization_config") or holder.get("compression_config")
    if found is None:
        for name, method in _OWN_FILES.items():
            if (folder / name).is_file():
                source, default = folder / name, method
                found = read_json(source)
                break
    if found is None:
        return Quantization(None, {}, source)
    if not isinstance(found, dict):
        raise ValueError(f"{source}: quantization_config is a JSON {type(found).__name__}; it must be an object")
    found = {**found, **found["quantization"]} if isinstance(found.get("quantization"), dict) else found
    method = found.get("quant_method", default)
    if method not in METHODS:
        raise ValueError(f"{source}: quant_method is {method!r}; the loader knows {', '.join(METHODS)}")
    if method.startswith("modelopt") and found.get("quant_algo") not in _MODELOPT_ALGORITHMS:
        known = ", ".join(str(name) for name in _MODELOPT_ALGORITHMS[:-1])
        raise ValueError(f"{source}: quant_algo is {found['quant_algo']!r}; the loader knows {known}")
    return Quantization(method, found, source)
