"""Arguments that the ops accept: tests of errors change one thing."""

import dataclasses

import host_arrays
import jax.numpy as jnp
import numpy as np
from oracle import random_experts

import jax_marlin_moe as jmm

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 5, 2, 4, 128, 64


def experts(k, n, **options):
    return random_experts(np.random.default_rng(0), EXPERTS, k, n, **options).packed()


def gemm_arguments():
    alignment = jmm.moe_align_block_size(
        host_arrays.zeros((TOKENS, TOP_K), jnp.int32), block_size=8, num_experts=EXPERTS
    )
    return {
        "x": host_arrays.zeros((TOKENS, HIDDEN), jnp.bfloat16),
        "weights": experts(HIDDEN, 64, group_size=32, weight_format="int4_zp", bias=True),
        "alignment": alignment,
        "top_k": TOP_K,
    }


def block_arguments():
    return {
        "x": host_arrays.zeros((TOKENS, HIDDEN), jnp.bfloat16),
        "gate_up": experts(HIDDEN, 2 * INNER, group_size=32),
        "down": experts(INNER, HIDDEN, group_size=32),
        "topk_weights": host_arrays.zeros((TOKENS, TOP_K), jnp.float32),
        "topk_ids": host_arrays.zeros((TOKENS, TOP_K), jnp.int32),
    }


def replaced(weights, **leaves):
    """Fields of a MarlinWeights, given as functions of what they were."""
    return dataclasses.replace(weights, **{name: change(getattr(weights, name)) for name, change in leaves.items()})


def cast(dtype):
    return lambda leaf: host_arrays.zeros(leaf.shape, dtype)


def shaped(*shape):
    return lambda leaf: host_arrays.zeros(shape, leaf.dtype)


def constant(value):
    return lambda _: value
