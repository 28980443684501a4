"""Says what the package finds on this machine, and what to install for what is missing."""

import argparse
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator

import jax
import jaxlib

import jax_marlin_moe
from jax_marlin_moe import native
from jax_marlin_moe.cli.console import complain
from jax_marlin_moe.cli.devices import no_device_reason
from jax_marlin_moe.cuda import cache, compiler
from jax_marlin_moe.ops.implementation import unavailable_reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares no options."""


def run(options: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if not even JAX has a device to run on."""
    for name, finding in _findings():
        print(f"{name:15s} {finding}")
    reason = no_device_reason()
    if reason:
        complain(f"nothing works: {reason}; reinstall jax, and see what JAX_PLATFORMS says")
        return 1
    return 0


def _findings() -> Iterator[tuple[str, str]]:
    yield "jax_marlin_moe", f"{jax_marlin_moe.__version__} in {pathlib.Path(jax_marlin_moe.__file__).parent}"
    installed = native.shadowed_installation()
    if installed is not None:
        yield (
            "",
            (
                f"SHADOWS the package that is installed in {installed.parent}, which is not what runs here; run from "
                "another folder, or with `python -P`"
            ),
        )
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "jax, jaxlib", f"{jax.__version__}, {jaxlib.__version__}"
    yield from _devices()
    yield "native module", _native()
    if named := os.environ.get(native.CPU_ISA_VARIABLE):
        yield "CPU kernels", native.cpu_isa_complaint() or f"{named} (from {native.CPU_ISA_VARIABLE})"
    yield "NVRTC", _nvrtc()
    yield "architecture", _architecture()
    yield "kernel cache", _cache()
    for name in ("cpu", "cuda"):
        yield f"runs on {name}", _verdict(name)
    yield "runs on others", "the reference in plain JAX: right, but slow"


def _devices() -> Iterator[tuple[str, str]]:
    reason = no_device_reason()
    if reason:
        yield "device", f"none: {reason}"
        return
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        suffix = f", compute capability {capability}" if capability else ""
        yield f"device {device.id}", f"{device.device_kind} ({device.platform}){suffix}"


def _native() -> str:
    reason = native.unavailable_reason()
    if reason:
        return f"cannot be used: {reason}"
    built, runtime = native._native.ffi_api_version(), native.runtime_ffi_version()
    return f"built for XLA FFI {_dotted(built)}; jaxlib speaks {_dotted(runtime)}"


def _nvrtc() -> str:
    reason = compiler.unavailable_reason()
    return f"missing: {reason}" if reason else _dotted(compiler.version())


def _architecture() -> str:
    if not os.environ.get(compiler.ARCHITECTURE_VARIABLE) and (reason := no_device_reason("cuda")):
        return f"none: {reason}, and {compiler.ARCHITECTURE_VARIABLE} is not set"
    try:
        target = compiler.target_architecture()
    except ValueError as error:
        return f"none: {error}"
    origin = compiler.ARCHITECTURE_VARIABLE if os.environ.get(compiler.ARCHITECTURE_VARIABLE) else "first CUDA device"
    return f"{target} (from {origin})"


def _cache() -> str:
    try:
        folder = cache.located()
    except cache.OffError as error:
        return f"off: {error}"
    kernels = len(list(folder.glob("*.cubin")))
    if _writable(folder):
        return f"{folder}: {kernels} kernels, writable"
    return f"{folder}: {kernels} kernels, NOT writable; set {cache.ENVIRONMENT_VARIABLE} to a folder that is"


def _writable(folder: pathlib.Path) -> bool:
    """Whether files can be made in the folder, or in the first parent that exists; leaves nothing behind."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _verdict(name: str) -> str:
    reason = unavailable_reason(name)
    if reason:
        return f"no: {reason}"
    if no_device_reason(name):
        hint = "; with an NVIDIA card, install jax_marlin_moe[cuda13] (or [cuda12])" if name == "cuda" else ""
        return f"no device, but programs can be lowered for it{hint}"
    return "yes"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
