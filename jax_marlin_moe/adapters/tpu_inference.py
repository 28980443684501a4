"""`fused_moe_func`: the signature of tpu-inference's function, which MaxText calls too."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.adapters.names import activation_named
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.routing import route
from jax_marlin_moe.sharding import partition_specs
from jax_marlin_moe.sharding.moe_sharding import check_axes
from jax_marlin_moe.sharding.specs import as_axes
from jax_marlin_moe.weights import MarlinWeights

_SCORING_FNS = ("softmax", "sigmoid", "sqrtsoftplus")


def fused_moe_func(
    hidden_states: Float[Array, "tokens H"],
    w1: MarlinWeights,
    w2: MarlinWeights,
    w1_scale: None,
    w2_scale: None,
    w1_bias: None,
    w2_bias: None,
    gating_output: Float[Array, "tokens experts"],
    topk: int,
    renormalize: bool,
    mesh: Mesh | None,
    use_ep: bool,
    activation: str | Activation,
    scoring_fn: str = "softmax",
    all_gather_fp8: bool = False,
    enable_rs_kernel: bool = False,
    use_gmm_fused_rs_kernel: bool = False,
    onehot_moe_permute_threshold: int = 0,
    scatter_results: bool = False,
    defer_all_reduce: bool = False,
    hash_based_topk_indices: Int[Array, "tokens topk"] | None = None,
    expert_score_correction_bias: Float[Array, " experts"] | None = None,
    moe_chunk_size: int = 0,
    num_valid_tokens: Int[Array, ""] | int | None = None,
    *,
    expert_axis: str | tuple[str, ...] = "expert",
) -> Float[Array, "tokens H"]:
    """Routes tokens by their logits and runs their experts.

    `enable_rs_kernel`, `use_gmm_fused_rs_kernel`, `onehot_moe_permute_threshold` and `moe_chunk_size` choose among the
    kernels of TPUs and change nothing here.

    Args:
        hidden_states: bfloat16 or float16 rows.
        w1: packed experts (H, 2 I), columns [gate | up].
        w2: packed experts (I, H).
        w1_scale: None: packed weights hold their scales.
        w2_scale: likewise.
        w1_bias: None: packed weights hold their bias.
        w2_bias: likewise.
        gating_output: the logits.
        topk: experts per token.
        renormalize: whether the chosen weights are divided by their sum.
        mesh: whose `expert_axis` the experts are over, with `use_ep`.
        use_ep: whether experts are over the mesh; a mesh of more than one device without it is refused.
        activation: a name, as tpu-inference or this package spells it.
        scoring_fn: "softmax", "sigmoid" or "sqrtsoftplus".
        all_gather_fp8: must be False: rows keep their 16 bits.
        enable_rs_kernel: see above.
        use_gmm_fused_rs_kernel: see above.
        onehot_moe_permute_threshold: see above.
        scatter_results: must be False: results leave as rows came.
        defer_all_reduce: must be False: results are sums over all experts.
        hash_based_topk_indices: the experts of each token, where the model chooses them by token.
        expert_score_correction_bias: added to the scores for the choice of experts, not to their weights.
        moe_chunk_size: see above.
        num_valid_tokens: rows from there on are padding, which reads no expert and comes back as zeros.
        expert_axis: of the mesh.

    Raises:
        ValueError: an argument is not what it must be.
    """
    for name, value in (("w1_scale", w1_scale), ("w2_scale", w2_scale), ("w1_bias", w1_bias), ("w2_bias", w2_bias)):
        if value is not None:
            raise ValueError(f"{name} is given; it must be None: packed weights hold scales and bias")
    if scoring_fn not in _SCORING_FNS:
        raise ValueError(f"scoring_fn is {scoring_fn!r}; it must be one of {', '.join(map(repr, _SCORING_FNS))}")
    for name, given, why in (
        ("all_gather_fp8", all_gather_fp8, "rows keep their 16 bits"),
        ("scatter_results", scatter_results, "reshard the result"),
        ("defer_all_reduce", defer_all_reduce, "the result is the sum over all experts"),
    ):
        if given:
            raise ValueError(f"{name} is {given!r}; it must be False: {why}")
    act = activation_named(activation)
    weights, ids = route(
        gating_output.astype(jnp.float32),
        top_k=topk,
        scoring=scoring_fn,
        renormalize=renormalize,
        correction_bias=None if hash_based_topk_indices is not None else expert_score_correction_bias,
        ids=None if hash_based_topk_indices is None else hash_based_topk_indices.astype(jnp.int32),
    )
    if num_valid_tokens is not None:
        ids = jnp.where(jnp.arange(ids.shape[0])[:, None] < num_valid_tokens, ids, -1)
    if mesh is None or mesh.size == 1:
        return fused_moe(hidden_states, w1, w2, weights, ids, activation=act)
    if not use_ep:
        raise ValueError(
            f"use_ep is False and mesh has {mesh.size} devices; it must be True: for tensor parallelism see "
            "jax_marlin_moe.sharding.tensor_parallel"
        )
    axes = as_axes("expert_axis", expert_axis)
    check_axes("expert_axis", axes, mesh)
    experts, ranks = w1.num_experts, math.prod(mesh.shape[axis] for axis in axes)
    specs = [partition_specs(matrix, "experts", axes, ranks=ranks) for matrix in (w1, w2)]

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *specs, P(), P()), out_specs=P())
    def share(x: Array, first: MarlinWeights, second: MarlinWeights, weights: Array, ids: Array) -> Array:
        local = jnp.arange(experts, dtype=jnp.int32) - jax.lax.axis_index(axes) * first.num_experts
        here = jnp.where((local >= 0) & (local < first.num_experts), local, -1)
        float32 = jnp.float32
        y = fused_moe(x, first, second, weights, ids, activation=act, expert_map=here, preferred_element_type=float32)
        return jax.lax.psum(y, axes).astype(x.dtype)

    return share(hidden_states, w1, w2, weights, ids)
