"""CUDA C++ to machine code or PTX, with NVRTC; needs neither a GPU nor a CUDA toolkit.

Kernels include only the headers of this package, so what the compiler makes is a function of the source, the options
and its version, and is cached under their digest.

An architecture is a card's ("sm_80": machine code for it) or a virtual one ("compute_80": PTX with that architecture's
instructions, tiles and shared memory, which the driver compiles for the card when the program is loaded, one of that
compute capability or a later one).
"""

import functools
import hashlib
import logging
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable

import jax

from jax_marlin_moe.cuda import cache
from jax_marlin_moe.cuda.architectures import ARCHITECTURES

ARCHITECTURE_VARIABLE = "JAX_MARLIN_MOE_CUDA_ARCH"

_ARCHITECTURE = re.compile(r"(?:sm|compute)_([0-9]{2,3})[af]?")

_LOGGER = logging.getLogger(__name__)
_IMPORT_LOCK = threading.Lock()

_INSTALL_HINT = "install jax_marlin_moe[cuda13] (or [cuda12])"


class CompilationError(RuntimeError):
    """NVRTC refused a kernel; carries its log."""


@functools.cache
def unavailable_reason() -> str | None:
    """Why kernels cannot be compiled here, or None when they can."""
    try:
        version()
    except (ImportError, RuntimeError, OSError) as error:
        return f"NVRTC was not found ({str(error).splitlines()[0]}); {_INSTALL_HINT}"
    return None


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version; raises ImportError or RuntimeError when it is not installed."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion returned {status}")
    return major, minor


def target_architecture() -> str:
    """The architecture to compile for, such as "sm_90a".

    `JAX_MARLIN_MOE_CUDA_ARCH` decides where it is set (ahead-of-time lowering on a machine with no card, or one PTX
    for cards of several generations); otherwise the first local CUDA device does.

    Raises:
        ValueError: if there is neither, or it is not an architecture that the kernels have.
    """
    named = os.environ.get(ARCHITECTURE_VARIABLE)
    if named:
        return checked_architecture(ARCHITECTURE_VARIABLE, named)
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        raise ValueError(
            f"no CUDA device is visible and {ARCHITECTURE_VARIABLE} is not set; set it to the architecture to compile "
            "for, such as sm_90a"
        ) from None
    capability = str(device.compute_capability)
    row = ARCHITECTURES.get(int(capability.replace(".", "")))
    if row is None:
        raise ValueError(
            f"the CUDA device has compute capability {capability}; it must be one of {_known_architectures()}. For a "
            f"later card set {ARCHITECTURE_VARIABLE} to one of them with compute_ in place of sm_"
        )
    return row.target


def checked_architecture(origin: str, name: str) -> str:
    """The name of an architecture that the kernels have, in full.

    Args:
        origin: what the architecture comes from, for the error.
        name: such as "sm_80", "sm_90" (in full sm_90a) or, for PTX, "compute_80".

    Raises:
        ValueError: if the name is none, or the kernels are not made for that architecture.
    """
    if _ARCHITECTURE.fullmatch(name) is None:
        raise ValueError(f"{origin} is {name!r}; it must look like sm_90a, or compute_80 for PTX")
    if compute_capability(name) not in ARCHITECTURES:
        raise ValueError(
            f"{origin} is {name!r}; it must be one of {_known_architectures()}, or compute_ in place of sm_ for PTX"
        )
    return f"{name}a" if name in ("sm_90", "compute_90") else name  # those kernels use wgmma, of 9.0 alone


def _known_architectures() -> str:
    return ", ".join(f"sm_{capability}" for capability in ARCHITECTURES)


def compute_capability(architecture: str) -> int:
    """90 for "sm_90a" and "compute_90a"."""
    found = _ARCHITECTURE.fullmatch(architecture)
    if found is None:
        raise ValueError(f"the architecture is {architecture!r}; it must look like sm_90a, or compute_80 for PTX")
    return int(found[1])


def is_virtual(architecture: str) -> bool:
    """Whether what is compiled for the architecture is PTX, which the driver compiles for the card at hand."""
    return architecture.startswith("compute_")


@functools.cache
def source_directory() -> pathlib.Path:
    """The folder of the CUDA headers: beside this file when installed, csrc/cuda in a source tree."""
    installed = pathlib.Path(__file__).parent / "source"
    return installed if installed.is_dir() else pathlib.Path(__file__).parents[2] / "csrc" / "cuda"


@functools.cache
def _headers_digest() -> bytes:
    digest = hashlib.sha256()
    folder = source_directory()
    for path in sorted(folder.rglob("*.cuh")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.lru_cache(maxsize=4096)
def compile_cubin(source: str, architecture: str) -> bytes:
    """Compiles one translation unit.

    Args:
        source: CUDA C++ that includes headers of `source_directory()`.
        architecture: such as "sm_90a"; for one such as "compute_80" the result is PTX that ends with a NUL.

    Raises:
        ImportError: if NVRTC is missing; the message names the extra to install.
        CompilationError: if NVRTC refuses the source.
    """
    reason = unavailable_reason()
    if reason:
        raise ImportError(f"jax_marlin_moe cannot compile its CUDA kernels: {reason}")
    options = f"entry {cache.ENTRY_FORMAT} {architecture} c++20 {version()}"
    key = hashlib.sha256(_headers_digest() + options.encode() + b"\0" + source.encode()).hexdigest()
    cubin = cache.load(key)
    if cubin is None:
        start = time.perf_counter()
        cubin = _compile(source, architecture)
        _LOGGER.info("compiled %s for %s in %.2f s", key[:12], architecture, time.perf_counter() - start)
        cache.store(key, cubin)
    else:
        _LOGGER.debug("%s for %s is in the kernel cache", key[:12], architecture)
    return cubin


def _compile(source: str, architecture: str) -> bytes:
    if is_virtual(architecture):
        return _compile_ptx(source, architecture)
    with _IMPORT_LOCK:  # cuda-core's first import is not safe in several threads at once
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(**_options(architecture))
    try:
        return bytes(Program(source, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda-core raises its own types, which differ between versions
        print(source, file=sys.stderr)
        raise CompilationError(f"NVRTC {version()} refused a kernel for {architecture}: {error}") from error


def _options(architecture: str) -> dict[str, str]:
    return {"arch": architecture, "std": "c++20", "include_path": str(source_directory())}


def _compile_ptx(source: str, architecture: str) -> bytes:
    """By NVRTC's own functions: cuda-core asks the driver whether it reads such PTX, and here there may be none."""
    from cuda.bindings import nvrtc

    def checked(result: tuple) -> object:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{status.name}")
        return values[0] if values else None

    def filled(size: object, read: Callable[[object, bytes], tuple]) -> bytes:
        buffer = bytes(size)  # type: ignore[call-overload]
        checked(read(program, buffer))
        return buffer

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}", "--std=c++20", f"--include-path={source_directory()}"]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = filled(checked(nvrtc.nvrtcGetProgramLogSize(program)), nvrtc.nvrtcGetProgramLog)
            print(source, file=sys.stderr)
            raise CompilationError(
                f"NVRTC {version()} refused a kernel for {architecture}: {status.name}: {log.decode(errors='replace')}"
            )
        return filled(checked(nvrtc.nvrtcGetPTXSize(program)), nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
