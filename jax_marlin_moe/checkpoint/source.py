"""A checkpoint folder as its tool wrote it: config.json and safetensors files."""

import dataclasses
import pathlib
from collections.abc import Sequence

from jax_marlin_moe.checkpoint.family import Family, get_family, number_of_layers
from jax_marlin_moe.checkpoint.layer_reader import LayerReader
from jax_marlin_moe.checkpoint.layer_tensors import LayerTensors
from jax_marlin_moe.checkpoint.model_facts import read_facts
from jax_marlin_moe.checkpoint.model_tensors import ModelTensors
from jax_marlin_moe.checkpoint.numbering import claim_number
from jax_marlin_moe.checkpoint.quantization_config import find_quantization
from jax_marlin_moe.checkpoint.schemes.plain import Target
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder, read_json
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.sharding.moe_sharding import MoESharding


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer of experts lies.

    Attributes:
        prefix: what the names of its tensors begin with.
        number: its number among the model's layers; None for one that is numbered apart.
        plain: whether some of its experts are plain floats.
    """

    prefix: str
    number: int | None
    plain: bool


class Source:
    """An opened folder.

    Args:
        folder: the folder.
        target: what plain experts become, None where they are refused.
        families: rows of model families.

    Attributes:
        folder: likewise.
        config: its config.json.
        family: how tensors are named, and the rule.
        model_type: of the config.
        quantization: what the config says of it.
        files: its tensors.
        layers: numbers of the layers with experts, ascending, without those for multi-token prediction.
        layer_names: what the names of the tensors of each layer with experts begin with, those of `layers` first.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the model or its quantisation is not supported, or its tensors are named as those of another family.
    """

    def __init__(self, folder: pathlib.Path, target: Target | None, families: Sequence[Family]) -> None:
        self.folder = folder
        self.config = self.folder / "config.json"
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.folder} holds no config.json; pass the folder of a checkpoint")
        whole = read_json(self.config)
        self.family, self.model_type, self._keys = get_family(whole, self.config, families)
        self.quantization = find_quantization(self.folder, whole)
        self._target = target
        self.files = TensorFolder(self.folder)
        numbered, further = _places(self.files, self.family)
        last = number_of_layers(self._keys)
        self.layers = [n for n in numbered if last is None or n < last]
        self._places = {name: place for place in (*numbered.values(), *further) for name in (place.prefix[:-1],)}
        self.layer_names = [numbered[n].prefix[:-1] for n in self.layers]
        self.layer_names += [name for name in self._places if name not in self.layer_names]
        self._numbered = {n: numbered[n] for n in self.layers}
        if not self._places:
            self._refuse_another_family(families)

    def model_tensors(self) -> ModelTensors:
        """All tensors by name, and linears."""
        return ModelTensors(self.files, self.quantization)

    def beside_experts(self) -> dict[pathlib.Path, list[str]]:
        """By file, the tensors that no layer of `layers` reads."""
        owned = tuple(prefix for layer in self.layers for prefix in self.family.owned(self._numbered[layer].prefix))
        others = {
            self.family.name(name, self._numbered[layer].prefix) for layer in self.layers for name in self.family.others
        }
        found: dict[pathlib.Path, list[str]] = {}
        for name in sorted(self.files.names):
            if name in others or not name.startswith(owned):
                found.setdefault(self.files.file_of(name), []).append(name)
        return dict(sorted(found.items()))

    def load(self, layer: int | str, sharding: MoESharding | None = None) -> MoELayer:
        """Loads one of `layers`, or one of `layer_names`; arguments and errors as for `load_moe_layer`."""
        return self.reader(layer, sharding).load()

    def reader(self, layer: int | str, sharding: MoESharding | None = None) -> LayerReader:
        """The reader of one of `layers`, or one of `layer_names`; `sharding` as for `load_moe_layer`."""
        place = self._numbered[layer] if isinstance(layer, int) else self._places[layer]
        tensors = LayerTensors(
            files=self.files,
            layer=layer,
            prefix=place.prefix,
            family=self.family,
            facts=read_facts(self.family, self.model_type, self._keys, place.number),
            quantization=self.quantization,
            source=self.config,
            model_type=self.model_type,
        )
        return LayerReader(tensors, self._target_of(layer, place), sharding)

    def _target_of(self, layer: int | str, place: _Place) -> Target | None:
        """What plain experts of a layer become; None where it is quantised and others, which are plain, are meant."""
        if self._target is not None and not any(other.plain for other in self._places.values()):
            raise ValueError(
                f"{self.folder}: layer {layer} is quantised already; quantize={self._target.weight_format!r} is for "
                "plain weights: omit it"
            )
        return self._target if place.plain else None

    def _refuse_another_family(self, families: Sequence[Family]) -> None:
        for row in families:
            name = next((name for name in sorted(self.files.names) if row.layer_pattern().match(name)), None)
            if name is not None:
                raise self.files.fault(
                    name,
                    f"is named as in {' or '.join(row.model_types)}; {self.config} says model_type = "
                    f"{self.model_type!r}, whose experts are {self.family.name(self.family.experts, 'layers.N.')}.*",
                )


def _places(files: TensorFolder, family: Family) -> tuple[dict[int, _Place], list[_Place]]:
    """The layers of experts by number, ascending, and those that are numbered apart.

    Raises:
        ValueError: two could be one layer.
    """
    pattern = family.layer_pattern()
    numbers: dict[int, str] = {}
    prefixes: dict[str, bool] = {}
    for name in sorted(files.names):
        match = pattern.match(name)
        if match is None:
            continue
        if match.group("prediction") is None:
            claim_number(numbers, files, name, match.group("number"), match.group(1))
        whole = name.endswith(".weight") or name == match.group()
        plain = whole and files.dtype(name) in FLOATS
        prefixes[match.group(1)] = prefixes.get(match.group(1), False) or plain
    numbered = {n: _Place(numbers[n], n, prefixes.pop(numbers[n])) for n in sorted(numbers)}
    return numbered, [_Place(prefix, None, plain) for prefix, plain in prefixes.items()]
