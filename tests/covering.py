"""Which cases of a large product of parameters ordinary runs have."""

import zlib

import pytest


def by_name(item) -> int:
    """A number that neither a neighbour's cases nor the order of parameters decide."""
    return zlib.crc32(item.name.encode())


def parameters(item) -> set[tuple]:
    """Names and values, equal objects being one. (`callspec.indices` count cases, not values.)"""
    plain = (str, int, float, tuple, type(None))
    values = item.callspec.params.items()
    return {(name, repr(value) if isinstance(value, plain) else id(value)) for name, value in values}


def covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """A few cases of one test in which every value of each parameter occurs."""
    left = {item: parameters(item) for item in sorted(items, key=by_name)}
    chosen, seen = [], set()
    while left:
        item = max(left, key=lambda item: len(left[item] - seen))
        if left[item] <= seen:
            break
        seen |= left.pop(item)
        chosen.append(item)
    return chosen


def sample(items: list[pytest.Item], n: int) -> list[pytest.Item]:
    """One case in `n`, and at least one, whatever their order. Tests differ in what of a common list they keep."""
    return sorted(items, key=by_name)[: -(-len(items) // n)]
