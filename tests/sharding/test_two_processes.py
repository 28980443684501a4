"""Two processes of `jax.distributed`, as on two hosts: each reads and holds its share, and the sums are right."""

import functools

import jax
import pytest
from other_process import last_lines_of_two


@functools.cache
def cards():
    try:
        return len(jax.devices("cuda"))
    except RuntimeError:
        return 0


def test_two_processes_agree_with_one():
    assert last_lines_of_two("one_of_two_processes.py", __file__, "cpu") == ["right"] * 2


@pytest.mark.gpu
@pytest.mark.skipif("cards() < 2", reason="it needs two cards")
def test_two_processes_with_a_card_each_agree_with_one():
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    assert last_lines_of_two("one_of_two_processes.py", __file__, "cuda", environment=memory) == ["right"] * 2
