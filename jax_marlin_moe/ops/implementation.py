"""`implementation=None | "cuda" | "cpu" | "xla"`: which form runs a call, decided without touching a device.

None leaves the choice to the platform that the call is lowered for: the CUDA kernels, the native CPU kernels, and
the reference where neither can run. A named implementation that cannot run raises and says why.
"""

import warnings

import jax

from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler

IMPLEMENTATIONS = ("cuda", "cpu", "xla")


def unavailable_reason(platform: str) -> str | None:
    """Why the custom calls of "cpu" or "cuda" cannot be made here, or None; a device is not needed for them."""
    return native.unavailable_reason() or (compiler.unavailable_reason() if platform == "cuda" else None)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown name, and for one that is not installed."""
    if implementation is None or implementation == "xla":
        return
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be None or one of {IMPLEMENTATIONS}")
    reason = unavailable_reason(implementation)
    if reason:
        raise ValueError(f"implementation is {implementation!r}, which cannot run here: {reason}")


def becomes_custom_call(platform: str, implementation: str | None) -> bool:
    """Whether a call lowered for `platform` becomes its custom call; False means the reference.

    A program that is lowered for another platform than this process computes on is an artefact: a warning would
    reach other people than those who run it, so the reference must be asked for.

    Raises:
        ValueError: the named implementation cannot run, or an artefact would carry the reference.
    """
    if implementation not in (None, platform):
        raise ValueError(
            f"implementation is {implementation!r}, but the program is lowered for {platform}: pass None, 'xla' or "
            f"{platform!r}, or place the operands on a {implementation} device"
        )
    reason = unavailable_reason(platform)
    if reason is None:
        return True
    if implementation is not None:
        raise ValueError(f"implementation is {implementation!r}, which cannot run here: {reason}")
    if jax.default_backend() != {"cuda": "gpu"}.get(platform, platform):
        raise ValueError(
            f"implementation is None, and a program lowered for {platform} on a {jax.default_backend()} backend would "
            f"carry the slow reference: {reason}. Pass implementation='xla' if that is what it must carry"
        )
    warnings.warn(f"jax_marlin_moe falls back to the slow reference on {platform}: {reason}", stacklevel=2)
    return False


def refuse_named(implementation: str | None) -> None:
    """Raises ValueError for a named implementation where the platform has no kernels."""
    if implementation is not None:
        raise ValueError(
            f"implementation is {implementation!r}, but the program is lowered for a platform that has no kernels: "
            f"pass None or 'xla', or place the operands on a {implementation} device"
        )
