"""Checks recipes of `jax_marlin_moe.sharding` on four virtual CPU devices; prints JSON: what failed, by check.

XLA reads the number of devices when it starts, so `test_recipes.py` runs this in a process of its own.
"""

import dataclasses
import os
import re
from functools import partial

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from printed_checks import print_failures

import jax_marlin_moe as jmm
from jax_marlin_moe.ops import sums
from jax_marlin_moe.ops.packed_shares import pack_share
from jax_marlin_moe.ops.sums import sum_of_packed
from jax_marlin_moe.sharding import MoESharding, parallel_layer, place, place_experts

EXPERTS, HIDDEN, INNER, TOKENS = 8, 64, 128, 8


def mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


EP, BOTH = mesh((4,), ("expert",)), mesh((2, 2), ("expert", "tensor"))
PAIR = jax.make_mesh((2,), ("hosts",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
HOSTS, DATA = mesh((2, 2), ("hosts", "cards")), mesh((2, 2), ("data", "tensor"))


def random(seed, *shape):
    # By NumPy: JAX's numbers are a program for each shape, which takes longer to compile than the checks to run.
    return host_arrays.normal(seed, shape, scale=shape[-2] ** -0.5)


def layer(weight_format="int4", inner=INNER, group_size=64, shared=None, **options):
    def block(experts, seed):
        gate, up = (random(seed + half, experts, HIDDEN, inner) for half in range(2))
        gate_up = jmm.concatenate_columns(
            [
                jmm.quantize(half, weight_format, group_size=group_size, bias=random(seed + 3, experts, inner))
                for half in (gate, up)
            ]
        )
        down = jmm.quantize(
            random(seed + 2, experts, inner, HIDDEN), weight_format, group_size=group_size,
            bias=random(seed + 4, experts, HIDDEN),
        )  # fmt: skip
        return gate_up, down

    if shared == "packed":
        options["shared"] = jmm.SharedExpert(*block(1, 20), random(30, HIDDEN, 1))
    elif shared == "dense":
        options["shared"] = jmm.SharedExpert(random(21, HIDDEN, 96), random(22, 48, HIDDEN))
    extra = options.get("routing", jmm.Routing(2)).identity_experts
    router = random(10, HIDDEN, EXPERTS + extra) * 8
    return jmm.MoELayer(*block(EXPERTS, 0), router, **{"routing": jmm.Routing(2), **options})


X = host_arrays.normal(99, (TOKENS, HIDDEN), jnp.bfloat16)


def placed_from_host(whole, sharding):
    """The same shares, but by NumPy: JAX slices arrays of a device by a program for each shape and sharding."""
    return place(jax.tree.map(np.asarray, whole), sharding)


def assert_close(actual, wanted, tolerance=4e-3):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    error = np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, f"relative error {error}"


def collectives(compiled):
    names = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
    return sorted(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))


def equals_one_device(sharding, whole, wanted_collectives=None, **options):
    placed = placed_from_host(whole, sharding)
    run = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding, **options)).lower(placed, X).compile()
    y = run(placed, jax.device_put(X, run.input_shardings[0][1]))
    rows = {name: value for name, value in options.items() if name == "activation_dtype"}
    if options.get("capacity") is not None:
        y, dropped = y
        assert int(dropped) == 0, dropped
    assert_close(y, whole(X, **rows))
    if wanted_collectives is not None:
        found = collectives(run)
        assert found == sorted(wanted_collectives), found


def shares_of_16_bits():
    """Every recipe, with a rounding more for each share."""
    whole = layer(shared="packed")
    wanted = whole(X)
    for sharding, options in (
        (MoESharding(EP), {}),
        (MoESharding(EP), {"tokens": "expert"}),
        (MoESharding(EP), {"tokens": "expert", "exchange": "ragged"}),
        (MoESharding(BOTH), {"tokens": "tensor"}),
    ):
        run = jax.jit(lambda layer, x, s=sharding, o=options: parallel_layer(layer, x, s, share_dtype="bfloat16", **o))
        assert_close(run(placed_from_host(whole, sharding), X), wanted, 7e-3)


def sums_of_packed_shares():
    """What cards send in place of float32, over some axes of a mesh and over all, as the sum of those."""
    y = random(1, 4, 16, HIDDEN) * jnp.exp(random(2, 4, 16, 1))

    def over(mesh, out, one, y, **options):
        axes = mesh.axis_names
        run = jax.shard_map(lambda y: one(y[0]), mesh=mesh, in_specs=P(axes), out_specs=out, **options)
        return jax.jit(run)(y)

    def packed(y, axes, **options):
        return sum_of_packed(pack_share(y), axes, y.dtype, **options)

    def is_sum(found, wanted, ranks):
        assert 0 < np.abs(found - wanted).max() <= ranks * 2.0**-13 * np.abs(y).max()
        assert_close(found, wanted, 3e-4)

    for axes in (("hosts",), ("hosts", "cards")):
        mesh, ranks = HOSTS if len(axes) == 2 else PAIR, 2 * len(axes)
        wanted = sum(y[:ranks])
        is_sum(over(mesh, P(axes), partial(packed, axes=axes, scattered=True), y[:ranks]), wanted, ranks)
        is_sum(over(mesh, P(), partial(packed, axes=axes), y[:ranks]), wanted, ranks)
    pairs = [[0, 2], [3, 1]]
    found = over(EP, P("expert"), partial(packed, axes="expert", groups=pairs), y, check_vma=False)
    for one, other in pairs:
        is_sum(found[16 * one : 16 * one + 16], y[one] + y[other], 2)
        np.testing.assert_array_equal(found[16 * one : 16 * one + 16], found[16 * other : 16 * other + 16])


def shares_packed_where_they_are_made():
    """What cards do with many rows, here with few: words of 64 bits, and derivatives that know nothing of them."""
    sharding, whole = MoESharding(BOTH), layer()
    stack = jmm.stack_layers([whole, whole])
    placed = placed_from_host(stack, sharding)
    where = sums._PACKING_PLATFORMS, sums._MANY_BYTES
    sums._PACKING_PLATFORMS, sums._MANY_BYTES = ("cpu",), 0
    jax.clear_caches()
    try:

        def loss(call, stack, x, bias):
            of_stack = dataclasses.replace(stack.layers, down=dataclasses.replace(stack.layers.down, bias=bias))
            layers = dataclasses.replace(stack, layers=of_stack)
            y, _ = jax.lax.scan(lambda h, index: (h + call(layers[index], h), None), x, jnp.arange(2))
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        def run(call, stack):
            arguments = stack, X, stack.layers.down.bias
            compiled = jax.jit(jax.grad(partial(loss, call), (1, 2), has_aux=True)).lower(*arguments).compile()
            return compiled(*arguments), collectives(compiled)

        ((x, bias), y), kinds = run(partial(parallel_layer, sharding=sharding), placed)
        ((wanted_x, wanted_bias), wanted_y), _ = run(lambda layer, x: layer(x), stack)
        assert "all-to-all" in kinds, kinds
        assert_close(y, wanted_y)
        assert_close(x, wanted_x, 2e-2)
        assert_close(bias[:, :, :HIDDEN], wanted_bias, 2e-2)
        equals_one_device(MoESharding(EP), whole, ["all-gather"] * 3 + ["all-to-all"], tokens="expert")
        equals_one_device(MoESharding(DATA), whole, ["all-gather"] * 3 + ["all-to-all"], tokens=("data", "tensor"))
    finally:
        sums._PACKING_PLATFORMS, sums._MANY_BYTES = where
        jax.clear_caches()


def hierarchy():
    """A row goes to a host once, then to the cards; to hosts with the tokens, and where these are the same."""
    sharding = MoESharding(HOSTS, expert=("hosts", "cards"))
    equals_one_device(sharding, layer(), tokens=("hosts", "cards"), exchange="ragged")
    equals_one_device(sharding, layer(), ["all-gather"] * 3 + ["all-reduce", "reduce-scatter"], tokens="cards")


def all_on_one_expert():
    """The exact mode has room for every row, wherever it goes; capacity drops the rest and says how much."""
    bias = jnp.zeros(EXPERTS).at[jnp.asarray([5, 4])].set(1000.0)
    whole, sharding = layer(router_bias=bias), MoESharding(EP)
    equals_one_device(sharding, whole, tokens="expert", exchange="ragged")
    placed = placed_from_host(whole, sharding)
    y, dropped = parallel_layer(placed, X, sharding, tokens="expert", exchange="ragged", capacity=5)
    assert int(dropped) == 2 * (TOKENS - 5), dropped
    wanted = np.asarray(whole(X), np.float32)
    assert_close(y[:5], wanted[:5])
    assert not np.any(np.asarray(y[5:])), "rows beyond the capacity are not computed"
    y, dropped = parallel_layer(placed, X, sharding, tokens="expert", exchange="ragged", capacity=TOKENS)
    assert int(dropped) == 0
    assert_close(y, wanted)


def copies():
    """Hot experts twice, in an order of their own; balanced anew without another program."""
    whole, sharding = layer(), MoESharding(EP)
    table = [3, 3, 0, 7, 2, 4, 1, 5, 6, 3, 0, 1]
    hot = place_experts(whole, table)
    wanted = whole(X)
    assert_close(hot(X), wanted, 0)
    run = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding, tokens="expert", exchange="ragged"))
    assert_close(run(placed_from_host(hot, sharding), X), wanted)
    anew = place_experts(hot, table[::-1])
    np.testing.assert_array_equal(anew.gate_up.packed, hot.gate_up.packed[::-1])
    assert_close(run(placed_from_host(anew, sharding), X), wanted)
    assert run._cache_size() == 1


def padded(inner, group_size, ranks_mesh, pad):
    """Zeros where the slice of the last rank ends, or in all of it."""
    whole = layer(inner=inner, group_size=group_size)
    equals_one_device(MoESharding(ranks_mesh, expert=(), tensor="tensor", pad=pad), whole)


def stacked():
    """Layers of a stack in a loop: no copy of weights, one all-reduce."""
    sharding, layers = MoESharding(BOTH), [layer(), layer("int4", router_bias=None)]
    layers[1] = dataclasses.replace(layers[1], router=layers[1].router[:, ::-1])
    placed = place(jmm.stack_layers(layers), sharding)

    @jax.jit
    def run(stack, x):
        def step(h, index):
            return h + parallel_layer(stack[index], h, sharding), None

        return jax.lax.scan(step, x, jnp.arange(2))[0]

    found = collectives(run.lower(placed, X).compile())
    assert found == ["all-reduce"], found
    wanted = X + layers[0](X)
    assert_close(run(placed, X), wanted + layers[1](wanted))


def explicit():
    """Axes whose sharding is in types, as those that `jax.make_mesh` makes."""
    devices = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding, whole = MoESharding(devices), layer()
    placed = place(whole, sharding)
    y = parallel_layer(placed, X, sharding, tokens="expert", exchange="ragged")
    assert jax.typeof(y).sharding.spec[0] == "expert"
    assert_close(y, whole(X))
    assert_close(parallel_layer(placed, y, sharding), whole(y))


def rows_of_8_bits():
    """Fixed scales are those of a rank's experts, whatever their order; those of rows are found by all ranks."""
    both = MoESharding(BOTH)
    own = layer(shared="packed", expert_input_scale=SCALES)
    equals_one_device(both, own, activation_dtype="int8")

    def total(x, stop=lambda y: y):
        y = parallel_layer(placed, x, both, activation_dtype="int8").astype(jnp.float32)
        return (x + stop(y)).sum()

    placed = placed_from_host(own, both)
    jax.eval_shape(jax.grad(partial(total, stop=jax.lax.stop_gradient)), X)  # raises nothing
    with pytest.raises(NotImplementedError, match="rounding to integers has no derivative"):
        jax.eval_shape(jax.grad(total), X)
    scales = jnp.asarray(np.random.default_rng(8).uniform(2e-3, 1e-2, EXPERTS), jnp.float32)
    turned = place_experts(layer(x_scale=jnp.float32(0.01), intermediate_scales=scales), [3, 0, 7, 2, 4, 1, 5, 6])
    wanted = turned(X, activation_dtype="float8_e4m3fn")
    assert not np.array_equal(wanted, dataclasses.replace(turned, x_scale=None)(X, activation_dtype="float8_e4m3fn"))
    for call in (lambda layer, x, **rows: layer(x, **rows), partial(parallel_layer, sharding=both)):
        assert_close(
            jax.jit(partial(call, activation_dtype="float8_e4m3fn"))(placed_from_host(turned, both), X), wanted
        )


def gradients():
    whole, sharding = layer(), MoESharding(BOTH)
    placed = placed_from_host(whole, sharding)

    def gradient(call):
        return jax.jit(jax.grad(lambda x: jnp.sin(call(x).astype(jnp.float32)).sum()))(X)

    options = {"tokens": ("expert", "tensor"), "exchange": "ragged"}
    assert_close(gradient(lambda x: parallel_layer(placed, x, sharding, **options)), gradient(whole), 2e-2)


def quantized(mode):
    """Experts are quantised where they are: no collective, and the bits of one device."""
    devices = jax.make_mesh((4,), ("d",), axis_types=(getattr(AxisType, mode),))
    dense = random(0, EXPERTS, HIDDEN, INNER)
    placed = jax.device_put(dense, NamedSharding(devices, P("d")))
    for function in (lambda dense: jmm.quantize(dense, "nvfp4"), lambda dense: jmm.fake_quantize(dense, "int4_zp", 64)):
        run = jax.jit(function)
        compiled = run.lower(placed).compile()
        assert not collectives(compiled), collectives(compiled)
        for one, wanted in zip(*(jax.tree.leaves(call) for call in (run(placed), run(dense))), strict=True):
            assert one.sharding.spec[0] == "d", one.sharding
            np.testing.assert_array_equal(one, wanted)


SCALES = jnp.asarray(np.random.default_rng(7).uniform(0.5, 2, HIDDEN), jnp.bfloat16)
ROUTED_ON_INPUT = jmm.Routing(2, "sigmoid", apply_on_input=True, identity_experts=2)
CHECKS = {
    "experts, same tokens": (equals_one_device, MoESharding(EP), layer(), ["all-reduce"]),
    "experts, gathered": lambda: equals_one_device(
        MoESharding(EP), layer(), ["all-gather"] * 3 + ["reduce-scatter"], tokens="expert"
    ),
    "experts, ragged": lambda: equals_one_device(
        MoESharding(EP), layer(), ["all-gather"] * 2 + ["all-to-all"] * 2, tokens="expert", exchange="ragged"
    ),
    "experts, capacity": lambda: equals_one_device(
        MoESharding(EP), layer(), tokens="expert", exchange="ragged", capacity=TOKENS
    ),
    "tensors": lambda: equals_one_device(MoESharding(DATA), layer(shared="packed"), ["all-reduce"], tokens="data"),
    "tensors with tokens": lambda: equals_one_device(MoESharding(DATA), layer(), tokens=("data", "tensor")),
    "both, packed shared expert": lambda: equals_one_device(
        MoESharding(BOTH), layer(shared="packed", expert_input_scale=SCALES), ["all-reduce"]
    ),
    "both, dense shared expert": lambda: equals_one_device(
        MoESharding(BOTH), layer(shared="dense"), tokens=("tensor", "expert"), exchange="ragged"
    ),
    "both, weights on the input": lambda: equals_one_device(
        MoESharding(BOTH),
        layer(routing=ROUTED_ON_INPUT, shared="packed", expert_input_scale=SCALES),
        tokens="expert",
        exchange="ragged",
    ),
    "both, zero points": lambda: equals_one_device(MoESharding(BOTH), layer("int8_zp"), ["all-reduce"]),
    "both, global scales": lambda: equals_one_device(MoESharding(BOTH), layer("nvfp4", group_size=16)),
    "shares of 16 bits": shares_of_16_bits,
    "sums of packed shares": sums_of_packed_shares,
    "hierarchy": hierarchy,
    "all on one expert": all_on_one_expert,
    "copies": copies,
    "padding of the last tile": (padded, 100, None, BOTH, False),
    "padding alone": (padded, 64, 32, mesh((4,), ("tensor",)), True),
    "stacked": stacked,
    "explicit": explicit,
    "rows of 8 bits": rows_of_8_bits,
    "gradients": gradients,
    "quantized, automatic axes": (quantized, "Auto"),
    "quantized, explicit axes": (quantized, "Explicit"),
    "shares packed where they are made": shares_packed_where_they_are_made,
}


if __name__ == "__main__":
    print_failures(CHECKS)
