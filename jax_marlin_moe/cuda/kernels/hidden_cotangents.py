"""The backward pass of a gated activation. Twin of csrc/cuda/hidden_cotangents.cuh."""

import jax.numpy as jnp

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Pointer, optional
from jax_marlin_moe.cuda.kernels.epilogue import activation_type
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel

_THREADS = 128


def hidden_cotangents_kernel(
    slots: int,
    columns: int,
    inner: int,
    num_experts: int,
    activation: Activation,
    dtype: jnp.dtype,
    result_dtype: jnp.dtype,
    *,
    hidden: int,
    pulled: int,
    experts: int,
    topk_weights: int,
    bias: int | None,
    d_hidden: int,
    d_weights: int,
) -> Kernel:
    """Cotangents of gate and up, `columns` each, and of router weights.

    Buffers: hidden [slots, 2 columns] without the bias, pulled [slots, inner], experts and router weights of slots,
    biases or None; d_hidden, which may be hidden, and d_weights.
    """
    result = Pointer(d_hidden, result_dtype.name, written=True)
    return Kernel(
        name=f"jmm_hidden_cotangents_m{slots}",
        headers=("hidden_cotangents.cuh",),
        body="HiddenCotangents<Facts>",
        structs={
            "Facts": {
                "element": ELEMENT_TYPES[dtype.name],
                "result": result.cpp_element,
                "activation": activation_type(activation),
                "slots": slots,
                "columns": columns,
                "inner": inner,
                "experts": num_experts,
                "bias": bias is not None,
            }
        },
        pointers={
            "hidden": Pointer(hidden, dtype.name),
            "pulled": Pointer(pulled, dtype.name),
            "experts": Pointer(experts, "int32"),
            "topk_weights": Pointer(topk_weights, "float32"),
            "bias": optional(bias, "float32"),
            "d_hidden": result,
            "d_weights": Pointer(d_weights, "float32", written=True),
        },
        threads=_THREADS,
        shared_bytes=0,
        max_ctas=grid(-(-slots // (_THREADS // 32)), "the backward pass of the activation"),
    )
