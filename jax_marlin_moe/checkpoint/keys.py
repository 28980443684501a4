"""Typed readers of the values in a JSON config: each key is what it must be, or an error names file, key and value."""

import dataclasses
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Default = TypeVar("Default")

# The default of a key that must be there.
REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Keys:
    """An object of a config, with readers of its values.

    Every reader takes the key, and a default for a key that is missing, which is returned as it is; without a default
    a missing key is an error. Null is a value like others, which only `null=True` makes the same as a missing key.

    Attributes:
        values: the object.
        source: the file that it is in.
        path: the key of the object itself in that file with a dot behind it, "" for the outermost one.
        names: for keys that have other names in this object, those names.

    Raises:
        ValueError: `FILE: KEY is VALUE; it must be ...`, or `FILE: KEY is missing; ...`, or two names of a key are
            there and their values differ. Every reader.
    """

    values: Mapping[str, Any]
    source: object
    path: str = ""
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self.values

    def name(self, key: str) -> str:
        """What a key is called in this object."""
        names = self.names.get(key, (key,))
        found = [name for name in names if name in self.values]
        if any(self.values[name] != self.values[found[0]] for name in found[1:]):
            both = " and ".join(f"{name} = {short(self.values[name])}" for name in found)
            raise ValueError(f"{self.source}: {self.path or 'it'} says {both}; they mean the same and must be equal")
        return found[0] if found else names[0]

    def get(self, key: str) -> Any:
        """The value as it is; None where the key is missing."""
        return self.values.get(self.name(key))

    def boolean(self, key: str, default: Default = REQUIRED, *, null: bool = False) -> bool | Default:
        """`true` or `false` of JSON, nothing that Python takes for one."""
        key = self.name(key)
        must = "true or false"
        if self._missing(key, default, null, must):
            return default
        if not isinstance(self.values[key], bool):
            raise self.fault(key, must)
        return self.values[key]

    def integer(
        self,
        key: str,
        default: Default = REQUIRED,
        *,
        low: int | None = None,
        high: int | None = None,
        null: bool = False,
    ) -> int | Default:
        """An integer, not `true` and not `4.0`, between two bounds that are themselves allowed."""
        key = self.name(key)
        must = f"an integer{_bounds(low, high, None)}"
        if self._missing(key, default, null, must):
            return default
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or not _within(value, low, high, None):
            raise self.fault(key, must)
        return value

    def number(
        self,
        key: str,
        default: Default = REQUIRED,
        *,
        low: float | None = None,
        high: float | None = None,
        above: float | None = None,
        null: bool = False,
    ) -> float | Default:
        """A finite number, written as an integer or not, between `low` and `high`, or greater than `above`."""
        key = self.name(key)
        must = f"a finite number{_bounds(low, high, above)}"
        if self._missing(key, default, null, must):
            return default
        value = self.values[key]
        try:
            found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            found = math.inf
        if not math.isfinite(found) or not _within(found, low, high, above):
            raise self.fault(key, must)
        return found

    def text(self, key: str, default: Default = REQUIRED, *, null: bool = False) -> str | Default:
        """A string that is not empty."""
        key = self.name(key)
        must = "a string that is not empty"
        if self._missing(key, default, null, must):
            return default
        if not isinstance(self.values[key], str) or not self.values[key]:
            raise self.fault(key, must)
        return self.values[key]

    def choice(
        self, key: str, options: Collection[str], default: Default = REQUIRED, *, null: bool = False
    ) -> str | Default:
        """One of some strings."""
        key = self.name(key)
        must = ("one of " if len(options) > 1 else "") + ", ".join(map(repr, options))
        if self._missing(key, default, null, must):
            return default
        if not isinstance(self.values[key], str) or self.values[key] not in options:
            raise self.fault(key, must)
        return self.values[key]

    def object(self, key: str, default: Default = REQUIRED, *, null: bool = False) -> "Keys | Default":
        """An object, with readers of its own."""
        key = self.name(key)
        must = "an object"
        if self._missing(key, default, null, must):
            return default
        if not isinstance(self.values[key], dict):
            raise self.fault(key, must)
        return Keys(self.values[key], self.source, f"{self.path}{key}.")

    def texts(self, key: str, default: Default = REQUIRED, *, null: bool = False) -> list[str] | Default:
        """A list of strings, which may be empty."""
        key = self.name(key)
        must = "a list of strings"
        if self._missing(key, default, null, must):
            return default
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(key, must)
        return list(value)

    def fault(self, key: str, must: str, advice: str = "") -> ValueError:
        """The error of a key whose value is not allowed, or whose absence is not.

        Args:
            key: of `values`.
            must: what the value must be.
            advice: more of the sentence, such as "; convert it first".
        """
        key = self.name(key)
        found = short(self.values[key]) if key in self.values else "missing"
        return ValueError(f"{self.source}: {self.path}{key} is {found}; it must be {must}{advice}")

    def _missing(self, key: str, default: object, null: bool, must: str) -> bool:
        if key in self.values and not (null and self.values[key] is None):
            return False
        if default is REQUIRED:
            state = "null" if key in self.values else "missing"
            raise ValueError(f"{self.source}: {self.path}{key} is {state}; it must be {must}")
        return True


def short(value: object) -> str:
    """The `repr` of a value of a config, shortened where it is long: a file may hold megabytes under one key."""
    form = reprlib.Repr()
    form.maxstring = form.maxother = form.maxlong = 100
    return form.repr(value)


def _within(value: float, low: float | None, high: float | None, above: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def _bounds(low: float | None, high: float | None, above: float | None) -> str:
    if above is not None:
        return f" greater than {above}" + (f" and at most {high}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return "" if high is None else f" of at most {high}"
