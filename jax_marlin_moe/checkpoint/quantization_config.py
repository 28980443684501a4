"""What a checkpoint says of its quantisation, in whichever file it says so."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from jax_marlin_moe.checkpoint import patterns
from jax_marlin_moe.checkpoint.keys import Keys, short
from jax_marlin_moe.checkpoint.quantization_keys import check_keys
from jax_marlin_moe.checkpoint.tensors import read_json

# Files that may hold the config in place of config.json, and the method that they then mean.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
METHODS = ("awq", "gptq", "auto-round", "compressed-tensors", "modelopt", "modelopt_fp4", "fp8", "mxfp4", "hqq")
_MODELOPT_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "FP8", "MXFP8", "MXFP4", "MIXED_PRECISION")


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

    @property
    def keys(self) -> Keys:
        """Typed readers of the contents."""
        return Keys(self.config, self.source)

    def module_rule(self, module: str, *names: str) -> Mapping[str, Any]:
        """The overrides that GPTQModel's `dynamic` or auto-round's `extra_config` has for a module.

        A key is a regular expression, perhaps behind "+:", or the name of the module; keys behind "-:" leave modules
        unquantised, which their tensors show. The first that matches counts.

        Args:
            module: what the names of its tensors begin with.
            *names: of the keys that hold rules; the first that is there counts.
        """
        name = next((name for name in names if self.config.get(name)), None)
        if name is None:
            return {}
        rules = self.keys.object(name)
        for pattern in rules.values:
            if pattern.startswith("-:"):
                continue
            if pattern == module or self.matches(pattern.removeprefix("+:"), module):
                return rules.object(pattern).values
        return {}

    def matches(self, pattern: str, module: str) -> bool:
        """Whether a regular expression of the config matches a module; raises ValueError where it is none."""
        try:
            return patterns.matches(pattern, module)
        except ValueError as error:
            raise ValueError(f"{self.source}: the pattern {short(pattern)} cannot be matched: {error}") from None


def group_size_from(keys: Keys, *names: str, k: int, sizes: Collection[int], per_channel: bool = True) -> int | None:
    """The group size that a config states, None for one group over all k rows.

    Raises:
        ValueError: it is missing, no integer, or none that the formats have; names the file.
    """
    name = next((name for name in names if name in keys), names[0])
    size = keys.integer(name, low=-1)
    if per_channel and (size == -1 or size == k):
        return None
    if size not in sizes:
        one = "-1 (one group), K = " + f"{k} or " if per_channel else ""
        raise keys.fault(name, f"{one}one of {tuple(sizes)}, the group sizes that a format has")
    return size


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
        for name, method in _OWN_FILES.items():
            if (folder / name).is_file():
                source, default = folder / name, method
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
    keys = Keys(found, source)
    if method.startswith("modelopt"):
        algorithm = found.get("quant_algo")
        if algorithm is not None and (not isinstance(algorithm, str) or algorithm not in _MODELOPT_ALGORITHMS):
            known = ", ".join(_MODELOPT_ALGORITHMS)
            raise ValueError(f"{source}: quant_algo is {short(algorithm)}; the loader knows {known}")
    check_keys(method, keys)
    return Quantization(method, found, source)
