"""The disk cache of compiled kernels: content-addressed, safe for many processes, optional.

`JAX_MARLIN_MOE_CACHE_DIR` names the directory; empty switches the cache off. A directory that cannot be read or
written costs a compilation, never an error.
"""

import contextlib
import os
import pathlib
import tempfile

ENVIRONMENT_VARIABLE = "JAX_MARLIN_MOE_CACHE_DIR"


def directory() -> pathlib.Path | None:
    """Where cubins are kept, or None when the cache is off."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is not None:
        return pathlib.Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base, "jax_marlin_moe")


def load(key: str) -> bytes | None:
    """The cubin stored under `key`, if there is one."""
    root = directory()
    if root is None:
        return None
    try:
        return (root / f"{key}.cubin").read_bytes()
    except OSError:
        return None


def store(key: str, cubin: bytes) -> None:
    """Stores atomically: a reader sees the whole file or none."""
    root = directory()
    if root is None:
        return
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=root, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            os.replace(temporary, root / f"{key}.cubin")
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
