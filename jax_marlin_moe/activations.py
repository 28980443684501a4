"""The activations between the two products of an expert (docs/formats.md, "The expert block").

They are functions of float32 arrays.

A plain one is in the registry under its name; one with parameters is made by a function of that name. They are also
what derivatives are taken of: JAX differentiates every row.
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
        passes_factors: of them, whether positive factors of up, or of the only value, are factors of the result.
    """

    apply: Callable[..., Array]
    cpp: str | None
    gated: bool = True
    parameters: int = 0
    check: Callable[..., None] = lambda: None
    passes_factors: Callable[..., bool] = lambda *_: False


_FUNCTIONS: dict[str, _Function] = {}


def _activation(name: str, cpp: str | None, **facts: Any) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Makes the decorated function the `apply` of a row of the registry; the rest are fields of `_Function`."""

    def add(apply: Callable[..., Array]) -> Callable[..., Array]:
        _FUNCTIONS[name] = _Function(apply, cpp, **facts)
        return apply

    return add


def _of_one_value(
    cpp: str, *, gated: str, ungated: str, homogeneous: bool = False
) -> Callable[[Callable[[Array], Array]], Callable]:
    """Makes the decorated function two rows: its value times up, and its value alone."""

    def add(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        times_up = _activation(gated, f"Gated<jmm::{cpp}>", passes_factors=lambda: True)
        times_up(lambda gate, up: function(gate) * up)
        alone = _activation(ungated, f"Ungated<jmm::{cpp}>", gated=False, passes_factors=lambda: homogeneous)
        alone(lambda value, _: function(value))
        return function

    return add


# The functions of one value are those that ACT2FN of transformers (activations.py) has by these names, "none" is its
# "linear"; their products with up are the variants of GLU in https://arxiv.org/abs/2002.05202.


@_of_one_value("Identity", gated="none", ungated="identity", homogeneous=True)
def _identity(value: Array) -> Array:
    return value


@_of_one_value("Silu", gated="silu", ungated="silu_ungated")
def _silu(value: Array) -> Array:
    return value * jax.nn.sigmoid(value)


@_of_one_value("Gelu", gated="gelu", ungated="gelu_ungated")
def _gelu(value: Array) -> Array:
    return jax.nn.gelu(value, approximate=False)


@_of_one_value("GeluTanh", gated="gelu_tanh", ungated="gelu_tanh_ungated")
def _gelu_tanh(value: Array) -> Array:
    # (1 + tanh(y)) / 2 is sigmoid(2 y), which keeps its precision where tanh is near -1.
    return value * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))


@_of_one_value("Relu", gated="relu", ungated="relu_ungated", homogeneous=True)
def _relu(value: Array) -> Array:
    return jax.nn.relu(value)


@_of_one_value("Relu2", gated="relu2_gated", ungated="relu2")
def _relu2(value: Array) -> Array:
    return jnp.square(jax.nn.relu(value))


def _check_limit(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"limit is {limit}; it must be positive")


def _check_swiglu(limit: float, alpha: float, beta: float) -> None:
    _check_limit(limit)
    if not (math.isfinite(alpha) and math.isfinite(beta)):
        raise ValueError(f"alpha and beta are {alpha} and {beta}; they must be finite")


def _is_times_up(limit: float, alpha: float, beta: float) -> bool:
    return math.isinf(limit) and beta == 0


@_activation("swiglu", "Swiglu", parameters=3, check=_check_swiglu, passes_factors=_is_times_up)
def _swiglu(gate: Array, up: Array, limit: float, alpha: float, beta: float) -> Array:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + beta)


@_activation("swiglu_step", "SwigluStep", parameters=1, check=_check_limit)
def _swiglu_step(gate: Array, up: Array, limit: float) -> Array:
    return jnp.minimum(_silu(gate), limit) * jnp.clip(up, -limit, limit)


def _check_situ(beta: float, linear_beta: float) -> None:
    for name, value in (("beta", beta), ("linear_beta", linear_beta)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive, infinity for no bound")


def _bounded(value: Array, bound: float) -> Array:
    return value if math.isinf(bound) else bound * jnp.tanh(value / bound)


@_activation("situ", "Situ", parameters=2, check=_check_situ)
def _situ(gate: Array, up: Array, beta: float, linear_beta: float) -> Array:
    return _bounded(gate, beta) * jax.nn.sigmoid(gate) * _bounded(up, linear_beta)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation with its parameters; its name says what it computes.

    Attributes:
        name: its name in the registry, in the custom calls and in the kernels.
        parameters: in the order in which the kernels take them.

    Raises:
        TypeError: a parameter is no number.
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
        for parameter in self.parameters:
            if isinstance(parameter, bool) or not isinstance(parameter, int | float):
                raise TypeError(f"parameters is {self.parameters}; they must be numbers")
        _FUNCTIONS[self.name].check(*self.parameters)

    @property
    def gated(self) -> bool:
        """Whether the first product has two halves [gate | up], which `apply` combines."""
        return _FUNCTIONS[self.name].gated

    @property
    def halves(self) -> int:
        """How many columns the first product has for each that `apply` returns."""
        return 2 if self.gated else 1

    @property
    def passes_factors(self) -> bool:
        """Whether positive factors of the columns of up, or of the only value, are factors of the result."""
        return _FUNCTIONS[self.name].passes_factors(*self.parameters)

    @property
    def cpp(self) -> str | None:
        """Its name in csrc/cuda/activations.cuh, or None where the CUDA kernels lack it."""
        return _FUNCTIONS[self.name].cpp

    def apply(self, gate: Float[Array, "... I"], up: Float[Array, "... I"] | None) -> Float[Array, "... I"]:
        """The input of the second product; up is None where not gated."""
        return _FUNCTIONS[self.name].apply(gate, up, *self.parameters)

    def of_product(self, h: Float[Array, "rows columns"]) -> Float[Array, "rows I"]:
        """The input of the second product from the result of the first, [gate | up] where gated."""
        return self.apply(*jnp.split(h, 2, axis=1)) if self.gated else self.apply(h, None)


def _number(name: str, value: Any) -> float:
    """A parameter as a float; TypeError on anything else, text and booleans among it."""
    try:
        if not isinstance(value, str | bytes | bool):
            return float(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is {value!r}; it must be a number") from None


def swiglu(limit: float = math.inf, alpha: float = 1.0, beta: float = 0.0) -> Activation:
    """`g * sigmoid(alpha * g) * (u + beta)` of `g = min(gate, limit)` and `u = clip(up, -limit, limit)`.

    gpt-oss has (7, 1.702, 1); GLM-5.3-Flash and DeepSeek-V4 have a limit of 10.

    Raises:
        TypeError: an argument is no number.
        ValueError: limit is not positive, or alpha or beta is not finite.
    """
    return Activation("swiglu", (_number("limit", limit), _number("alpha", alpha), _number("beta", beta)))


def swiglu_step(limit: float) -> Activation:
    """`min(silu(gate), limit) * clip(up, -limit, limit)`: clamped after the function, where `swiglu` clamps before.

    Layers of Step-3.5 and Step-3.7 that have a limit (`swiglu_limits` of their configurations): transformers,
    models/step3p7/modeling_step3p7.py, Step3p7Experts.

    Raises:
        TypeError: limit is no number.
        ValueError: limit is not positive.
    """
    return Activation("swiglu_step", (_number("limit", limit),))


def situ(beta: float, linear_beta: float = math.inf) -> Activation:
    """`beta * tanh(gate / beta) * sigmoid(gate) * linear_beta * tanh(up / linear_beta)`; infinity is no bound.

    Kimi-K3 has (4, 25): its repository's modeling_kimi_linear.py, SituAndMul, where a `linear_beta` of None is
    infinity here.

    Raises:
        TypeError: an argument is no number.
        ValueError: beta or linear_beta is not positive.
    """
    return Activation("situ", (_number("beta", beta), _number("linear_beta", linear_beta)))


ACTIVATIONS: dict[str, Activation] = {
    name: Activation(name) for name, function in _FUNCTIONS.items() if not function.parameters
}


# How many parameters each name takes.
PARAMETERS: dict[str, int] = {name: function.parameters for name, function in _FUNCTIONS.items()}
_MAKERS = ", ".join(f"jax_marlin_moe.{maker.__name__}" for maker in (swiglu, swiglu_step, situ))


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
            f"activation has type {type(activation).__name__}; it must be a name, or made by one of {_MAKERS}: the "
            "kernels know no others"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; it must be one of {', '.join(sorted(ACTIVATIONS))}, or made by one of "
            f"{_MAKERS}"
        )
    return ACTIVATIONS[activation]


def make_activation(name: str, parameters: Sequence[float]) -> Activation:
    """The activation that has this name and these parameters.

    Raises:
        ValueError: there is no such name, or it takes no such parameters.
    """
    return Activation(name, tuple(map(float, parameters)))
