"""Loads the compiled module and registers its handlers with XLA, once, when the package is imported.

Importing never initialises a backend. A module that cannot be used is not an import error; `unavailable_reason`
says why.
"""

import functools
import importlib.metadata
import os
import pathlib
import re
import warnings
from platform import machine

import jax

try:
    from jax_marlin_moe import _native  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was never built
    _native = None
    _import_error = str(error)

# By (op, platform), the version of a custom call and its handlers: the CPU ops of csrc/ffi, and a program, which all
# CUDA ops are.
_HANDLERS = {} if _native is None else _native.handlers()


class _Targets(dict[tuple[str, str], str]):
    """By (op, platform). An editable install does not build the module again when its sources change."""

    def __missing__(self, key: tuple[str, str]) -> str:
        raise RuntimeError(
            f"the native module {getattr(_native, '__file__', None)} has no handler of {key[0]} on {key[1]}: it was "
            "built from other sources; install the package again"
        )


# The custom calls' targets: process-global names, and the persistent ABI of exported programs.
TARGETS = _Targets(
    {(op, platform): f"jax_marlin_moe.{op}.{platform}.v{_HANDLERS[op, platform][0]}" for op, platform in _HANDLERS}
)

# What `jax.export` must be told: pass `[jax.export.DisabledSafetyCheck.custom_call(t) for t in CUSTOM_CALL_TARGETS]`.
CUSTOM_CALL_TARGETS = tuple(TARGETS.values())


# The instruction sets of csrc/cpu/gemm_dispatch.cc, of which this variable chooses one, as /proc/cpuinfo names them.
CPU_ISA_VARIABLE = "JAX_MARLIN_MOE_CPU_ISA"
CPU_ISAS = {
    "portable": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    "avx512bf16": frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
}


def cpu_isa_complaint() -> str | None:
    """Why the instruction set that the environment names is not used, or None."""
    named = os.environ.get(CPU_ISA_VARIABLE)
    if not named:
        return None
    if named not in CPU_ISAS:
        return (
            f"{CPU_ISA_VARIABLE} is {named!r}; it must be one of {', '.join(CPU_ISAS)}: the best that this CPU has is "
            "used instead"
        )
    missing = CPU_ISAS[named] - _cpu_flags()
    if missing:
        return (
            f"{CPU_ISA_VARIABLE} is {named!r}, and this CPU lacks {', '.join(sorted(missing))}: the best that it has "
            "is used instead"
        )
    return None


def _cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux tells it; where nobody tells, all that could be asked for."""
    if machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset().union(*CPU_ISAS.values())
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset().union(*CPU_ISAS.values())


@functools.cache
def shadowed_installation() -> pathlib.Path | None:
    """The installed package, where this module is of a source tree that precedes it on the path; else None."""
    try:
        installed = importlib.metadata.distribution("jax_marlin_moe").locate_file("jax_marlin_moe/native.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = pathlib.Path(str(installed))
    # An editable installation has no such file: it leads here.
    return path.parent if path.is_file() and not path.samefile(__file__) else None


@functools.cache
def runtime_ffi_version() -> tuple[int, int]:
    """The FFI API version of the installed jaxlib, from the header it ships."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    fields = [re.search(rf"#define XLA_FFI_API_{part}\s+(\d+)", header) for part in ("MAJOR", "MINOR")]
    major, minor = (int(field.group(1)) for field in fields if field)
    return major, minor


@functools.cache
def unavailable_reason() -> str | None:
    """Why no custom call can be used, or None when all is well."""
    if _native is None and (installed := shadowed_installation()) is not None:
        return (
            f"the source tree {pathlib.Path(__file__).parents[1]}, which has no native module, shadows the package "
            f"that is installed in {installed.parent}; run from another folder, or with `python -P`"
        )
    if _native is None:
        return f"the native module is not built ({_import_error}); install the package with pip"
    built, runtime = tuple(_native.ffi_api_version()), runtime_ffi_version()
    if built > runtime:
        return f"the native module speaks XLA FFI {built}, jaxlib only {runtime}; upgrade jaxlib or rebuild"
    return None


def _register() -> None:
    if unavailable_reason() is not None:
        return
    for (op, platform), (_, handlers) in _HANDLERS.items():
        # XLA spells its platforms so; an unknown spelling is dropped without a word.
        spelled = {"cpu": "cpu", "cuda": "CUDA"}[platform]
        jax.ffi.register_ffi_target(TARGETS[op, platform], handlers, platform=spelled)


_register()
if cpu_isa_complaint() is not None:
    warnings.warn(str(cpu_isa_complaint()), stacklevel=2)


def fingerprint(image: bytes, contract: bytes, kernels: str) -> int:
    """The 64-bit digest of a CUDA program's image, its contract and the names of its kernels."""
    return _native.fingerprint(image, contract + kernels.encode())
