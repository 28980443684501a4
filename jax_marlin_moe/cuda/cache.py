"""The disk cache of compiled kernels: content-addressed, checked, safe for many processes, optional.

`JAX_MARLIN_MOE_CACHE_DIR` names the folder; empty switches the cache off. Otherwise it is `jax_marlin_moe` where
platformdirs has the user's caches (`XDG_CACHE_HOME` or `~/.cache` on Linux); without a home there is no cache. A folder
that cannot be read or written costs a compilation, never an error.

An entry is machine code behind a header: a magic number, the length and the SHA-256 digest of what the compiler
returned. What does not match (cut, changed, not a regular file, too large) is deleted, compiled and stored again, with
a warning. The digest catches damage. It does not authenticate: who can write the folder can run code on the card. So
the default folder is not used, with a warning, where it belongs to another user or others can write to it; its entries
have mode 0600. A folder that the variable names is used as it is, shared ones included: naming it is trusting all who
can write to it. Entries there can be read by those who can read the folder.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import stat
import struct
import tempfile
import warnings

ENVIRONMENT_VARIABLE = "JAX_MARLIN_MOE_CACHE_DIR"

ENTRY_FORMAT = 2  # a part of every key: entries of another format are never looked up
_MAGIC = b"JMMCUBIN"
_HEADER = struct.Struct("<8sQ32s")  # magic, length, SHA-256
_MOST_BYTES = 64 << 20  # of an entry; programs have some 100 KB
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class OffError(Exception):
    """Kernels are not kept, as was asked for or for want of a home; says what to do about it."""


class RefusedError(OffError):
    """Kernels are not kept in spite of a variable that is set or a folder that exists."""


def directory() -> pathlib.Path | None:
    """Where compiled kernels are kept, or None when the cache is off; warns where a folder is refused."""
    try:
        return located()
    except RefusedError as error:
        _warn_once(str(error))
    except OffError:
        pass
    return None


def located() -> pathlib.Path:
    """Where compiled kernels are kept.

    Raises:
        OffError: the cache is off.
        RefusedError: it is, and nobody asked for that.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named is None:
        return _default_directory()
    if not named:
        raise OffError(f"{ENVIRONMENT_VARIABLE} is empty; set it to a folder")
    expanded = os.path.expanduser(named)
    if expanded.startswith("~"):
        raise RefusedError(
            f"{ENVIRONMENT_VARIABLE} is {named!r}, whose home is not known; kernels are not cached: set it to a folder"
        )
    return pathlib.Path(expanded)


def _default_directory() -> pathlib.Path:
    try:
        import platformdirs
    except ModuleNotFoundError:  # an installation without dependencies compiles, too
        raise OffError(
            f"platformdirs, which knows the folder of caches, is not installed; install it, or set "
            f"{ENVIRONMENT_VARIABLE} to a folder"
        ) from None
    try:
        folder = platformdirs.user_cache_path("jax_marlin_moe", appauthor=False)
    except RuntimeError:  # no home; older versions return a path that begins with "~"
        folder = pathlib.Path("~")
    if not folder.is_absolute():
        raise OffError(f"there is no home directory to keep kernels in; set {ENVIRONMENT_VARIABLE} to a folder")
    try:
        status = folder.stat()
    except OSError:  # not made yet, or out of reach
        return folder
    if status.st_uid not in (os.geteuid(), 0):
        fault = f"belongs to another user (uid {status.st_uid})"
    elif status.st_mode & _WRITABLE_BY_OTHERS:
        fault = f"can be written by others (mode {stat.S_IMODE(status.st_mode):04o}; chmod go-w)"
    else:
        return folder
    raise RefusedError(
        f"the kernel cache {folder} {fault}: it is not used, since who can write it can run code on the card; set "
        f"{ENVIRONMENT_VARIABLE} to use it or another folder"
    )


def load(key: str) -> bytes | None:
    """The machine code stored under `key`, if there is an undamaged entry."""
    root = directory()
    if root is None:
        return None
    path = root / f"{key}.cubin"
    try:
        return _checked(read_regular_file(path, _MOST_BYTES))
    except OSError:
        return None
    except ValueError as error:
        # Deleted where it can be: what is stored next takes its place.
        with contextlib.suppress(OSError):
            path.unlink()
        _warn_once(f"the kernel cache entry {path} {error}: it is deleted and compiled again")
        return None


def _checked(entry: bytes) -> bytes:
    if len(entry) < _HEADER.size:
        raise ValueError(f"has {len(entry)} bytes, fewer than its header")
    magic, length, digest = _HEADER.unpack_from(entry)
    code = entry[_HEADER.size :]
    if magic != _MAGIC:
        raise ValueError(f"begins with {magic!r}; it must begin with {_MAGIC!r}")
    if length != len(code):
        raise ValueError(f"holds {len(code)} bytes of machine code; it must hold {length}")
    if hashlib.sha256(code).digest() != digest:
        raise ValueError("does not have the digest that it states")
    return code


def store(key: str, cubin: bytes) -> None:
    """Stores atomically: a reader sees the whole file or none. Where it cannot be written, nothing is kept."""
    root = directory()
    if root is None:
        return
    header = _HEADER.pack(_MAGIC, len(cubin), hashlib.sha256(cubin).digest())
    with contextlib.suppress(OSError):
        write_file(root / f"{key}.cubin", header + cubin)


def read_regular_file(path: pathlib.Path, most_bytes: int) -> bytes:
    """The bytes of a regular file; pipes and devices, which may never end, are not read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not a regular file or larger than `most_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"has {status.st_size} bytes; it must have at most {most_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes + 1)
    finally:
        os.close(descriptor)


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes atomically into a folder that is made if it is not there; raises OSError and leaves nothing behind.

    The mode is 0600, and that of the folder for reading where `ENVIRONMENT_VARIABLE` names one.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o777 if ENVIRONMENT_VARIABLE in os.environ else 0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if ENVIRONMENT_VARIABLE in os.environ:
                os.fchmod(file.fileno(), 0o600 | (path.parent.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
