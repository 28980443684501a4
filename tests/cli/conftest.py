"""A kernel cache of the test's own."""

import pytest

from jax_marlin_moe.cuda import cache, compiler


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A cache of its own, and no compiled kernels left in memory."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    compiler.compile_cubin.cache_clear()
    return tmp_path
