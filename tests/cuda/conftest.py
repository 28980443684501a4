"""Lowering for an architecture without its card."""

import jax
import pytest

from jax_marlin_moe.cuda import compiler


@pytest.fixture
def lower(monkeypatch):
    """Lowers a function for a CUDA architecture. The architecture is read then, so every call traces anew."""

    def lower_for(architecture, function, *arguments):
        monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, architecture)
        traced = jax.jit(lambda *arrays: function(*arrays)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower_for
