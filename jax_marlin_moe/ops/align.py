"""`moe_align_block_size`: routed slots grouped by expert into blocks of equal size.

The contract is docs/formats.md, "Block alignment".
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jax_marlin_moe import arguments, native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.kernels.align import plan_align
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.operands import or_empty
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op, map_batch


@dataclasses.dataclass(frozen=True)
class BlockAlignment:
    """Slots grouped by expert. Slot `token * top_k + j` is the j-th choice of a token.

    Attributes:
        sorted_token_ids: slots by expert, ascending inside an expert, each expert padded to whole blocks with the
            sentinel `tokens * top_k`.
        expert_ids: the expert of each block (local, where an expert map was given); -1 past the end.
        num_tokens_post_padded: entries of `sorted_token_ids` in use.
        block_size: static.
        num_experts: experts that ids may name; static.
    """

    sorted_token_ids: Int32[Array, " P"]
    expert_ids: Int32[Array, " blocks"]
    num_tokens_post_padded: Int32[Array, "1"]
    block_size: int
    num_experts: int


jax.tree_util.register_dataclass(
    BlockAlignment,
    data_fields=["sorted_token_ids", "expert_ids", "num_tokens_post_padded"],
    meta_fields=["block_size", "num_experts"],
)


def moe_align_block_size(
    topk_ids: Int32[Array, "tokens top_k"],
    *,
    block_size: int,
    num_experts: int,
    expert_map: Int32[Array, " experts"] | None = None,
    implementation: str | None = None,
) -> BlockAlignment:
    """Groups routed slots by expert, padded to blocks, in a reproducible order.

    Args:
        topk_ids: chosen experts, int32. Ids outside [0, num_experts) are dropped. With further leading dimensions,
            tokens count through all of them, as in `moe_gemm`.
        block_size: 8, 16, 32, 48, 64, 128 or 256.
        num_experts: experts that ids may name, over all devices.
        expert_map: int32, global to local id, each once, -1 for experts that live elsewhere: their slots vanish.
        implementation: None (the best that works), "cuda", "cpu" or "xla".

    Returns:
        The alignment; its static length is `P = numel + num_experts * (block_size - 1)`, or at most
        `numel * block_size` where there are fewer slots than experts.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    if arguments.has_batch(topk_ids):
        topk_ids = arguments.batch_rows("topk_ids", topk_ids, topk_ids)
    arguments.check_array("topk_ids", topk_ids, ndim=2, dtype=jnp.int32)
    arguments.check_block_size(block_size)
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
    if expert_map is not None:
        arguments.check_array("expert_map", expert_map, ndim=1, dtype=jnp.int32)
        arguments.check_shape("expert_map", expert_map, (num_experts,), "(num_experts,)")
    arguments.check_expert_map(expert_map, num_experts)
    params = {"block_size": block_size, "num_experts": num_experts}
    sorted_ids, expert_ids, count = _align(topk_ids, expert_map, **params, implementation=implementation)
    return BlockAlignment(sorted_ids, expert_ids, count, **params)


@one_program("block_size", "num_experts")
def _align(topk_ids, expert_map, **params):
    return align_op(topk_ids, expert_map, **params)


def _results(topk_ids, block_size, num_experts):
    size = reference.padded_size(topk_ids.size, num_experts, block_size)
    shapes = (size,), (-(-size // block_size),), (1,)
    return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


def _shape_rule(topk_ids, expert_map, *, block_size, num_experts):
    results = _results(topk_ids, block_size, num_experts)
    return [replicated_type(topk_ids, result.shape, result.dtype) for result in results]


def _cpu(topk_ids, expert_map, *, block_size, num_experts):
    results = _results(topk_ids, block_size, num_experts)
    return custom_call(
        "moe_align_block_size",
        native.TARGETS["moe_align_block_size", "cpu"],
        [topk_ids, or_empty(expert_map, jnp.int32)],
        results,
        block_size=block_size,
        num_experts=num_experts,
    )


def _cuda(topk_ids, expert_map, *, block_size, num_experts):
    if topk_ids.size == 0:
        return reference.moe_align_block_size(topk_ids, expert_map, block_size=block_size, num_experts=num_experts)
    architecture = target_architecture()
    plan = plan_align(topk_ids.size, num_experts, block_size, expert_map is not None, architecture)
    results = _results(topk_ids, block_size, num_experts)
    return call_program("moe_align_block_size", [topk_ids, expert_map], results, plan, architecture)


def _batching_rule(op, leaves, dims, **params):
    """One alignment per batch element: the blocks of different elements must not mix."""
    return map_batch(op, leaves, dims, **params)


align_op = Op(
    "moe_align_block_size",
    shape_rule=_shape_rule,
    reference=reference.moe_align_block_size,
    cpu=_cpu,
    cuda=_cuda,
    batching_rule=_batching_rule,
)
