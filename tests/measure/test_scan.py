"""Which token counts a scan takes, and what it calls a cliff."""

import pytest

pytest.importorskip("cuda.bindings.driver")
from benchmarks.blocks import block_of
from benchmarks.record import with_rows
from benchmarks.scan import cliffs, token_counts
from jax_marlin_moe.cuda.token_ranges import most_tokens


def timed(tokens: int, block_us: float, spread: float = 0.1) -> dict:
    return {"M": tokens, "block_us": block_us, "block_p10_us": block_us - spread, "block_p90_us": block_us + spread}


def test_every_program_is_timed_at_both_ends_of_its_range():
    counts = token_counts(1024)
    assert counts[0] == 1
    assert counts[-1] == 1024
    programs: dict[int | None, list[int]] = {}
    for tokens in counts:
        programs.setdefault(most_tokens(tokens), []).append(tokens)
    programs.pop(None)  # those of an exact number
    assert list(programs) == sorted({most_tokens(tokens) for tokens in range(65, 1025)})
    for most, timed_counts in programs.items():
        assert max(timed_counts) == most
        assert most_tokens(min(timed_counts) - 1) != most


def test_a_cliff_is_more_tokens_in_less_time_beyond_the_spread():
    assert cliffs([timed(64, 100.0), timed(65, 90.0), timed(128, 200.0)]) == [
        {"from": 64, "to": 65, "percent": pytest.approx(11.11, abs=0.01)}
    ]
    assert cliffs([timed(64, 100.0), timed(65, 99.5)]) == []  # clocks
    assert cliffs([timed(64, 100.0, 6.0), timed(65, 90.0, 6.0)]) == []  # the spreads overlap


def row(model: str, tokens: int, implementation: str, block_us: float) -> dict:
    names = ("format", "group_size", "dtype", "activation", "biases", "batch_invariant", "routing")
    what = dict.fromkeys(names, 0) | {"model": model, "M": tokens, "implementation": implementation}
    return what | {"block_us": block_us}


def test_a_later_row_replaces_that_of_another_version():
    earlier = [row("a", 1, "peer 0.1", 10.0), row("a", 16, "peer 0.1", 20.0), row("a", 1, "ours 1", 5.0)]
    found = with_rows(earlier, [row("a", 1, "peer 0.2", 9.0)], block_of)
    assert [(one["M"], one["implementation"], one["block_us"]) for one in found] == [
        (1, "ours 1", 5.0),
        (1, "peer 0.2", 9.0),
        (16, "peer 0.1", 20.0),
    ]
