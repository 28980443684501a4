"""The few cases that stand for a product of parameters."""

import itertools
import random
from types import SimpleNamespace

from covering import covering, sample

KINDS = [object() for _ in range(12)]


def cases():
    values = itertools.product(range(12), ("bfloat16", "float16"), (16, 64, None))
    return [
        Item(f"test[{kind}-{dtype}-{size}]", {"kind": KINDS[kind], "dtype": dtype, "size": size})
        for kind, dtype, size in values
    ]


class Item:
    def __init__(self, name, params):
        self.name, self.callspec = name, SimpleNamespace(params=params)


def test_every_value_of_every_parameter_has_a_case_and_there_are_no_more_than_need_be():
    items = cases()
    chosen = covering(items)
    assert len(chosen) == len(KINDS)
    for name in ("kind", "dtype", "size"):
        assert {item.callspec.params[name] for item in chosen} == {item.callspec.params[name] for item in items}


def test_the_choice_depends_on_names_alone():
    """The workers of a run must choose alike, whatever order they collect in."""
    items = cases()
    names = [item.name for item in covering(items)]
    random.Random(0).shuffle(items)
    assert [item.name for item in covering(items)] == names


def test_a_sample_is_never_empty_and_depends_on_names_alone():
    items = cases()
    names = {item.name for item in sample(items, 5)}
    assert len(names) == -(-len(items) // 5)
    assert len(sample(items[:3], 100)) == 1
    random.Random(0).shuffle(items)
    assert {item.name for item in sample(items, 5)} == names
