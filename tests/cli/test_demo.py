"""The command demo: what it computes, how it fails, and what it says without a module or a device."""

import re

import jax
import pytest

from jax_marlin_moe import native
from jax_marlin_moe.cli import demo
from jax_marlin_moe.cli.main import main
from jax_marlin_moe.measure.models import ModelShape


@pytest.fixture(autouse=True)
def few_timed_calls(monkeypatch):
    monkeypatch.setattr(demo, "_TIMED_SECONDS", 0.05)


def test_demo(capsys):
    assert main(["demo", "--small", "--dtype", "float16"]) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.startswith("AWQ checkpoint")]
    tokens_and_names = [(row[4], row[5]) for row in rows]
    best = {"gpu": "cuda", "cpu": "cpu"}[jax.default_backend()]
    assert tokens_and_names == [("1", best), ("1", "xla"), ("16", best), ("16", "xla")]
    assert all(0 < float(row[6]) < 1e-2 for row in rows)
    assert "WRONG" not in output


@pytest.mark.long
def test_demo_of_a_real_size(capsys, monkeypatch):
    small = ModelShape("small", 8, 2, 256, 128)
    monkeypatch.setitem(demo.MODELS, demo._LARGE_MODEL, small)
    assert main(["demo", "--dtype", "float16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("small")]
    assert len(rows) == 4
    assert all(row[-1].endswith("%") for row in rows)


def test_demo_fails_on_wrong_numbers(capsys, monkeypatch):
    monkeypatch.setitem(demo._ERROR_LIMIT, "bfloat16", 1e-9)
    assert main(["demo", "--small"]) == 1
    assert "WRONG" in capsys.readouterr().err


def test_demo_without_the_native_module(capsys, monkeypatch):
    """It shows what the reference does, and fails: that is not what was asked for."""
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was left out")
    assert main(["demo", "--small"]) == 1
    captured = capsys.readouterr()
    assert re.search("only the reference ran: c.* cannot be used: it was left out", captured.err)
    assert {line.split()[5] for line in captured.out.splitlines() if line.startswith("AWQ")} == {"xla"}


def test_demo_without_a_device(capsys, monkeypatch):
    def no_device(*_):
        raise AssertionError  # as JAX_PLATFORMS=cuda ends where the plugin is not installed

    monkeypatch.setattr(jax, "devices", no_device)
    assert main(["demo", "--small"]) == 1
    assert "cannot run: JAX finds no device" in capsys.readouterr().err
