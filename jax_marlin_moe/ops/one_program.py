"""What surrounds a primitive as one compiled program: what an eager call of an op runs."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_marlin_moe.layer_slice import share_indices, spread_indices
from jax_marlin_moe.ops.implementation import check_implementation


def one_program(*static: str, saved_as: str | None = None) -> Callable[[Callable], Callable]:
    """Decorates what surrounds a primitive: one compiled program where an op is called eagerly, with its constants.

    `implementation` is checked at every call, before anything is traced.

    Args:
        static: names of the static keyword arguments beside `implementation`.
        saved_as: the name of the results for policies of `jax.checkpoint`; None for results that nobody saves.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def of_shared(*operands: Any, **options: Any) -> Any:
            results = function(*spread_indices(operands), **options)
            return results if saved_as is None else checkpoint_name(results, saved_as)

        program = jax.jit(of_shared, static_argnames=(*static, "implementation"), inline=True)

        @wraps(function)
        def checked(*operands: Any, implementation: str | None, **options: Any) -> Any:
            check_implementation(implementation)
            return program(*share_indices(operands), implementation=implementation, **options)

        return checked

    return decorate
