"""What a checkpoint says of its quantisation, and readers of what it says of one module."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from jax_marlin_moe.checkpoint import patterns
from jax_marlin_moe.checkpoint.keys import Keys, short


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


def group_size_from(keys: Keys, *names: str, k: int, sizes: Collection[int]) -> int | None:
    """The group size that a config states, None for one group over all k rows.

    Raises:
        ValueError: it is missing, no integer, or none that the formats have; names the file.
    """
    name = next((name for name in names if name in keys), names[0])
    size = keys.integer(name, low=-1)
    if size in (-1, k):
        return None
    if size not in sizes:
        raise keys.fault(name, f"-1 (one group), K = {k} or one of {tuple(sizes)}, the group sizes that a format has")
    return size
