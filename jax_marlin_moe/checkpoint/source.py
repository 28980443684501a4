"""A checkpoint folder as its tool wrote it: config.json and safetensors files."""

import functools
import pathlib

from jax_marlin_moe.checkpoint.families import Family, get_family, number_of_layers
from jax_marlin_moe.checkpoint.layer_reader import LayerReader
from jax_marlin_moe.checkpoint.model_facts import ModelFacts, read_facts
from jax_marlin_moe.checkpoint.model_tensors import ModelTensors
from jax_marlin_moe.checkpoint.numbering import claim_number
from jax_marlin_moe.checkpoint.quantization_config import find_quantization
from jax_marlin_moe.checkpoint.schemes.plain import Target
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder, read_json
from jax_marlin_moe.layer import MoELayer


class Source:
    """An opened folder.

    Args:
        folder: the folder.
        target: what plain experts become, None where they are refused.

    Attributes:
        folder: likewise.
        config: its config.json.
        family: how tensors are named, and the rule.
        model_type: of the config.
        quantization: what the config says of it.
        files: its tensors.
        layers: numbers of the layers with experts, ascending, without those for multi-token prediction.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the model or its quantisation is not supported.
    """

    def __init__(self, folder: pathlib.Path, target: Target | None) -> None:
        self.folder = folder
        self.config = self.folder / "config.json"
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.folder} holds no config.json; pass the folder of a checkpoint")
        whole = read_json(self.config)
        self.family, self.model_type, self._keys = get_family(whole, self.config)
        self.quantization = find_quantization(self.folder, whole)
        self._target = target
        self.files = TensorFolder(self.folder)
        self._prefixes = _layer_prefixes(self.files, self.family)
        last = number_of_layers(self._keys)
        self.layers = sorted(n for n in self._prefixes if last is None or n < last)

    def model_tensors(self) -> ModelTensors:
        """All tensors by name, and linears."""
        return ModelTensors(self.files, self.quantization)

    def beside_experts(self) -> dict[pathlib.Path, list[str]]:
        """By file, the tensors that no layer of `layers` reads."""
        owned = tuple(prefix for layer in self.layers for prefix in self.family.owned(self.prefix(layer)))
        others = {self.family.name(name, self.prefix(layer)) for layer in self.layers for name in self.family.others}
        found: dict[pathlib.Path, list[str]] = {}
        for name in sorted(self.files.names):
            if name in others or not name.startswith(owned):
                found.setdefault(self.files.file_of(name), []).append(name)
        return dict(sorted(found.items()))

    def load(self, layer: int) -> MoELayer:
        """Loads one of `layers`; errors as for `load_moe_layer`."""
        return LayerReader(
            files=self.files,
            layer=layer,
            prefix=self.prefix(layer),
            family=self.family,
            facts=self.facts,
            quantization=self.quantization,
            source=self.config,
            model_type=self.model_type,
            target=self._target_of(layer),
        ).load()

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """What the config says of all layers; raises ValueError where it says what the loader does not know."""
        return read_facts(self.family, self.model_type, self._keys)

    def _target_of(self, layer: int) -> Target | None:
        """What plain experts of a layer become; None where it is quantised and others, which are plain, are meant."""
        if self._target is not None and not self._plain_layers:
            raise ValueError(
                f"{self.folder}: layer {layer} is quantised already; quantize={self._target.weight_format!r} is for "
                "plain weights: omit it"
            )
        return self._target if layer in self._plain_layers else None

    @functools.cached_property
    def _plain_layers(self) -> frozenset[int]:
        pattern = self.family.layer_pattern()
        found = ((name, match) for name in self.files.names if (match := pattern.match(name)))
        return frozenset(
            int(match.group(2))
            for name, match in found
            if (name.endswith(".weight") or name == match.group()) and self.files.dtype(name) in FLOATS
        )

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return self._prefixes[layer]


def _layer_prefixes(files: TensorFolder, family: Family) -> dict[int, str]:
    """What the names of each layer's tensors begin with; raises ValueError where two could be one layer."""
    pattern = family.layer_pattern()
    found: dict[int, str] = {}
    for name in sorted(files.names):
        match = pattern.match(name)
        if match is not None:
            claim_number(found, files, name, match.group(2), match.group(1))
    return found
