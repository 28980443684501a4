"""The activations between the two products of an expert (docs/formats.md, "The expert block").

They are functions of float32 arrays.

A plain one is in the registry under its name; one with parameters is made by a function of that name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class _Function:
    """What a name means.

    Attributes:
        apply: (gate, up, *parameters) to the input of the second product.
        cpp: its name in csrc/cuda/activations.cuh; None where the CUDA kernels lack it.
        gated: whether there is an up.
        parameters: how many.
        check: raises ValueError where they are wrong.
    """

    apply: Callable[..., Array]
    cpp: str | None
    gated: bool = True
    parameters: int = 0
    check: Callable[..., None] = lambda: None


_FUNCTIONS: dict[str, _Function] = {}


def _activation(name: str, cpp: str | None, **facts: Any) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Makes the decorated function the `apply` of a row of the registry; the rest are fields of `_Function`."""

    def add(apply: Callable[..., Array]) -> Callable[..., Array]:
        _FUNCTIONS[name] = _Function(apply, cpp, **facts)
        return apply

    return add


@_activation("silu", "Silu")
def _silu(gate: Array, up: Array) -> Array:
    return gate * jax.nn.sigmoid(gate) * up


@_activation("gelu_tanh", "GeluTanh")
def _gelu_tanh(gate: Array, up: Array) -> Array:
    return jax.nn.gelu(gate, approximate=True) * up


@_activation("relu2", "Relu2", gated=False)
def _relu2(gate: Array, _: None) -> Array:
    return jnp.square(jnp.maximum(gate, 0))


def _check_swiglu(limit: float, alpha: float, beta: float) -> None:
    if not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta are {alpha} and {beta}; they must be finite")


@_activation("swiglu", "Swiglu", parameters=3, check=_check_swiglu)
def _swiglu(gate: Array, up: Array, limit: float, alpha: float, beta: float) -> Array:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + beta)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation with its parameters; its name says what it computes.

    Attributes:
        name: its name in the registry, in the custom calls and in the kernels.
        parameters: in the order in which the kernels take them.

    Raises:
        ValueError: there is no such name, or it takes no such parameters.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in _FUNCTIONS:
            raise ValueError(f"name is {self.name!r}; it must be one of {', '.join(sorted(_FUNCTIONS))}")
        if len(self.parameters) != _FUNCTIONS[self.name].parameters:
            raise ValueError(
                f"parameters is {self.parameters}; {self.name!r} takes {_FUNCTIONS[self.name].parameters} of them"
            )
        _FUNCTIONS[self.name].check(*self.parameters)

    @property
    def gated(self) -> bool:
        """Whether the first product has two halves [gate | up], which `apply` combines."""
        return _FUNCTIONS[self.name].gated

    @property
    def cpp(self) -> str | None:
        """Its name in csrc/cuda/activations.cuh, or None where the CUDA kernels lack it."""
        return _FUNCTIONS[self.name].cpp

    def apply(self, gate: Float[Array, "... I"], up: Float[Array, "... I"] | None) -> Float[Array, "... I"]:
        """The input of the second product; up is None where not gated."""
        return _FUNCTIONS[self.name].apply(gate, up, *self.parameters)


def swiglu(limit: float = math.inf, alpha: float = 1.0, beta: float = 0.0) -> Activation:
    """`g * sigmoid(alpha * g) * (u + beta)` of `g = min(gate, limit)` and `u = clip(up, -limit, limit)`.

    gpt-oss has (7, 1.702, 1); GLM-5.3-Flash and DeepSeek-V4 have a limit of 10.

    Raises:
        ValueError: limit is not positive, or alpha or beta is not finite.
    """
    return Activation("swiglu", (float(limit), float(alpha), float(beta)))


ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name) for name, function in _FUNCTIONS.items() if not function.parameters
}


def get_activation(activation: str | Activation) -> Activation:
    """The registry row of a name, or the activation itself.

    Raises:
        TypeError: it is neither a name nor exactly an `Activation`: a class of its own may compute anything.
        ValueError: there is no such name.
    """
    if type(activation) is Activation:
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation is a {type(activation).__name__}; it must be a name, or made by "
            "jax_marlin_moe.swiglu(limit, alpha, beta): the kernels know no others"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; it must be one of {', '.join(sorted(ACTIVATIONS))}, or "
            "jax_marlin_moe.swiglu(limit, alpha, beta)"
        )
    return ACTIVATIONS[activation]


def make_activation(name: str, parameters: Sequence[float]) -> Activation:
    """The activation that has this name and these parameters; raises ValueError for an unknown name."""
    return swiglu(*parameters) if name == "swiglu" else get_activation(name)
