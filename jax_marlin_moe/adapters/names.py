"""Activations as other frameworks spell them."""

import enum
from collections.abc import Callable

import jax
from jaxtyping import Array

from jax_marlin_moe.activations import ACTIVATIONS, Activation, swiglu

_NAMES: dict[str, str | Activation] = {
    "swigluoai": swiglu(limit=7.0, alpha=1.702, beta=1.0),
    "swish": "silu",
    "gelu_new": "gelu_tanh",
}
_FUNCTIONS: dict[Callable[[Array], Array], str] = {
    jax.nn.silu: "silu",
    jax.nn.relu: "relu",
    jax.nn.gelu: "gelu_tanh",  # which approximates by default
}


def activation_named(activation: str | Activation | enum.Enum | Callable[[Array], Array]) -> str | Activation:
    """The package's activation of gate and up; a member of an enumeration is named by its value.

    Raises:
        ValueError: there is none of that name, or the function is none whose gated form is known.
    """
    if isinstance(activation, enum.Enum):
        return activation_named(activation.value)
    if isinstance(activation, Activation) or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    found = _NAMES.get(activation) if isinstance(activation, str) else _FUNCTIONS.get(activation)
    if found is None:
        known = ", ".join([*ACTIVATIONS, *_NAMES, "jax.nn.silu", "jax.nn.relu", "jax.nn.gelu"])
        raise ValueError(f"activation is {activation!r}; it must be one of {known}")
    return found
