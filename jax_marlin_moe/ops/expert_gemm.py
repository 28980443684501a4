"""`expert_gemm`: products of packed experts over runs of rows that a traced table names.

The contract is docs/formats.md, "Dispatches".
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_marlin_moe import arguments, native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_rows import plan_expert_gemm
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, weight_operands
from jax_marlin_moe.ops.division import Division
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.grouped_product import float32_product, product_dots
from jax_marlin_moe.ops.input_order import gather_input_order
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op, map_batch
from jax_marlin_moe.weights import MarlinWeights, as_packed, drop_column_padding, pad_rows


def expert_gemm(
    x: Float[Array, "*batch rows K"],
    stack: MarlinWeights,
    dispatches: Int32[Array, "*batch dispatches 4"],
    *,
    num_out_rows: int | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch out_rows N"], Int32[Array, "*batch"]]:
    """Multiplies runs of rows by experts of a stack, as a table says that may be made on the device.

    A dispatch `(e, i, o, m)` makes rows `[o, o + m)` of the result `x[i : i + m] @ W[e] + bias[e]`, accumulated in
    float32 and rounded once. An expert may come again and rows of x may be read again; a row of the result that
    several dispatches have is of the last of them. Rows that none has are zero.

    A dispatch that is not whole in range (an expert outside [0, E), rows outside x or the result, a negative m) writes
    nothing and is counted. With m = 0 it is empty, never out of range. Leading dimensions are batches of rows with
    tables of their own, as under `jax.vmap`.

    Args:
        x: bfloat16 or float16 rows; float32 ones are multiplied as bfloat16, and the result is float32.
        stack: packed experts.
        dispatches: int32, traced or not; there may be none.
        num_out_rows: rows of the result, static; None takes as many as x has.
        preferred_element_type: of the result: that of x, which is the default, or float32, which is not rounded.
        implementation: None (the best that works), "cuda", "cpu" or "xla".

    Returns:
        The rows, and how many dispatches were out of range (int32). To refuse them, look at the count.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    x, dtype = arguments.as_rows("x", x, preferred_element_type)
    arguments.check_weights("stack", stack)
    if x.ndim > 2:
        each = partial(
            expert_gemm, num_out_rows=num_out_rows, preferred_element_type=dtype, implementation=implementation
        )
        return arguments.over_batches(each, ("x", x), stack, ("dispatches", dispatches), table_rank=2)
    arguments.check_rank("x", x, 2)
    arguments.check_shape("x", x, (x.shape[0], stack.k), "(rows, K)")
    arguments.check_array("dispatches", dispatches, ndim=2, dtype=jnp.int32)
    arguments.check_shape("dispatches", dispatches, (dispatches.shape[0], 4), "(dispatches, 4)")
    if num_out_rows is None:
        num_out_rows = x.shape[0]
    elif not jax.export.is_symbolic_dim(num_out_rows) and not (type(num_out_rows) is int and num_out_rows >= 0):
        raise ValueError(f"num_out_rows is {num_out_rows!r}; it must be an int of at least 0: the result's shape")
    return _product(x, stack, dispatches, num_out_rows=num_out_rows, dtype=dtype, implementation=implementation)


@one_program("num_out_rows", "dtype", saved_as="expert_gemm")
def _product(x, stack, dispatches, *, num_out_rows, dtype, implementation):
    rows, table = x, dispatches
    if dtype != x.dtype:
        rows, experts, skipped = _gathered(x, stack, dispatches, num_out_rows)
        y = float32_product(pad_rows(rows, stack), stack, experts, implementation)
        return drop_column_padding(y, stack), skipped
    if stack.input_order is not None:
        rows, table, out_of_range = _reordered(x, stack, dispatches, num_out_rows)
    y, skipped = expert_gemm_op(
        pad_rows(rows, stack), as_packed(stack), table, num_out_rows=num_out_rows, implementation=implementation
    )
    skipped = skipped[0] if stack.input_order is None else out_of_range
    return drop_column_padding(y, stack), skipped


def _gathered(x, stack, dispatches, num_out_rows):
    """A row for each of the result, columns in its expert's packed order; their experts; how many the table lacks."""
    sizes = {"num_rows": x.shape[0], "num_out_rows": num_out_rows, "num_experts": stack.num_experts}
    experts, source, skipped = reference.dispatched_rows(dispatches, **sizes)
    rows = jnp.concatenate([x, jnp.zeros_like(x, shape=(1, x.shape[1]))])[source]
    return rows if stack.input_order is None else gather_input_order(rows, stack, experts), experts, skipped


def _reordered(x, stack, dispatches, num_out_rows):
    """The rows of `_gathered`, their table, and how many it lacks."""
    rows, _, skipped = _gathered(x, stack, dispatches, num_out_rows)
    sizes = {"num_rows": x.shape[0], "num_out_rows": num_out_rows, "num_experts": stack.num_experts}
    table = _without_misfits(dispatches, **sizes)
    return rows, table.at[:, 1].set(table[:, 2]), skipped


def _without_misfits(dispatches, **sizes):
    """The table, empty dispatches in the place of those out of range."""
    return jnp.where(reference.are_in_range(dispatches, **sizes)[..., None], dispatches, 0)


def _results(x, stack, num_out_rows):
    return [
        jax.ShapeDtypeStruct((num_out_rows, stack.padded_n), x.dtype),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]


def _shape_rule(x, stack, dispatches, *, num_out_rows):
    return [replicated_type(x, result.shape, result.dtype) for result in _results(x, stack, num_out_rows)]


def _cpu(x, stack, dispatches, *, num_out_rows):
    return custom_call(
        "expert_gemm",
        native.TARGETS["expert_gemm", "cpu"],
        [x, *cpu_weight_operands(stack), dispatches],
        _results(x, stack, num_out_rows),
        **format_attributes("", stack),
    )


def _cuda(x, stack, dispatches, *, num_out_rows):
    results = _results(x, stack, num_out_rows)
    num_dispatches = dispatches.shape[0]
    if 0 in (x.shape[0], num_out_rows, num_dispatches):
        sizes = {"num_rows": x.shape[0], "num_out_rows": num_out_rows, "num_experts": stack.num_experts}
        *_, skipped = reference.dispatched_rows(dispatches, **sizes)
        return [jnp.zeros(results[0].shape, x.dtype), skipped[None]]
    architecture = target_architecture()
    plan = plan_expert_gemm(
        x, stack, num_dispatches=num_dispatches, num_out_rows=num_out_rows, architecture=architecture
    )
    operands = [x, *weight_operands(stack), dispatches]
    return call_program("expert_gemm", operands, results, plan, architecture)


def _batching_rule(op, leaves, dims, *, structure, num_out_rows, **params):
    """Batched rows and tables become one call over all of them; batched weights one call each."""
    x, stack, dispatches = jax.tree.unflatten(structure, leaves)
    x_dim, stack_dims, table_dim = jax.tree.unflatten(structure, dims)
    if jax.tree.leaves(stack_dims):
        return map_batch(op, leaves, dims, structure=structure, num_out_rows=num_out_rows, **params)
    batch = leaves[0].shape[x_dim] if x_dim is not None else dispatches.shape[table_dim]
    table = dispatches[None] if table_dim is None else jnp.moveaxis(dispatches, table_dim, 0)
    rows = x[None] if x_dim is None else jnp.moveaxis(x, x_dim, 0)
    sizes = {"num_rows": rows.shape[1], "num_out_rows": num_out_rows, "num_experts": stack.num_experts}
    skipped = jnp.sum(~reference.are_in_range(table, **sizes) & (table[..., 3] != 0), axis=1, dtype=jnp.int32)
    # Element b's rows follow those of b - 1; its dispatches out of range must not reach them.
    element = jnp.arange(batch, dtype=jnp.int32)
    first = jnp.stack([jnp.zeros_like(element)] * 4, axis=1)
    first = first.at[:, 1].set(element * (rows.shape[1] if x_dim is not None else 0))
    first = first.at[:, 2].set(element * num_out_rows)
    table = _without_misfits(table, **sizes) + first[:, None]
    y, _ = op(rows.reshape(-1, rows.shape[2]), stack, table.reshape(-1, 4), num_out_rows=batch * num_out_rows, **params)
    return [y.reshape(batch, num_out_rows, y.shape[1]), jnp.broadcast_to(skipped[:, None], (batch, 1))], [0, 0]


def _jvp(op, primals, tangents, *, num_out_rows, implementation):
    (x, stack, dispatches), (d_x, d_stack, _) = primals, tangents
    check_not_only_frozen("expert_gemm", {"stack": d_stack}, d_x, d_stack.bias, d_stack.global_scales)
    results = op(*primals, num_out_rows=num_out_rows, implementation=implementation)
    sizes = {"num_rows": x.shape[0], "num_out_rows": num_out_rows, "num_experts": stack.num_experts}
    experts, sources, _ = reference.dispatched_rows(dispatches, **sizes)
    rows, d_rows = (
        None if operand is None else operand.at[sources].get(mode="fill", fill_value=0) for operand in (x, d_x)
    )
    dots = product_dots(rows, d_rows, stack, d_stack, experts, implementation)
    return results, [sum(dots[1:], dots[0]).astype(x.dtype), None]


def _division(*, num_out_rows):
    return Division(
        matrices={"stack": ("k", "n")}, share=_share, columns={"x": "k"}, results=("n", None), summed=("k",)
    )


def _share(call, part, x, stack, dispatches, *, num_out_rows, implementation, **_):
    """The dispatches of the experts here; of rows that several dispatches have, those whose last is one of them."""
    count = stack.num_experts
    sizes = {"num_rows": x.shape[0], "num_out_rows": num_out_rows}
    everywhere = part.experts or count
    stack = part.with_bias_once(stack)
    experts, sources, skipped = reference.dispatched_rows(dispatches, **sizes, num_experts=everywhere)
    local = part.local(experts, count)
    if part.divides_products:
        rows = x.at[sources].get(mode="fill", fill_value=0)
        y = float32_product(rows, stack, local, implementation)
    else:
        of_here = part.local(dispatches[:, 0], count)
        table = _without_misfits(dispatches.at[:, 0].set(of_here), **sizes, num_experts=count)
        y, _ = call(x, stack, table)
    return [part.total(jnp.where(local[:, None] >= 0, y, 0), x.dtype), skipped[None]]


expert_gemm_op = Op(
    "expert_gemm",
    shape_rule=_shape_rule,
    reference=reference.expert_gemm,
    cpu=_cpu,
    cuda=_cuda,
    batching_rule=_batching_rule,
    jvp=_jvp,
    division=_division,
)
