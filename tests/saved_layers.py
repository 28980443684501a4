"""A layer with every field set, for tests of what saves and restores it."""

import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import MoELayer, SharedExpert


def full_layer(*, of_version_1: bool = False) -> MoELayer:
    """Every field set, or those that the first version of the packed form knows."""
    later = {} if of_version_1 else {"renormalize_epsilon": 1e-6, "identity_experts": 2}
    experts = 4 if of_version_1 else 6
    rng = np.random.default_rng(0)

    def dense(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float16)

    def pair(experts):
        halves = [jmm.quantize(dense(experts, 40, 24), "int4_zp", group_size=None) for _ in range(2)]
        bias = rng.normal(size=(experts, 40)).astype(np.float32)
        down = jmm.quantize(dense(experts, 24, 40), "int8_fzp", group_size=None, bias=bias)
        return jmm.concatenate_columns(halves), down

    gate_up, down = pair(4)
    return MoELayer(
        gate_up=gate_up,
        down=down,
        router=dense(40, experts),
        routing=jmm.Routing(2, "sigmoid", num_groups=2, top_groups=1, scale=2.5, apply_on_input=True, **later),
        activation=jmm.swiglu(float("inf"), 1.702, 1.0),
        router_bias=dense(experts),
        correction_bias=dense(experts),
        expert_scale=dense(experts),
        router_input_scale=dense(40),
        token_experts=jnp.zeros((9, 2), jnp.int32),
        shared=SharedExpert(*pair(1), dense(40, 1)),
        output_norm=None if of_version_1 else dense(40),
        norm_epsilon=1e-5,
        shared_activation=None if of_version_1 else "gelu_tanh",
        x_scale=None if of_version_1 else jnp.float32(0.02),
        intermediate_scales=None if of_version_1 else jnp.asarray([0.1, 0.2, 0.3, 0.4], jnp.float32),
        expert_input_scale=None if of_version_1 else dense(40),
    )
