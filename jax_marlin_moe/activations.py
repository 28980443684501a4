"""The activations between the two products of an expert: one row each, functions of float32 arrays."""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation by name.

    Attributes:
        name: its name in the registry, in the custom calls and in the kernels.
        gated: whether the first product has two halves [gate | up], which `apply` combines.
        apply: (gate, up) to the input of the second product; up is None where not gated.
    """

    name: str
    gated: bool
    apply: Callable[..., Float[Array, "... I"]] = dataclasses.field(compare=False)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row for row in (Activation("silu", True, lambda gate, up: gate * jax.nn.sigmoid(gate) * up),)
}


def get_activation(name: str) -> Activation:
    """The registry row called `name`; raises ValueError with the known names otherwise."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; it must be one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
