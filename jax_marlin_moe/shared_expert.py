"""`SharedExpert`: what every token of a layer visits beside the experts that it is routed to."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jax_marlin_moe.weights import MarlinWeights, summary


@dataclasses.dataclass(frozen=True, repr=False)
class SharedExpert:
    """An expert that every token visits. A pytree.

    Attributes:
        gate_up: (H, 2 I'), columns [gate | up], (H, I') where the activation is not gated: a stack of one packed
            expert where the file is quantised, or of several whose results add up, else a dense array in the file's
            dtype.
        down: (I', H), likewise.
        gate: [H, 1]; its sigmoid multiplies the result (Qwen), or None.
    """

    gate_up: MarlinWeights | Float[Array, "H N"]
    down: MarlinWeights | Float[Array, "I H"]
    gate: Float[Array, "H 1"] | None = None

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes."""
        return summary(self)


jax.tree_util.register_dataclass(SharedExpert, data_fields=["gate_up", "down", "gate"], meta_fields=[])
