"""`ragged_dot`: to be passed to tokamax as `implementation=[ragged_dot, "xla"]`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_marlin_moe.ops.ragged_dot import ragged_dot as packed_ragged_dot
from jax_marlin_moe.weights import MarlinWeights


def ragged_dot(
    lhs: Float[Array, "m K"],
    rhs: Any,
    *,
    group_sizes: Any,
    ragged_dot_dimension_numbers: jax.lax.RaggedDotDimensionNumbers | None = None,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    activation: Any = None,
    group_offset: Any = None,
    **others: Any,
) -> Float[Array, "m N"]:
    """Rows sorted by group times qwix's quantised experts, packed in the call, or packed before it.

    tokamax tries its implementations in order, so what this one does not compute (dense experts, other dimensions)
    raises NotImplementedError and goes to the next.

    Args:
        lhs: rows.
        rhs: a qwix QArray [E, K, N], or `MarlinWeights`.
        group_sizes: int32, or tokamax's GroupSizes.
        ragged_dot_dimension_numbers: those of `jax.lax.ragged_dot`.
        precision: as for `jax_marlin_moe.ragged_dot`.
        preferred_element_type: likewise.
        activation: a function of the result, or None.
        group_offset: as for `jax_marlin_moe.ragged_dot`.
        **others: options of tokamax that are for its own kernels.

    Raises:
        NotImplementedError: another implementation must compute it; says why.
    """
    if not isinstance(rhs, MarlinWeights) and not hasattr(rhs, "qvalue"):
        raise NotImplementedError(f"rhs has type {type(rhs).__name__}; it must be MarlinWeights, or a qwix QArray")
    if hasattr(lhs, "qvalue"):
        raise NotImplementedError("lhs is quantised; its rows must be floats")
    wanted = (((1,), (1,)), ((), ()))
    if ragged_dot_dimension_numbers is not None and (
        tuple(tuple(map(tuple, pair)) for pair in ragged_dot_dimension_numbers.dot_dimension_numbers) != wanted
        or tuple(ragged_dot_dimension_numbers.lhs_ragged_dimensions) != (0,)
        or tuple(ragged_dot_dimension_numbers.rhs_group_dimensions) != (0,)
    ):
        raise NotImplementedError(
            f"ragged_dot_dimension_numbers is {ragged_dot_dimension_numbers}; it must be that of jax.lax.ragged_dot"
        )
    if others.get("fuse_gateup_activation") is not None:
        found = others["fuse_gateup_activation"]
        raise NotImplementedError(f"fuse_gateup_activation is {found!r}; it must be None: tokamax's kernels have it")
    try:
        y = packed_ragged_dot(
            lhs, rhs, jnp.asarray(group_sizes, jnp.int32), precision, preferred_element_type, group_offset
        )
    except (TypeError, ValueError) as error:
        raise NotImplementedError(str(error)) from error
    return y if activation is None else activation(y)
