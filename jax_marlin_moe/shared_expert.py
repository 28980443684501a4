"""`SharedExpert`: what every token of a layer visits beside the experts that it is routed to."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jax_marlin_moe.weights import LEAVES, MarlinWeights, concatenate_columns, refuse_hash, stack_experts, summary


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

    def __hash__(self) -> int:
        """Refused, since arrays have no hash."""
        refuse_hash(self)

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


def packed_alike(routed: MarlinWeights, shared: MarlinWeights | jax.Array) -> bool:
    """Whether the kernels may read a shared expert as one more of the others."""
    if not isinstance(shared, MarlinWeights) or routed.bias is not None or shared.bias is not None:
        return False

    def facts(weights: MarlinWeights) -> list:
        leaves = [getattr(weights, name) for name in LEAVES]
        shapes = [None if leaf is None else (leaf.shape[1:], leaf.dtype) for leaf in leaves]
        return [weights.format, weights.group_size, weights.layout, *shapes]

    return facts(routed) == facts(shared)


def split_like(shared: SharedExpert, gate_up: MarlinWeights, down: MarlinWeights) -> tuple[SharedExpert, str | None]:
    """The shared expert cut into experts like the routed ones, so that one launch runs all of them.

    Returns:
        `shared.split` where its shares are packed as the routed experts are, with None; else the shared expert as it
        is, with the reason why it is not one more of them (None where it is).
    """
    first, second = shared.gate_up, shared.down
    if not isinstance(first, MarlinWeights) or not isinstance(second, MarlinWeights):
        return shared, "it is not quantised"
    if (first.format, second.format) != (gate_up.format, down.format):
        found, wanted = (f"{a.format.name}, {b.format.name}" for a, b in ((first, second), (gate_up, down)))
        return shared, f"its matrices are of formats {found}, those of the others of {wanted}"
    if gate_up.input_order is not None or first.input_order is not None:
        return shared, "gate_up has an input_order: rows are reordered expert by expert"
    experts, rest = divmod(second.k, down.k)
    if rest or not experts:
        return shared, f"its intermediate size {second.k} is not a multiple of that of the others, {down.k}"
    try:
        narrow = shared if experts == 1 else shared.split(experts)
    except ValueError as error:
        return shared, str(error)
    for name, ours, theirs in (("gate_up", narrow.gate_up, gate_up), ("down", narrow.down, down)):
        if not packed_alike(theirs, ours):
            return (
                shared,
                f"its {name} differs in bias, groups, padding or type of scales: {ours!r}; others: {theirs!r}",
            )
    return narrow, None
