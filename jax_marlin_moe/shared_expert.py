"""`SharedExpert`: what every token of a layer visits beside the experts that it is routed to."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jax_marlin_moe.weights import MarlinWeights, concatenate_columns, stack_experts, summary


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

    def split(self, experts: int) -> "SharedExpert":
        """The same as a stack of narrower experts, whose results add up to its own; a copy.

        An expert of `n * I` columns is n of I: cut as wide as the routed experts, the shared one runs in their kernels
        (`moe_layer`).

        Args:
            experts: how many; the columns and the groups of rows must fall into as many shares.

        Raises:
            TypeError: it is not packed.
            ValueError: it is a stack already, a bias would be added more than once, or the shares are no whole tiles
                and groups.
        """
        gate_up, down = self.gate_up, self.down
        if not isinstance(gate_up, MarlinWeights) or not isinstance(down, MarlinWeights):
            raise TypeError("gate_up and down are dense; only a packed expert is split")
        if down.num_experts != 1:
            raise ValueError(f"down has {down.num_experts} experts; only a single one is split")
        if down.bias is not None:
            raise ValueError("down.bias is not None; each of the experts would add it")
        if experts < 1 or down.k % experts:
            raise ValueError(f"experts is {experts}; it must divide the {down.k} rows of down")
        inner, halves = down.k // experts, gate_up.n // down.k
        firsts = [
            concatenate_columns(
                [gate_up.columns(h * down.k + i * inner, h * down.k + (i + 1) * inner) for h in range(halves)]
            )
            for i in range(experts)
        ]
        lasts = [down.rows(i * inner, (i + 1) * inner) for i in range(experts)]
        return SharedExpert(stack_experts(firsts), stack_experts(lasts), self.gate)


jax.tree_util.register_dataclass(SharedExpert, data_fields=["gate_up", "down", "gate"], meta_fields=[])
