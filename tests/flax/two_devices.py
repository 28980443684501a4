"""Experts of Flax modules over two virtual CPU devices; run by `test_sharded_modules.py` in a process of its own."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import jax_marlin_moe as jmm
from jax_marlin_moe.flax.linen import MarlinMoE as LinenMoE
from jax_marlin_moe.flax.nnx import MarlinMoE

MESH = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
RULES = (("expert", "devices"),)
EXPERTS, HIDDEN = 4, 64


def layer():
    keys = jax.random.split(jax.random.key(0), 3)
    return jmm.MoELayer(
        jmm.quantize(jax.random.normal(keys[0], (EXPERTS, HIDDEN, 2 * HIDDEN)) / 8, "int4", group_size=64),
        jmm.quantize(jax.random.normal(keys[1], (EXPERTS, HIDDEN, HIDDEN)) / 8, "int4_zp", group_size=64),
        jax.random.normal(keys[2], (HIDDEN, EXPERTS)),
        jmm.Routing(2),
    )


def check(placed, whole, x):
    shards = {leaf.sharding.spec for leaf in jax.tree.leaves((placed.gate_up, placed.down))}
    assert all(spec[0] == "devices" and not any(spec[1:]) for spec in shards), shards
    sharding = jmm.sharding.MoESharding(MESH, expert="devices")
    run = jax.jit(lambda layer, x: jmm.sharding.parallel_layer(layer, x, sharding))
    ragged = jax.jit(
        lambda layer, x: jmm.sharding.parallel_layer(layer, x, sharding, tokens="devices", exchange="ragged")
    )
    plain = jax.jit(lambda layer, x: layer(x)).lower(placed, x).compile()
    assert "all-gather" not in plain.as_text()
    wanted = np.asarray(whole(x), np.float32)
    for y in (run(placed, x), ragged(placed, x), plain(placed, x)):
        assert np.linalg.norm(np.asarray(y, np.float32) - wanted) <= 1e-2 * np.linalg.norm(wanted)


def main():
    whole = layer()
    x = jax.random.normal(jax.random.key(1), (6, HIDDEN), jnp.bfloat16)
    module = MarlinMoE(whole, expert_axis="expert")
    with nnx.logical_axis_rules(RULES):
        state = nnx.state(module)
        shardings = nnx.get_named_sharding(state, MESH)
    nnx.update(module, jax.device_put(state, shardings))
    of_nnx = module.layer
    check(of_nnx, whole, x)

    module, variables = LinenMoE.from_layer(whole, expert_axis="expert")
    initial = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.structure(initial) == jax.tree.structure(variables)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), MESH, RULES)
    placed = jax.device_put(nn.unbox(variables), shardings)
    np.testing.assert_array_equal(np.asarray(module.apply(variables, x)), np.asarray(whole(x)))
    quantized = placed["quantized"]
    of_linen = jmm.MoELayer(quantized["gate_up"], quantized["down"], placed["params"]["router"], whole.routing)
    assert jax.tree.structure(of_linen) == jax.tree.structure(of_nnx)
    for leaf, checked in zip(jax.tree.leaves(of_linen), jax.tree.leaves(of_nnx), strict=True):
        assert leaf.sharding.is_equivalent_to(checked.sharding, leaf.ndim), (leaf.sharding, checked.sharding)
        np.testing.assert_array_equal(leaf, checked)


if __name__ == "__main__":
    main()
