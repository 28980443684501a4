"""What every test shares: caches of the run, reproducible properties, and platforms to run on."""

import atexit
import collections
import functools
import gc
import os
import re
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
    # What XLA compiles is compiled once for all workers and processes of a run, unless the environment names a cache.
    # JAX looks when it is imported; the workers have the environment of this process, which starts them.
    xla_cache = tempfile.TemporaryDirectory(prefix="jax_marlin_moe_xla_")
    atexit.register(xla_cache.cleanup)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": xla_cache.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

if gc.isenabled():  # what is imported and collected stays: looking for cycles meanwhile finds none
    gc.set_threshold(50_000, 20, 20)

import jax
import pytest
from covering import covering, sample
from hypothesis import settings

from jax_marlin_moe.cuda import cache, compiler

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("reproducible")


@functools.cache
def cuda_is_visible() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def pytest_addoption(parser):
    parser.addoption("--write-transforms", action="store_true", help="write docs/transforms.md")
    parser.addoption("--parity-table", help="with -m parity: the file that the table of families is written to")
    parser.addoption("--router-table", help="with -m parity: the file that the table of routers is written to")


def is_ordinary(config) -> bool:
    """Whether a run is one without marks: on a CPU, and without the other cases of large products."""
    return all(f"not {mark}" in config.option.markexpr for mark in ("gpu", "exhaustive"))


def pytest_configure(config):
    # The workers share the cores, and each would have its BLAS spin on all of them. numpy looks when it is imported,
    # which other plugins of a worker may do before this file is read: the workers inherit what is set here.
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Most of a run is compiling, for shapes that are used once: without LLVM's optimisation, a third less.
    if is_ordinary(config):
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what ordinary runs skip of large products of parameters, and puts long tests first."""
    products = collections.defaultdict(list)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & {"covering", "sampled"} and not marks & {"gpu", "parity"}:
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        kept = covering(cases) if cases[0].get_closest_marker("covering") else cases
        if mark := cases[0].get_closest_marker("sampled"):
            kept = sample(kept, *mark.args)
        for item in set(cases).difference(kept):
            item.add_marker(pytest.mark.exhaustive)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# Tests that share something expensive, or wait for each other: with -n, those of each run in one worker.
TOGETHER = ("test_cpu_handlers_fuzz.py", "test_cuda_handlers.py", "test_large_arrays_on_the_card")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    few = len(config.getoption("tx")) <= 4

    class TogetherScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            # Few workers have time for whole tests, whose cases share compiled functions.
            name = nodeid.partition("[")[0] if few else nodeid
            return next((shared for shared in TOGETHER if shared in nodeid), name)

    return TogetherScheduling(config, log)


def pytest_collection_finish(session):
    # Little that tests leave is in cycles: looking for them as often as usual would take a twentieth of a run.
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not cuda_is_visible():
        pytest.skip("no CUDA device is visible")


# Where the environment names an architecture, the tests on the card run its kernels: as PTX, "compute_75" to
# "compute_89" run on later cards. What it lacks by design is skipped, and the error is the reason.
NAMED_ARCHITECTURE = os.environ.get(compiler.ARCHITECTURE_VARIABLE)
BEYOND_THE_ARCHITECTURE = re.compile(r"x has dtype bfloat16, which compute capability|cuda_scheme is .* does not fit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ValueError as error:
        if NAMED_ARCHITECTURE and item.get_closest_marker("gpu") and BEYOND_THE_ARCHITECTURE.search(str(error)):
            pytest.skip(f"{NAMED_ARCHITECTURE}: {error}")
        raise


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory, pytestconfig):
    """Kernels are compiled anew in each run, once for all of its workers, unless the environment names a cache.

    Ordinary runs, which execute none, have NVRTC hurry: a third of the time, the same checks but for fast code.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # the workers' folders lie in the run's
    folder = os.environ.get(cache.ENVIRONMENT_VARIABLE, str(folder / "kernels"))
    options = compiler._options
    with pytest.MonkeyPatch.context() as patch:
        if is_ordinary(pytestconfig):
            patch.setattr(compiler, "_options", lambda architecture: options(architecture) | {"ofast_compile": "max"})
            folder = folder and os.path.join(folder, "unoptimised")  # nobody else is to find them
        patch.setenv(cache.ENVIRONMENT_VARIABLE, folder)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request):
    """An implementation with a custom call of its own, its device being the default one."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param
