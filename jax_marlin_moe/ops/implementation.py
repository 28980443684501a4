"""`implementation=None | "cuda" | "cpu" | "xla"`: who serves a call, decided without touching a device.

None leaves the choice to the platform that the call is lowered for: the CUDA kernels, the native CPU kernels, and
the reference where neither can serve. A named implementation that cannot serve raises and says why.
"""

import warnings

import jax

from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler

IMPLEMENTATIONS = ("cuda", "cpu", "xla")


def unavailable_reason(platform: str) -> str | None:
    """Why the custom calls of "cpu" or "cuda" cannot be made here, or None; whether there is a device is no matter."""
    return native.unavailable_reason() or (compiler.unavailable_reason() if platform == "cuda" else None)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for an unknown name, and for one that is not installed."""
    if implementation is None or implementation == "xla":
        return
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; it must be None or one of {IMPLEMENTATIONS}")
    reason = unavailable_reason(implementation)
    if reason:
        raise ValueError(f"implementation is {implementation!r}, which cannot serve here: {reason}")


def serves(platform: str, implementation: str | None) -> bool:
    """Whether the custom call of `platform` serves a call lowered for it; False means the reference.

    A program that is lowered for another platform than this process computes on is an artifact: a warning would be
    read by others than those who run it, so there the reference must have been asked for.

    Raises:
        ValueError: the named implementation cannot serve, or an artifact would carry the reference.
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
        raise ValueError(f"implementation is {implementation!r}, which cannot serve here: {reason}")
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
