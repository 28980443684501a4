"""`linear`: the product of dense rows with one packed matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from jax_marlin_moe import arguments, native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_rows import plan_linear
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.cuda.scheme import check_invariant_product, check_undivided
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.operand_types import alike, replicated_type, shard_rows_like
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, weight_operands
from jax_marlin_moe.ops.division import Division
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.grouped_product import float32_product, product_dots
from jax_marlin_moe.ops.input_order import gather_input_order
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op
from jax_marlin_moe.weights import MarlinWeights, as_packed, drop_column_padding, pad_columns, pad_rows


def linear(
    x: Float[Array, "*batch K"],
    weights: MarlinWeights,
    bias: Float[Array, " N"] | None = None,
    *,
    expert: int | Int32[Array, ""] | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> Float[Array, "*batch N"]:
    """`x @ W + bias` with one packed matrix, accumulated in float32 and rounded once.

    The matrix is one that was packed alone, a part of a stack as `stack.expert(3).columns(0, 256)`, or an expert of a
    stack by its number. Slices are copies where the stack is an argument of a compiled function; a number is not.

    Args:
        x: bfloat16 or float16 rows, with any leading dimensions; float32 ones are multiplied as bfloat16, and the
            result is float32.
        weights: one packed matrix, or a stack of them together with `expert`.
        bias: float, where the weights have none; [E, N] with `expert`.
        expert: which matrix of the stack, traced or not; the nearest that there is where a traced one is out of range.
        preferred_element_type: of the result: that of x, which is the default, or float32, which is not rounded.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        batch_invariant: whether a row has the same bits whatever other rows there are. On CUDA that takes a tile whose
            sums depend on the matrix alone. On CPUs it is always so; "xla" does not have it.

    Raises:
        IndexError: `expert` is out of range, and not traced.
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    x, dtype = arguments.as_rows("x", x, preferred_element_type)
    arguments.check_weights("weights", weights)
    if x.ndim < 1 or x.shape[-1] != weights.k:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {weights.k}")
    experts = weights.num_experts
    if expert is None:
        if experts != 1:
            raise ValueError(
                f"weights has {experts} experts; it must have one: take weights.expert(e), or pass its number as expert"
            )
    elif isinstance(expert, bool):
        raise TypeError(f"expert is {expert}; it must be an int, or an int32 array of one")
    elif isinstance(expert, int | np.integer):
        if not 0 <= expert < experts:
            raise IndexError(f"expert is {expert}; it must lie in [0, {experts})")
        expert = jax.device_put(np.asarray(expert, np.int32))
    else:
        arguments.check_array("expert", expert, ndim=0, dtype=jnp.int32)
    if bias is not None:
        if weights.bias is not None:
            raise ValueError("bias is not None, and neither is weights.bias; pass one of them")
        if not hasattr(bias, "dtype") or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias has dtype {getattr(bias, 'dtype', type(bias).__name__)}; it must be floating point")
        shape, meaning = ((weights.n,), "(N,)") if expert is None else ((experts, weights.n), "(E, N)")
        arguments.check_shape("bias", bias, shape, meaning)
    if batch_invariant:
        check_invariant_product(x, dtype, implementation)
    return _product(
        x, weights, bias, expert, dtype=dtype, implementation=implementation, batch_invariant=batch_invariant
    )


@one_program("dtype", "batch_invariant", saved_as="linear")
def _product(x, weights, bias, expert, *, dtype, implementation, batch_invariant):
    rows = x.reshape(-1, x.shape[-1])
    if bias is not None:
        bias = pad_columns(bias.reshape(-1, weights.n).astype(jnp.float32), weights)
        weights = dataclasses.replace(weights, bias=bias)
    if weights.input_order is not None:
        number = jnp.zeros((), jnp.int32) if expert is None else expert
        ordered, number, weights = alike((rows, number, weights))
        ordered = gather_input_order(ordered, weights, jnp.broadcast_to(number, rows.shape[:1]))
    else:
        ordered = rows
    expert = None if expert is None else expert.reshape(1)
    if dtype == x.dtype:
        options = {"implementation": implementation, "batch_invariant": batch_invariant}
        (y,) = linear_op(pad_rows(ordered, weights), as_packed(weights), expert, **options)
    else:
        y = float32_product(pad_rows(ordered, weights), weights, _experts(rows, weights, expert), implementation)
    y = shard_rows_like(drop_column_padding(y, weights), rows)
    return y.reshape(*x.shape[:-1], weights.n)


def _experts(x, weights, expert):
    """The expert of each row."""
    return jnp.broadcast_to(_number(weights, expert), x.shape[:1])


def _number(weights, expert):
    return jnp.zeros((1,), jnp.int32) if expert is None else jnp.clip(expert, 0, weights.num_experts - 1)


def _shape_rule(x, weights, expert):
    return [replicated_type(x, (x.shape[0], weights.padded_n), x.dtype)]


def _cpu(x, weights, expert):
    """A dispatch of all rows."""
    number = _number(weights, expert)
    table = jnp.zeros((1, 4), jnp.int32).at[0, 0].set(number[0]).at[0, 3].set(x.shape[0])
    results = [
        jax.ShapeDtypeStruct((x.shape[0], weights.padded_n), x.dtype),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    ]
    return custom_call(
        "linear",
        native.TARGETS["expert_gemm", "cpu"],
        [x, *cpu_weight_operands(weights), table],
        results,
        **format_attributes("", weights),
    )[:1]


def _cuda(x, weights, expert, *, batch_invariant):
    result = jax.ShapeDtypeStruct((x.shape[0], weights.padded_n), x.dtype)
    if x.shape[0] == 0:
        return [jnp.zeros(result.shape, result.dtype)]
    architecture = target_architecture()
    plan = plan_linear(x, weights, named=expert is not None, architecture=architecture, batch_invariant=batch_invariant)
    operands = [x, *weight_operands(weights), expert]
    return call_program("linear", operands, [result], plan, architecture)


def _jvp(op, primals, tangents, *, implementation, batch_invariant):
    (x, weights, expert), (d_x, d_weights, _) = primals, tangents
    check_not_only_frozen("linear", {"weights": d_weights}, d_x, d_weights.bias, d_weights.global_scales)
    results = op(*primals, implementation=implementation, batch_invariant=batch_invariant)
    dots = product_dots(x, d_x, weights, d_weights, _experts(x, weights, expert), implementation)
    return results, [sum(dots[1:], dots[0]).astype(x.dtype)]


def _division():
    return Division(matrices={"weights": ("k", "n")}, share=_share, columns={"x": "k"}, results=("n",), summed=("k",))


def _share(call, part, x, weights, expert, *, implementation, batch_invariant=False):
    if part.first_expert is not None:
        number = jnp.zeros((1,), jnp.int32) if expert is None else jnp.clip(expert, 0, part.experts - 1)
        expert = part.local(number, weights.num_experts)
    weights = part.with_bias_once(weights)
    if part.divides_products:
        check_undivided(batch_invariant, "linear")
        experts = jnp.broadcast_to(jnp.zeros((1,), jnp.int32) if expert is None else expert, x.shape[:1])
        y = float32_product(x, weights, experts, implementation)
    else:
        (y,) = call(x, weights, expert)
    return [part.total(y if expert is None else jnp.where(expert >= 0, y, 0), x.dtype)]


linear_op = Op(
    "linear",
    shape_rule=_shape_rule,
    reference=reference.linear,
    cpu=_cpu,
    cuda=_cuda,
    cuda_options=("batch_invariant",),
    jvp=_jvp,
    rows=("x",),
    division=_division,
)
