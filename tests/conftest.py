"""What every test shares: a kernel cache of its own, reproducible properties, and platforms to run on."""

import functools
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; numpy looks when it is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("reproducible")


@functools.cache
def cuda_is_visible() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not cuda_is_visible():
        pytest.skip("no CUDA device is visible")


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """Kernels are compiled anew in each session, unless the environment names a cache."""
    if "JAX_MARLIN_MOE_CACHE_DIR" in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_MARLIN_MOE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request):
    """An implementation with a custom call of its own, its device being the default one."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param
