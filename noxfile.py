"""Checks over interpreters and versions of JAX: `nox -s tests`, or one of them, `nox -s "tests-3.12(jax='oldest')"`."""

import pathlib

import nox

nox.options.default_venv_backend = "uv|venv"
nox.options.sessions = ["tests", "site", "sdist"]

PYTHONS = ("3.11", "3.12", "3.13")
JAX = {"oldest": "jax==0.10.0", "newest": "jax"}
# What says soon whether a pair works: the ops on a CPU, the kernels' compilation, loading, Flax.
QUICK = ("tests/ops/test_fused_moe.py", "tests/test_weights.py", "tests/checkpoint/test_model_tensors.py", "tests/flax")


@nox.session(python=PYTHONS)
@nox.parametrize("jax", list(JAX))
def tests(session: nox.Session, jax: str) -> None:
    """The tests of QUICK, or those that are named behind `--`, with the oldest or newest JAX."""
    session.install(".[test,flax]", JAX[jax])
    # -P: the source tree, which has no native module, would be found before the package that is installed.
    session.run("python", "-P", "-m", "pytest", "-q", *(session.posargs or QUICK))


@nox.session(python="3.13t")
def free_threaded(session: nox.Session) -> None:
    """A free-threaded Python. It has no wheel of safetensors, nor of later versions of JAX for 3.13t."""
    session.install("jax==0.10.2", "jaxtyping", "numpy", "ml_dtypes", "platformdirs")
    session.install("scikit-build-core", "nanobind", "cmake", "ninja")
    session.install("--no-deps", "--no-build-isolation", ".")
    session.run("python", "-P", "tests/native/free_threaded.py")


@nox.session(python="3.12")
def site(session: nox.Session) -> None:
    """The documentation, warnings as errors."""
    session.install(".[docs]")
    session.run("sphinx-build", "-q", "-W", "docs", "build/site")


@nox.session(python="3.12")
def sdist(session: nox.Session) -> None:
    """A source distribution, and the package that is built from it, outside the checkout."""
    session.install("build")
    folder = pathlib.Path(session.create_tmp())
    session.run("python", "-m", "build", "--sdist", "-o", str(folder))
    session.install("--force-reinstall", *map(str, folder.glob("*.tar.gz")))
    session.chdir(folder)
    session.run("python", "-m", "jax_marlin_moe", "demo", "--small")


@nox.session(python="3.12")
def wheels(session: nox.Session) -> None:
    """Wheels of this machine's architecture by cibuildwheel, which needs docker; those of Linux pass auditwheel."""
    session.install("cibuildwheel")
    session.run("cibuildwheel", "--output-dir", "dist", external=True)
