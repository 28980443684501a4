"""Whether JAX has a device to run on, and why not."""

import jax


def no_device_reason(backend: str | None = None) -> str | None:
    """Why JAX has no device, or none of a backend; None when it has one."""
    try:
        jax.devices(backend)
    # JAX asserts, without a text, that a backend which JAX_PLATFORMS names has been installed.
    except (AssertionError, RuntimeError) as error:
        chosen = jax.config.jax_platforms
        told = f" with JAX_PLATFORMS={chosen}" if chosen else ""
        text = str(error).splitlines()[0] if str(error) else f"{chosen} is not installed"
        return f"JAX finds no device{f' of {backend}' if backend else ''}{told}: {text}"
    return None
