"""What derivatives take as constant: packed codes with their scales and zero points."""

from collections.abc import Mapping

import jax

from jax_marlin_moe.no_derivative import NoDerivative
from jax_marlin_moe.weights import MarlinWeights

_FROZEN = ("packed", "scales", "zeros", "input_order")


def check_not_only_frozen(op: str, weights: Mapping[str, MarlinWeights], *trainable: jax.Array | None) -> None:
    """Raises `NoDerivative`, of a TypeError, where a derivative is asked for of frozen leaves alone.

    Beside others, as in the gradient of a whole model, frozen leaves have derivatives of zero.

    Args:
        op: its name.
        weights: the tangents of its matrices by name, None for leaves without.
        *trainable: tangents of everything else that has derivatives.
    """
    if any(tangent is not None for tangent in jax.tree.leaves(trainable)):
        return
    frozen = [
        f"{name}.{leaf}" for name, moving in weights.items() for leaf in _FROZEN if getattr(moving, leaf) is not None
    ]
    error = TypeError(
        f"{op} was differentiated with respect to {', '.join(frozen)} alone, which are constants: its derivatives are "
        "those of x, router weights, biases and global scales. Train dense weights through "
        "jax_marlin_moe.fake_quantize, or pass implementation='xla' (the reference, which JAX differentiates, slowly)"
    )
    raise NoDerivative(error)
