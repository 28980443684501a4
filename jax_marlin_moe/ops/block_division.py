"""What devices may divide of an expert block, and what to do where they may not."""

from collections.abc import Callable

import jax

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.ops.division import Division

_APART = (
    "a range of its columns is not one of gate and of up; jax_marlin_moe.sharding.tensor_parallel, or place for a "
    "layer, lays them out so that it is"
)


def block_division(
    activation: Activation, activation_dtype: ByteDtype | None = None, *, share: Callable[..., list[jax.Array]]
) -> Division:
    """What devices may divide of a block, or of a layer that has one; `share` as for `Division`."""
    columns = None if activation.gated or activation_dtype is not None else "i"
    reasons = {("gate_up", "rows"): "the activation needs whole sums over the rows of gate_up"}
    if activation.gated:
        reasons["gate_up", "columns"] = _APART
        reasons["down", "rows"] = "its rows go with columns of gate and up: " + _APART
    elif activation_dtype is not None:
        reasons["gate_up", "columns"] = reasons["down", "rows"] = (
            f"with activation_dtype {activation_dtype!r} the rows of down's product have scales of whole rows; "
            "what jax_marlin_moe.sharding.tensor_parallel lays out may be over devices with fixed scales, or called by "
            "jax_marlin_moe.sharding.parallel_experts"
        )
    return Division(
        matrices={"gate_up": (None, columns), "down": (columns, "n")},
        share=share,
        results=("n",),
        summed=() if columns is None else (columns,),
        vectors=("intermediate",),
        reasons=reasons,
    )
