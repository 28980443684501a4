"""The activations between the two products of an expert (FORMATS section 7): functions of float32 arrays.

A plain one is a row of the registry and goes by its name; one with parameters is made by a function of that name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation with its parameters.

    Attributes:
        name: its name in the registry, in the custom calls and in the kernels.
        gated: whether the first product has two halves [gate | up], which `apply` combines.
        parameters: in the order in which the kernels take them.
        apply: (gate, up) to the input of the second product; up is None where not gated.
    """

    name: str
    gated: bool
    parameters: tuple[float, ...] = ()
    apply: Callable[..., Float[Array, "... I"]] = dataclasses.field(compare=False, kw_only=True, repr=False)

    def __reduce__(self) -> tuple[Callable[..., "Activation"], tuple]:
        """Pickled by name and parameters: functions of arrays are not."""
        return make_activation, (self.name, self.parameters)


def swiglu(limit: float = math.inf, alpha: float = 1.0, beta: float = 0.0) -> Activation:
    """`g * sigmoid(alpha * g) * (u + beta)` of `g = min(gate, limit)` and `u = clip(up, -limit, limit)`.

    gpt-oss has (7, 1.702, 1); GLM-5.3-Flash and DeepSeek-V4 have a limit of 10.

    Raises:
        ValueError: limit is not positive, or alpha or beta is not finite.
    """
    limit, alpha, beta = float(limit), float(alpha), float(beta)
    if not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta are {alpha} and {beta}; they must be finite")

    def apply(gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + beta)

    return Activation("swiglu", True, (limit, alpha, beta), apply=apply)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("silu", True, apply=lambda gate, up: gate * jax.nn.sigmoid(gate) * up),
        Activation("gelu_tanh", True, apply=lambda gate, up: jax.nn.gelu(gate, approximate=True) * up),
        Activation("relu2", False, apply=lambda gate, _: jnp.square(jnp.maximum(gate, 0))),
    )
}


def get_activation(activation: str | Activation) -> Activation:
    """The registry row of a name, or the activation itself; raises ValueError with the known names otherwise."""
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; it must be one of {', '.join(sorted(ACTIVATIONS))}, or "
            "jax_marlin_moe.swiglu(limit, alpha, beta)"
        )
    return ACTIVATIONS[activation]


def make_activation(name: str, parameters: Sequence[float]) -> Activation:
    """The activation that has this name and these parameters; raises ValueError for an unknown name."""
    return swiglu(*parameters) if name == "swiglu" else get_activation(name)
