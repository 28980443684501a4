"""What XLA makes of calls for H200s, compiled where there is none; prints a JSON object of counts by program.

It needs JAX's CUDA plugin, and NVRTC for our kernels. JAX asks for a GPU before it lets a topology of the platform
"gpu" be named (jax-ml/jax#23971), so `test_card_programs.py` runs this, with that question answered, in a process of
its own.
"""

import json
import math
import os
import re

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_MARLIN_MOE_CUDA_ARCH": "sm_90a"}
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from jax_marlin_moe.sharding import partition_specs, tensor_parallel

_known = xla_bridge.canonicalize_platform
xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("gpu", "cuda") else _known(name)

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
EXPERTS, HIDDEN, INNER, TOP_K, TOKENS, LAYERS = 16, 512, 256, 2, 8, 4
MANY = 4096


def shapes(mesh, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def weights(array, rows, columns, lead=()):
    packed = array((*lead, EXPERTS, rows // 16, 2 * columns), jnp.int32)
    scales = array((*lead, EXPERTS, rows // 128, columns), jnp.bfloat16)
    return jmm.MarlinWeights(packed, scales, None, None, None, jmm.FORMATS["int4"], 128)


def block(array, lead=()):
    return weights(array, HIDDEN, 2 * INNER, lead), weights(array, INNER, HIDDEN, lead)


def rows(array, tokens=TOKENS):
    choice = (tokens, TOP_K)
    return array((tokens, HIDDEN), jnp.bfloat16), array(choice, jnp.float32), array(choice, jnp.int32)


def call(x, w, ids, gate_up, down):
    return jmm.fused_moe(x, gate_up, down, w, ids)


def scan(x, w, ids, *stack):
    def layer(h, index):
        return jmm.fused_moe(h, *jmm.take_layer(stack, index), w, ids), None

    return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]


def recipe(mesh, *where, tokens=TOKENS, **options):
    """A layer whose experts are over the cards, and tokens where it is said."""
    sharding = jmm.sharding.MoESharding(mesh, expert="cards")
    one = jmm.MoELayer(
        *block(jax.ShapeDtypeStruct), jax.ShapeDtypeStruct((HIDDEN, EXPERTS), jnp.float32), jmm.Routing(2)
    )

    def call(layer, x):
        return jmm.sharding.parallel_layer(layer, x, sharding, tokens=where, **options)

    return call, sharding.abstract(one), shapes(mesh, *where)((tokens, HIDDEN), jnp.bfloat16)


def in_shares(mesh):
    """A block whose intermediate dimension is over the cards, gate and up in shares."""
    laid_out = jax.eval_shape(lambda *block: tensor_parallel(*block, mesh.size), *block(jax.ShapeDtypeStruct))
    specs = [partition_specs(one, over, "cards") for one, over in zip(laid_out, ("columns", "rows"), strict=True)]
    placed = [
        jax.tree.map(lambda leaf, spec: shapes(mesh, *spec)(leaf.shape, leaf.dtype), one, spec)
        for one, spec in zip(laid_out, specs, strict=True)
    ]
    return call, *rows(shapes(mesh)), *placed


def artefact():
    """A program for any number of tokens up to 4."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in jmm.CUSTOM_CALL_TARGETS]
    (t,) = jax.export.symbolic_shape("t", constraints=("t <= 4",))
    arguments = (*rows(jax.ShapeDtypeStruct, t), *block(jax.ShapeDtypeStruct))
    return jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=allowed)(*arguments).call


def counts(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    text = program.as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|conditional"
    largest = max(jax.tree.leaves(arguments), key=lambda leaf: leaf.size)  # codes of gate and up
    part = largest.sharding.shard_shape(largest.shape)
    layer = math.prod(part[-3:]) * 4 * 3 // 2  # what one card has
    return {
        "calls": len(re.findall(r'custom_call_target="jax_marlin_moe\.program', text)),
        "others": sorted(re.findall(rf" ({kinds})(?:-start)?\(", text)),
        "copies a layer": program.memory_analysis().temp_size_in_bytes >= layer,
    }


def main():
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x4")
    one, two, four = (Mesh(np.array(topology.devices[:count]), ("cards",)) for count in (1, 2, 4))
    whole = shapes(one)
    programs = {
        "block": (call, *rows(whole), *block(whole)),
        "scan": (scan, *rows(whole), *block(whole, (LAYERS,))),
        "artefact": (artefact(), *rows(whole, 3), *block(whole)),
    }
    cards = ["cards"]
    for name, of_rows, of_experts in (("tokens", cards, []), ("experts", [], cards), ("both", cards, cards)):
        programs[name] = (call, *rows(shapes(four, *of_rows)), *block(shapes(four, *of_experts)))
    programs["columns"] = in_shares(two)
    for exchange in ("gather", "ragged"):
        programs[f"recipe, {exchange}"] = recipe(four, "cards", exchange=exchange)
    for name, mesh in (("two", two), ("four", four)):  # 8 MiB of float32
        operands = *rows(shapes(mesh), MANY), *block(shapes(mesh, "cards"))
        programs[f"many rows, {name} cards"] = call, *operands
    programs["recipe, many rows"] = recipe(two, tokens=MANY)
    print(json.dumps({name: counts(*program) for name, program in programs.items()}))


if __name__ == "__main__":
    main()
