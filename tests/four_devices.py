"""Checks sharded calls on four virtual CPU devices; prints a JSON object of what failed, or null, by check.

XLA reads the number of devices when it starts, so `test_sharding.py` runs this in a process of its own.
"""

import dataclasses
import functools
import os
import re
from functools import partial

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from printed_checks import print_failures

import jax_marlin_moe as jmm
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.primitive import Op, map_batch
from jax_marlin_moe.sharding import partition_specs, tensor_parallel

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 8, 128, 512, 2, 12
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))


@functools.cache
def block(weight_format="int4", group_size=64, halves=2):
    """x, gate_up, down, router weights, ids."""
    first = host_arrays.normal(0, (EXPERTS, HIDDEN, halves * INNER), scale=HIDDEN**-0.5)
    second = host_arrays.normal(1, (EXPERTS, INNER, HIDDEN), scale=INNER**-0.5)
    gate_up = jmm.quantize(
        first, weight_format, group_size=group_size, bias=host_arrays.normal(4, (EXPERTS, first.shape[2]))
    )
    down = jmm.quantize(second, weight_format, group_size=group_size, bias=host_arrays.normal(5, (EXPERTS, HIDDEN)))
    x = host_arrays.normal(2, (TOKENS, HIDDEN), jnp.bfloat16)
    # On the host: what lies on a device, JAX cuts by a program that it compiles for every shape.
    matrices = jax.tree.map(np.asarray, (gate_up, down))
    return (x, *matrices, *jmm.route(host_arrays.normal(3, (TOKENS, EXPERTS)), top_k=TOP_K))


def on_one_device(arguments):
    return jax.tree.map(jnp.asarray, arguments)


def local_map():
    local = jnp.arange(EXPERTS, dtype=jnp.int32) - jax.lax.axis_index("d") * (EXPERTS // 4)
    return jnp.where((local >= 0) & (local < EXPERTS // 4), local, -1)


def summed(share, x):
    return jax.lax.psum(share.astype(jnp.float32), "d").astype(x.dtype)


def assert_close(actual, wanted, tolerance=1e-2):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, f"relative error {error}"


def assert_not_replicated(function, *arguments):
    """`shard_map` refuses the function, whose results it is told are the same on all devices."""
    try:
        jax.eval_shape(function, *arguments)
        message = "accepted"
    except ValueError as error:
        message = str(error)
    assert "require replication" in message, message


def parallel_experts(implementation):
    arguments = on_one_device(block())
    x, gate_up, down, *_ = arguments
    specs = (P(), *(partition_specs(matrix, "experts", "d") for matrix in (gate_up, down)), P(), P())

    def share(x, gate_up, down, w, ids):
        return jmm.fused_moe(x, gate_up, down, w, ids, expert_map=local_map(), implementation=implementation)

    def whole(*arguments):
        return summed(share(*arguments), x)

    y = jax.jit(jax.shard_map(whole, mesh=MESH, in_specs=specs, out_specs=P()))(*arguments)
    assert_close(y, jmm.fused_moe(*arguments))
    assert_not_replicated(jax.shard_map(share, mesh=MESH, in_specs=specs, out_specs=P()), *arguments)


def shuffled_experts(implementation):
    """Experts in another order over the devices, one of them nowhere, tokens that name one twice, and odd ids."""
    x, gate_up, down, w, ids = block()
    ids = ids.at[0].set(ids[0, 0]).at[1, 0].set(-1).at[2, 1].set(EXPERTS).at[3].set(5)
    order = jnp.asarray([3, 6, 0, 7, 2, 4, 1, 5], jnp.int32)  # the expert at each place
    place = jnp.argsort(order).astype(jnp.int32).at[5].set(-1)  # no rank has expert 5
    wanted = jmm.fused_moe(x, gate_up, down, w, ids, expert_map=jnp.arange(EXPERTS, dtype=jnp.int32).at[5].set(-1))
    stacks = [jax.tree.map(lambda leaf: leaf[order], matrix) for matrix in (gate_up, down)]
    specs = (P(), *(partition_specs(matrix, "experts", "d", ranks=4) for matrix in stacks), P(), P())

    def whole(x, gate_up, down, w, ids):
        local = place - jax.lax.axis_index("d") * (EXPERTS // 4)
        local = jnp.where((place >= 0) & (local >= 0) & (local < EXPERTS // 4), local, -1)
        return summed(jmm.fused_moe(x, gate_up, down, w, ids, expert_map=local, implementation=implementation), x)

    y = jax.jit(jax.shard_map(whole, mesh=MESH, in_specs=specs, out_specs=P()))(x, *stacks, w, ids)
    assert_close(y, wanted)
    assert not np.any(y[3]), "expert 5 is nowhere"


def varying_ids(implementation):
    """Tokens over devices; the product and the alignment vary with the ids, whatever x does."""
    x, gate_up, _, _, ids = block()

    def product(x, ids):
        alignment = jmm.moe_align_block_size(
            ids, block_size=8, num_experts=EXPERTS, expert_map=local_map(), implementation=implementation
        )
        return jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K, implementation=implementation), alignment

    wrapped = jax.shard_map(product, mesh=MESH, in_specs=(P(), P()), out_specs=(P(), P("d")))
    assert_not_replicated(wrapped, x, ids)
    wrapped = jax.shard_map(product, mesh=MESH, in_specs=(P(), P()), out_specs=(P(), P()))
    assert_not_replicated(wrapped, x, ids)

    def tokens(x, gate_up, ids):
        alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS, implementation=implementation)
        return jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K, implementation=implementation)

    specs = (P("d"), P(), P("d"))
    y = jax.jit(jax.shard_map(tokens, mesh=MESH, in_specs=specs, out_specs=P("d")))(x, gate_up, ids)
    assert_close(y, tokens(x, gate_up, ids))


def batches(implementation):
    """`vmap` and `scan` inside a `shard_map` over tokens, an empty batch included."""
    x, gate_up, down, w, ids = block()

    def one(x, w, ids):
        return jmm.fused_moe(x, gate_up, down, w, ids, implementation=implementation)

    rows = [array.reshape(4, 3, -1) for array in (x, w, ids)]
    run = jax.shard_map(jax.vmap(one), mesh=MESH, in_specs=P("d"), out_specs=P("d"))
    assert_close(jax.jit(run)(*rows).reshape(x.shape), one(x, w, ids))

    def loop(x, w, ids):
        return jax.lax.scan(lambda h, _: (one(h, w, ids), None), x, length=2)[0]

    run = jax.shard_map(loop, mesh=MESH, in_specs=P("d"), out_specs=P("d"))
    assert_close(jax.jit(run)(x, w, ids), one(one(x, w, ids), w, ids))
    run = jax.shard_map(
        lambda *rows: jax.vmap(one)(*(array[:, None][:0] for array in rows)),
        mesh=MESH, in_specs=P("d"), out_specs=P("d"),
    )  # fmt: skip
    assert jax.eval_shape(run, x, w, ids).shape == (0, 1, HIDDEN)


def gradients(implementation):
    """Of rows and router weights that all devices have, and of the biases that each has of its own experts."""
    x, gate_up, down, w, ids = block()
    specs = (P(), *(partition_specs(matrix, "experts", "d") for matrix in (gate_up, down)), P(), P())

    def share(x, gate_up, down, w, ids):
        return summed(jmm.fused_moe(x, gate_up, down, w, ids, expert_map=local_map(), implementation=implementation), x)

    def one(x, gate_up, down, w, ids):
        return jmm.fused_moe(x, gate_up, down, w, ids, implementation="xla")

    def gradient(block):
        def loss(x, first, second, w):
            matrices = (dataclasses.replace(matrix, bias=bias) for matrix, bias in ((gate_up, first), (down, second)))
            return jnp.sin(block(x, *matrices, w, ids).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, range(4)))(x, gate_up.bias, down.bias, w)

    ours = gradient(jax.shard_map(share, mesh=MESH, in_specs=specs, out_specs=P()))
    for found, wanted in zip(ours, gradient(one), strict=True):
        assert found.dtype == wanted.dtype
        assert_close(found, wanted, 2e-2)


def explicit_tokens(implementation):
    """Types say where tokens are: the result has x's rows, and lists are replicated."""
    x, gate_up, down, w, ids = on_one_device(block())
    xs, ws, js = (jax.device_put(array, NamedSharding(EXPLICIT, P("d"))) for array in (x, w, ids))
    y = jax.jit(lambda *a: jmm.fused_moe(a[0], gate_up, down, *a[1:], implementation=implementation))(xs, ws, js)
    assert_close(y, jmm.fused_moe(x, gate_up, down, w, ids))
    assert y.sharding.spec[0] == "d", y.sharding
    hidden = jax.device_put(x, NamedSharding(EXPLICIT, P(None, "d")))
    y = jax.jit(lambda *a: jmm.fused_moe(a[0], gate_up, down, *a[1:], implementation=implementation))(hidden, w, ids)
    assert_close(y, jmm.fused_moe(x, gate_up, down, w, ids))
    assert jax.typeof(y).sharding.spec == P(None, None), y.sharding
    options = {"block_size": 8, "num_experts": EXPERTS, "implementation": implementation}
    lists, wanted = jmm.moe_align_block_size(js, **options), jmm.moe_align_block_size(ids, **options)
    for ours, expected in zip(jax.tree.leaves(lists), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, expected)


def parallel_tensors(weight_format, group_size, activation="silu"):
    x, gate_up, down, w, ids = block(weight_format, group_size, halves=1 if activation == "relu2" else 2)
    ids = ids.at[0].set(ids[0, 0]).at[1, 0].set(-1)  # one expert twice, and none
    options = {"activation": activation}
    wanted = jmm.fused_moe(x, gate_up, down, w, ids, **options)
    gate_up, down = tensor_parallel(gate_up, down, 4, **options)
    cuts = (partition_specs(gate_up, "columns", "d", ranks=4), partition_specs(down, "rows", "d", ranks=4))
    specs = (P(), *cuts, P(), P())

    def share(x, gate_up, down, w, ids):
        return summed(jmm.fused_moe(x, gate_up, down, w, ids, **options), x)

    run = jax.jit(jax.shard_map(share, mesh=MESH, in_specs=specs, out_specs=P()))
    assert_close(run(x, gate_up, down, w, ids), wanted)
    placed = [
        jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(MESH, spec)), matrix, spec)
        for matrix, spec in zip((gate_up, down), specs[1:3], strict=True)
    ]
    assert_close(run(x, *placed, w, ids), wanted)


def collectives(compiled):
    return re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
    )


def on_rows(array):
    return jax.device_put(array, NamedSharding(MESH, P("d")))


def partitioned_op():
    """An op that names its rows: they are shared out, and nothing is gathered."""

    def doubled(x, table):
        return 2 * x + table[0]

    op = Op(
        "doubled",
        shape_rule=lambda x, table: [replicated_type(x, x.shape, x.dtype)],
        reference=doubled,
        cpu=lambda x, table: [doubled(x, table) + 1],
        cuda=lambda x, table: [doubled(x, table)],
        batching_rule=lambda op, leaves, dims, **params: map_batch(op, leaves, dims, **params),
        rows=("x",),
    )
    x, table = jnp.arange(32.0).reshape(8, 4), jnp.ones(3)
    run = jax.jit(lambda x, table: op(x, table, implementation=None)[0])
    np.testing.assert_array_equal(run(x, table), 2 * x + 2)
    rows = on_rows(x)
    np.testing.assert_array_equal(run(rows, table), 2 * x + 2)
    assert not collectives(run.lower(rows, table).compile())
    assert run(rows, table).sharding.spec[0] == "d"
    columns = jax.device_put(x, NamedSharding(MESH, P(None, "d")))
    np.testing.assert_array_equal(run(columns, table), 2 * x + 2)
    abstract = NamedSharding(MESH.abstract_mesh, P("d"))
    traced = run.trace(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=abstract), table)
    traced.lower(lowering_platforms=("cpu",))
    exported = jax.export.export(run)(rows, table)
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(rows, table), 2 * x + 2)


def sharded_tokens():
    """Plain `jit`, compiled ahead of time: each device computes its tokens, with the bits of one device."""
    x, gate_up, down, w, ids = on_one_device(block())
    run = jax.jit(jmm.fused_moe)
    wanted = run(x, gate_up, down, w, ids)
    placed = on_rows(x), gate_up, down, on_rows(w), on_rows(ids)
    compiled = run.lower(*placed).compile()
    assert not collectives(compiled), collectives(compiled)
    whole = jax.device_put((gate_up, down), NamedSharding(MESH, P()))
    y = compiled(placed[0], *whole, *placed[3:])
    assert y.sharding.spec[0] == "d", y.sharding
    np.testing.assert_array_equal(y, wanted)
    # Other parameters are another program, whatever the shapes.
    other = jax.jit(partial(jmm.fused_moe, activation="gelu"))
    np.testing.assert_array_equal(other(*placed), other(x, gate_up, down, w, ids))


def sharded_derivatives():
    """Of tokens and router weights: local as the tokens are."""
    x, gate_up, down, w, ids = block()

    @jax.jit
    def run(x, w, ids, gate_up, down):
        y, pull = jax.vjp(lambda x, w: jmm.fused_moe(x, gate_up, down, w, ids), x, w)
        return pull(y)

    placed = [on_rows(array) for array in (x, w, ids)]
    compiled = run.lower(*placed, gate_up, down).compile()
    assert not collectives(compiled), collectives(compiled)
    # One device with as many tokens: which roundings XLA leaves out between the products depends on their number.
    parts = [run(*(array[first : first + 3] for array in (x, w, ids)), gate_up, down) for first in range(0, TOKENS, 3)]
    for sharded, *wanted in zip(run(*placed, gate_up, down), *parts, strict=True):
        assert sharded.sharding.spec[0] == "d", sharded.sharding
        np.testing.assert_array_equal(sharded, jnp.concatenate(wanted))


def uneven_tokens():
    """What a program shards in unequal parts is gathered."""
    x, gate_up, down, w, ids = block()

    @jax.jit
    def run(x, w, ids):
        y = jmm.fused_moe(x[:6], gate_up, down, w[:6], ids[:6])
        return jax.lax.with_sharding_constraint(jnp.concatenate([y, y]), NamedSharding(MESH, P("d")))

    wanted = jmm.fused_moe(x, gate_up, down, w, ids)[:6]
    np.testing.assert_array_equal(run(x, w, ids), jnp.concatenate([wanted, wanted]))
    y = jax.jit(lambda x: jmm.fused_moe(x[:10], gate_up, down, w[:10], ids[:10]))(on_rows(x))
    np.testing.assert_array_equal(y[:6], wanted)


def sharded_tokens_in_scan():
    x, gate_up, down, w, ids = block()
    stacks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), (gate_up, down))

    def loop(x, stacks, w, ids):
        def layer(h, index):
            return jmm.fused_moe(h, *jmm.take_layer(stacks, index), w, ids), None

        return jax.lax.scan(layer, x, jnp.arange(2))[0]

    run = jax.jit(loop)
    compiled = run.lower(on_rows(x), stacks, on_rows(w), on_rows(ids)).compile()
    assert not collectives(compiled), collectives(compiled)
    y = run(on_rows(x), stacks, on_rows(w), on_rows(ids))
    assert y.sharding.spec[0] == "d", y.sharding
    np.testing.assert_array_equal(y, run(x, stacks, w, ids))


def sharded_layer():
    x, gate_up, down, *_ = block()
    router = host_arrays.normal(9, (HIDDEN, EXPERTS), scale=HIDDEN**-0.5)

    @jax.jit
    def run(x, router, gate_up, down):
        routing = jmm.Routing(top_k=TOP_K)
        return jmm.moe_layer(x, router, gate_up, down, routing=routing, return_routing=True)

    compiled = run.lower(on_rows(x), router, gate_up, down).compile()
    assert not collectives(compiled), collectives(compiled)
    for sharded, wanted in zip(run(on_rows(x), router, gate_up, down), run(x, router, gate_up, down), strict=True):
        assert sharded.sharding.spec[0] == "d", sharded.sharding
        np.testing.assert_array_equal(sharded, wanted)


CHECKS = {
    "partitioned op": (partitioned_op,),
    "sharded tokens": (sharded_tokens,),
    "sharded derivatives": (sharded_derivatives,),
    "uneven tokens": (uneven_tokens,),
    "sharded tokens in scan": (sharded_tokens_in_scan,),
    "sharded layer": (sharded_layer,),
    **{
        f"{check.__name__} {implementation}": (check, implementation)
        for check in (parallel_experts, shuffled_experts, varying_ids, batches, explicit_tokens)
        for implementation in ("cpu", "xla")
    },
    "gradients": (gradients, "cpu"),
    "tensors int4": (parallel_tensors, "int4", 64),
    "tensors int4 in one group": (parallel_tensors, "int4", None),
    "tensors int4_zp": (parallel_tensors, "int4_zp", 128),
    "tensors int8_fzp": (parallel_tensors, "int8_fzp", 64),
    "tensors nvfp4": (parallel_tensors, "nvfp4", 16),
    "tensors mxfp4": (parallel_tensors, "mxfp4", 32),
    "tensors mxfp8": (parallel_tensors, "mxfp8", 32),
    "tensors fp8": (parallel_tensors, "fp8", 128),
    "tensors relu2": (parallel_tensors, "int4", 128, "relu2"),
}


if __name__ == "__main__":
    print_failures(CHECKS)
