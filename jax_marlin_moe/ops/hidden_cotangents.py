"""`hidden_cotangents_op`: what lies between the two products of a block's backward pass, row by row."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_hidden import plan_hidden_cotangents
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.grouped_product import slot_columns
from jax_marlin_moe.ops.primitive import Op
from jax_marlin_moe.ops.tangents import jvp_of
from jax_marlin_moe.rounding import rounded


def hidden_cotangents(
    hidden: Float[Array, "slots columns"],
    pulled: Float[Array, "slots inner"],
    experts: Int32[Array, " slots"],
    topk_weights: Float32[Array, " slots"],
    bias: Float32[Array, "experts columns"] | None,
    *,
    num_experts: int,
    activation: Activation,
    dtype: str,
) -> tuple[Float[Array, "slots columns"], Float32[Array, " slots"]]:
    """The specification: cotangents of the first product's result, and of the router weights.

    Rows of slots without an expert, of `hidden` and `pulled`, may hold anything; their cotangents are zero.

    Args:
        hidden: the first product's result without its bias, rounded.
        pulled: the cotangent of the result times the transpose of the second matrix.
        experts: of the slots; there is none outside of [0, num_experts).
        topk_weights: router weights of the slots.
        bias: of the first matrices, or None.
        num_experts: of the matrices.
        activation: between the products.
        dtype: of the first result.
    """
    there = (experts >= 0) & (experts < num_experts)
    h = jnp.where(there[:, None], hidden, 0).astype(jnp.float32)
    pulled = jnp.where(there[:, None], pulled, 0).astype(jnp.float32)
    if bias is not None:
        h = h + slot_columns(bias, experts)
    a, pull = jax.vjp(lambda h: activation.of_product(h)[:, : pulled.shape[1]], h)
    d_weights = (rounded(a, hidden.dtype).astype(jnp.float32) * pulled).sum(1)
    (d_hidden,) = pull(pulled * jnp.where(there, topk_weights, 0)[:, None])
    return d_hidden.astype(dtype), d_weights


def _form(*operands, **params):
    return list(hidden_cotangents(*operands, **params))


def _cuda(hidden, pulled, experts, topk_weights, bias, *, num_experts, activation, dtype):
    params = {"num_experts": num_experts, "activation": activation, "dtype": dtype}
    if activation.cpp is None or hidden.shape[0] == 0:
        return _form(hidden, pulled, experts, topk_weights, bias, **params)
    architecture = target_architecture()
    results = [jax.ShapeDtypeStruct(hidden.shape, dtype), jax.ShapeDtypeStruct(experts.shape, jnp.float32)]
    params["dtype"] = results[0].dtype
    plan = plan_hidden_cotangents(hidden, pulled, biased=bias is not None, architecture=architecture, **params)
    return call_program(
        "hidden_cotangents",
        [hidden, pulled, experts, topk_weights, bias],
        results,
        plan,
        architecture,
        aliases={0: 0} if results[0].dtype == hidden.dtype else None,
    )


def _shape_rule(hidden, pulled, experts, topk_weights, bias, *, num_experts, activation, dtype):
    return [
        replicated_type(hidden, hidden.shape, jnp.dtype(dtype)),
        replicated_type(hidden, experts.shape, jnp.dtype(jnp.float32)),
    ]


def _jvp(op, primals, tangents, *, implementation, **params):
    results, dots = jvp_of(partial(_form, **params), primals, tangents)
    return results, dots


hidden_cotangents_op = Op(
    "hidden_cotangents",
    shape_rule=_shape_rule,
    reference=hidden_cotangents,
    cpu=_form,
    cuda=_cuda,
    jvp=_jvp,
    rows=("hidden", "pulled", "experts", "topk_weights"),
)
