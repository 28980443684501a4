"""The scheme of a block: the one that its caller asks for, else that of a table, else what the cost model predicts."""

from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.choose import invariant_scheme, predicted_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme
from jax_marlin_moe.weights import MarlinWeights


def block_key(gate_up: MarlinWeights, down: MarlinWeights, top_k: int, shared: int = 0) -> tables.BlockKey:
    """The block's row in the tables of measured schemes, in which shared experts count as any others."""
    return tables.BlockKey(
        gate_up.num_experts + shared,
        top_k + shared,
        gate_up.k,
        down.k,
        gate_up.group_size,
        (gate_up.format.code.name, down.format.code.name),
    )


def measured_scheme(
    gate_up: MarlinWeights, down: MarlinWeights, top_k: int, tokens: int, architecture: str, shared: int = 0
) -> BlockScheme | None:
    """The scheme of a table; where none has the block with its shared experts, that of the block without them."""
    keys = dict.fromkeys(block_key(gate_up, down, top_k, count) for count in (shared, 0))
    found = (tables.lookup(key, tokens, architecture) for key in keys)
    return next((scheme for scheme in found if scheme is not None), None)


def block_scheme(
    asked: BlockScheme | BatchInvariant | None,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    first: GemmShape,
    second: GemmShape,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    shared: int,
    architecture: str,
) -> BlockScheme:
    """The scheme of a call's block, which fits its products.

    Args:
        asked: what the caller asks for.
        gate_up: the first matrix.
        down: the second one.
        first: the shape of the product with the first.
        second: likewise.
        tokens: of the call, or the most of the range that shares its program.
        top_k: routed experts of a token.
        routed_experts: that ids may name.
        shared: experts that every token visits beside them.
        architecture: the target.

    Raises:
        ValueError: the scheme that is asked for does not fit, or no kernel supports the shapes.
    """
    capability = compute_capability(architecture)
    if isinstance(asked, BlockScheme):
        if not asked.fits(first, second, capability):
            raise ValueError(
                f"cuda_scheme is {asked}, which does not fit {first} and {second} on compute capability {capability}; "
                "pass None, or what autotune finds"
            )
        return asked
    slots, experts = top_k + shared, routed_experts + shared
    if asked == "batch_invariant":
        return invariant_scheme(first, second, tokens * slots, experts, capability)
    if not first.has_byte_rows:  # which no table has
        measured = measured_scheme(gate_up, down, top_k, tokens, architecture, shared)
        if measured is not None and measured.fits(first, second, capability):
            return measured
    return predicted_scheme(first, second, tokens * slots, slots, experts, capability)
