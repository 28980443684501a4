"""Calls of sharded operands under plain `jit`, over automatic and explicit axes of four virtual CPU devices.

Prints a JSON object: by call None, or what is wrong with its result, its sharding or its collectives. Arguments are the
names of calls; without them, all are made. XLA reads the number of devices when it starts, so `test_partition.py` runs
this in processes of its own.
"""

import dataclasses
import functools
import json
import sys
import traceback
from collections import Counter

import host_arrays
import jax
import jax.numpy as jnp
import pytest
from four_devices import EXPERTS, HIDDEN, INNER, TOKENS, TOP_K, assert_close, block, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from jax_marlin_moe.sharding import MoESharding, partition_specs, tensor_parallel

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    (kind, shape): jax.make_mesh(shape, ("data", "model")[-len(shape) :], axis_types=(kind,) * len(shape))
    for kind in (AUTO, EXPLICIT)
    for shape in ((4,), (2, 2))
}

operands = functools.cache(block)
ungated = functools.cache(functools.partial(block, halves=1))


@functools.cache
def wide_rows():
    return host_arrays.normal(3, (TOKENS, INNER), jnp.bfloat16)


def fused(x, gate_up, down, w, ids):
    return jmm.fused_moe(x, gate_up, down, w, ids)


def ungated_block(x, gate_up, down, w, ids):
    return jmm.fused_moe(x, gate_up, down, w, ids, activation="relu2")


def gradients(x, gate_up, down, w, ids):
    def loss(x, first, second, w):
        matrices = (dataclasses.replace(matrix, bias=bias) for matrix, bias in ((gate_up, first), (down, second)))
        return jnp.sin(jmm.fused_moe(x, *matrices, w, ids).astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1, 2, 3))(x, gate_up.bias, down.bias, w)


def scanned(x, gate_up, down, w, ids):
    stacks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (gate_up, down))
    layers = jnp.arange(2, dtype=jnp.int32)
    return jax.lax.scan(lambda h, i: (jmm.fused_moe(h, *jmm.take_layer(stacks, i), w, ids), None), x, layers)[0]


def repeated(x, gate_up, down, w, ids):
    def step(state):
        return state[0] + 1, jmm.fused_moe(state[1], gate_up, down, w, ids)

    return jax.lax.while_loop(lambda state: state[0] < 2, step, (jnp.int32(0), x))[1]


def branched(x, gate_up, down, w, ids):
    return jax.lax.cond(ids[0, 0] >= 0, lambda: jmm.fused_moe(x, gate_up, down, w, ids), lambda: x)


def rematerialised(x, gate_up, down, w, ids):
    block = jax.checkpoint(lambda x: jmm.fused_moe(x, gate_up, down, w, ids))
    return jax.grad(lambda x: jnp.sin(block(x).astype(jnp.float32)).sum())(x)


def eager(x, gate_up, down, w, ids):
    return jmm.fused_moe(x, gate_up, down, w, ids)


def donated(x, gate_up, down, w, ids):
    return jmm.fused_moe(x, gate_up, down, w, ids)


def batched(x, gate_up, down, w, ids):
    rows = (array.reshape(4, TOKENS // 4, -1) for array in (x, w, ids))
    return jax.vmap(lambda x, w, ids: jmm.fused_moe(x, gate_up, down, w, ids))(*rows).reshape(x.shape)


def product(x, weights):
    _, _, _, w, ids = operands()
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
    return jmm.moe_gemm(x, weights, alignment, top_k=TOP_K, topk_weights=w, mul_topk_weights=True)


def one_expert(x, weights):
    return jmm.linear(x, weights, expert=5)


def ragged(x, weights):
    return jmm.ragged_dot(x, weights, jnp.asarray([1, 2, 0, 3, 4, 1, 1, 0], jnp.int32))


def dispatched(x, weights):
    """Two dispatches on different devices have the same rows of the result, and one has an expert that is nowhere."""
    table = [[0, 0, 0, 4], [7, 2, 2, 6], [9, 0, 0, 3], [3, 1, 7, 4]]
    return jmm.expert_gemm(x, weights, jnp.asarray(table, jnp.int32))


def gradient_of(function):
    def run(x, weights):
        return jax.grad(lambda x: jnp.sin(jax.tree.leaves(function(x, weights))[0].astype(jnp.float32)).sum())(x)

    return run


gradients_of = {function: gradient_of(function) for function in (product, one_expert, ragged, dispatched)}


@functools.cache
def layer_operands():
    x, gate_up, down, *_ = operands()
    router = host_arrays.normal(0, (HIDDEN, EXPERTS), scale=HIDDEN**-0.5)
    shared = jmm.SharedExpert(
        host_arrays.normal(1, (HIDDEN, 2 * INNER), jnp.bfloat16, HIDDEN**-0.5),
        host_arrays.normal(2, (INNER, HIDDEN), jnp.bfloat16, INNER**-0.5),
    )
    return x, router, gate_up, down, shared


def layer(x, router, gate_up, down, shared):
    """With a shared expert, which is added once however many devices there are."""
    return jmm.moe_layer(x, router, gate_up, down, routing=jmm.Routing(top_k=TOP_K), shared=shared, return_routing=True)


@functools.cache
def in_shares():
    """The block with columns of gate and up in shares of four ranks."""
    x, gate_up, down, *ids = operands()
    return x, *tensor_parallel(gate_up, down, 4), *ids


def gradients_in_shares(x, gate_up, down, w, ids):
    """Without biases, of which the rows between the products need those of all experts."""
    gate_up, down = (dataclasses.replace(matrix, bias=None) for matrix in (gate_up, down))
    return jax.grad(lambda x, w: jnp.sin(fused(x, gate_up, down, w, ids).astype(jnp.float32)).sum(), (0, 1))(x, w)


@functools.cache
def whole_operands():
    x, router, gate_up, down, _ = layer_operands()
    return x, jmm.MoELayer(gate_up, down, router, jmm.Routing(TOP_K))


def of_both(kind):
    return MoESharding(MESHES[kind, (2, 2)], expert="data", tensor="model")


@functools.cache
def placed_operands():
    x, one = whole_operands()
    return x, of_both(AUTO).lay_out(one)


def whole_layer(x, layer):
    return layer(x)


# What is laid out for several devices is compared with what is not.
AS_ONE_HAS_IT = {in_shares: operands, placed_operands: whole_operands}


@functools.cache
def wanted(function, make):
    return jax.jit(function)(*AS_ONE_HAS_IT.get(make, make)())


def cut(weights, over):
    """Specs of weights that are cut; rows share one bias."""
    if over is None:
        return jax.tree.map(lambda _: P(), weights)
    if over == "rows":
        specs = partition_specs(dataclasses.replace(weights, bias=None), "rows", "model")
        return dataclasses.replace(specs, bias=P())
    return partition_specs(weights, over, "model", one_matrix=True)


def block_specs(rows, first, second, make=operands):
    _, gate_up, down, *_ = make()
    return (P(rows), cut(gate_up, first), cut(down, second), P(rows), P(rows))


def specs_in_shares(rows=None):
    _, gate_up, down, *_ = in_shares()
    return (
        P(rows),
        partition_specs(gate_up, "columns", "model"),
        partition_specs(down, "rows", "model"),
        P(rows),
        P(rows),
    )


def experts_of(rows=None):
    return block_specs(rows, "experts", "experts")


def layer_specs(rows="data"):
    _, _, gate_up, down, shared = layer_operands()
    return P(rows), P(), cut(gate_up, "experts"), cut(down, "experts"), cut(shared, None)


@functools.cache
def many_rows():
    """So many that sums over devices have parts: 8 MiB in float32."""
    return jnp.tile(wide_rows(), (-(-(8 << 20) // (4 * HIDDEN * TOKENS)), 1))


def many_operands():
    return many_rows(), operands()[2]


def down_operands():
    return wide_rows(), operands()[2]


def gate_up_operands():
    return operands()[0], operands()[1]


def down_specs(rows, columns, over):
    return P(rows, columns), cut(operands()[2], over)


SCATTERED = {"all-gather": 3, "reduce-scatter": 1}  # rows, router weights and ids; one sum
IN_PARTS = {"reduce-scatter": 1, "all-gather": 1}  # one sum, and its parts, rounded
# Function, operands, axes, mesh, their specs, collectives (None: sums of any number), rows and columns of the result.
CALLS = {
    "block, experts": (fused, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "block, experts, tokens over another axis": (
        fused, operands, AUTO, (2, 2), lambda: experts_of("data"), {"all-reduce": 1}, ("data", None),
    ),
    "block, experts and tokens over one axis": (
        fused, operands, AUTO, (4,), lambda: experts_of("model"), SCATTERED, ("model", None),
    ),
    "block, columns and rows": (
        ungated_block, ungated, AUTO, (4,), lambda: block_specs(None, "columns", "rows", ungated), {"all-reduce": 1},
        (None, None),
    ),
    "gated block, columns and rows": (
        fused, in_shares, AUTO, (4,), specs_in_shares, {"all-reduce": 1}, (None, None),
    ),
    "gated block, columns and rows, tokens over the same axis": (
        fused, in_shares, AUTO, (4,), lambda: specs_in_shares("model"), SCATTERED, ("model", None),
    ),
    "gradients of a gated block, columns and rows": (
        gradients_in_shares, in_shares, AUTO, (4,), specs_in_shares, None, (None, None),
    ),
    "whole layer, experts, columns and rows": (
        whole_layer, placed_operands, AUTO, (2, 2), lambda: (P(), of_both(AUTO).specs(placed_operands()[1])),
        {"all-reduce": 1}, (None, None),
    ),
    "explicit gated block, columns and rows": (
        fused, in_shares, EXPLICIT, (4,), specs_in_shares, {"all-reduce": 1}, (None, None),
    ),
    "explicit whole layer, experts, columns and rows": (
        whole_layer, placed_operands, EXPLICIT, (2, 2), lambda: (P(), of_both(EXPLICIT).specs(placed_operands()[1])),
        {"all-reduce": 1}, (None, None),
    ),
    "gradients of a block, experts, tokens over another axis": (
        gradients, operands, AUTO, (2, 2), lambda: experts_of("data"), "biases", ("data", None),
    ),
    "scan, experts": (scanned, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "vmap, experts": (batched, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "while, experts": (repeated, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "cond, experts": (branched, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "remat, experts": (rematerialised, operands, AUTO, (4,), experts_of, "biases", (None, None)),
    "eager, experts": (eager, operands, AUTO, (4,), experts_of, {}, (None, None)),
    "donation, experts": (donated, operands, AUTO, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "layer, experts, tokens over another axis": (
        layer, layer_operands, AUTO, (2, 2), layer_specs, {"all-reduce": 1}, ("data", None),
    ),
    "layer, experts and tokens over one axis": (
        layer, layer_operands, AUTO, (4,), lambda: layer_specs("model"), {"all-gather": 1, "reduce-scatter": 1},
        ("model", None),
    ),
    "linear of many, rows": (
        one_expert, many_operands, AUTO, (4,), lambda: down_specs(None, "model", "rows"), IN_PARTS, (None, None),
    ),
    "explicit block, experts": (fused, operands, EXPLICIT, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "explicit block, experts and tokens over one axis": (
        fused, operands, EXPLICIT, (4,), lambda: experts_of("model"), SCATTERED, ("model", None),
    ),
    "explicit block, columns and rows": (
        ungated_block, ungated, EXPLICIT, (4,), lambda: block_specs(None, "columns", "rows", ungated),
        {"all-reduce": 1}, (None, None),
    ),
    "explicit gradients of a block, experts, tokens over another axis": (
        gradients, operands, EXPLICIT, (2, 2), lambda: experts_of("data"), None, ("data", None),
    ),
    "explicit scan, experts": (scanned, operands, EXPLICIT, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "explicit vmap, experts": (batched, operands, EXPLICIT, (4,), experts_of, {"all-reduce": 1}, (None, None)),
    "explicit layer, experts, tokens over another axis": (
        layer, layer_operands, EXPLICIT, (2, 2), layer_specs, {"all-reduce": 1}, ("data", None),
    ),
    "explicit layer, experts and tokens over one axis": (
        layer, layer_operands, EXPLICIT, (4,), lambda: layer_specs("model"), {"all-gather": 1, "reduce-scatter": 1},
        ("model", None),
    ),
    "explicit linear of many, rows": (
        one_expert, many_operands, EXPLICIT, (4,), lambda: down_specs(None, "model", "rows"), IN_PARTS, (None, None),
    ),
}  # fmt: skip
for _name, _function in (
    ("moe_gemm", product),
    ("linear", one_expert),
    ("ragged_dot", ragged),
    ("expert_gemm", dispatched),
):
    for _prefix, _kind in (("", AUTO), ("explicit ", EXPLICIT)):
        CALLS |= {
            f"{_prefix}{_name}, experts": (
                _function, down_operands, _kind, (4,), lambda: down_specs(None, None, "experts"),
                {"all-reduce": 1} | ({"all-gather": 1} if _function is ragged and _kind is EXPLICIT else {}),  # biases
                (None, None),
            ),
            f"{_prefix}{_name}, rows": (
                _function, down_operands, _kind, (4,), lambda: down_specs(None, "model", "rows"), {"all-reduce": 1},
                (None, None),
            ),
            f"{_prefix}{_name}, columns": (
                _function, gate_up_operands, _kind, (4,), lambda: (P(), cut(operands()[1], "columns")), {},
                (None, "model"),
            ),
            f"{_prefix}gradient of {_name}, rows": (
                gradients_of[_function], down_operands, _kind, (4,), lambda: down_specs(None, "model", "rows"), None,
                (None, "model"),
            ),
        }  # fmt: skip


REFUSALS = {"refusals": AUTO, "explicit refusals": EXPLICIT}


def placed_on(mesh, arguments, specs):
    return jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arguments, specs)


def check(function, make, kind, shape, specs, expected, of_result):
    mesh, arguments = MESHES[kind, shape], make()
    kinds = Counter()
    with jax.set_mesh(mesh):
        placed = placed_on(mesh, arguments, specs())
        if function is eager:
            found = function(*placed)
        else:
            donates = function is donated
            compiled = jax.jit(function, donate_argnums=0 if donates else ()).lower(*placed).compile()  # ahead of time
            kinds = Counter(collectives(compiled))
            rows = jax.device_put(placed[0], placed[0].sharding, may_alias=False)
            found = compiled(rows, *placed[1:])
            assert rows.is_deleted() == donates
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted(function, make)), strict=True):
        assert_close(ours, other, 5e-3)
    result = jax.tree.leaves(found)[0]
    names = (*result.sharding.spec, *[None] * 2)[:2]
    assert names == of_result, result.sharding
    if expected == "biases":  # those of all experts, once, beside sums
        assert kinds.pop("all-gather") == 1
        expected = None
    if expected is None:  # XLA joins several sums, or does not
        assert set(kinds) <= {"all-reduce"}, kinds
    else:
        assert kinds == Counter(expected), kinds


def refused(kind, message, function, arguments, specs):
    """XLA's error has ours in its text; over explicit axes ours is raised when the call is traced."""
    error = jax.errors.JaxRuntimeError if kind == AUTO else ValueError
    placed = placed_on(MESHES[kind, (4,)], arguments, specs)
    with pytest.raises(error, match=message):
        jax.jit(function).lower(*placed).compile()


def refusals(kind):
    x, _, gate_up, down, shared = layer_operands()
    _, *ids = operands()[2:]
    columns = jax.tree.map(lambda leaf: P(*[None] * (leaf.ndim - 1), "model"), gate_up)
    refused(
        kind,
        r"gate_up.packed is sharded along its dimension 2; fused_moe .* a range of its columns is not one of gate and",
        fused, (x, gate_up, down, *ids), (P(), columns, cut(down, None), P(), P()),
    )  # fmt: skip
    rows = dataclasses.replace(cut(gate_up, None), packed=P(None, "model"))
    refused(
        kind,
        r"gate_up.packed is sharded along its dimension 1; .* needs whole sums .* never gathered unasked",
        fused, (x, gate_up, down, *ids), (P(), rows, cut(down, None), P(), P()),
    )  # fmt: skip
    refused(
        kind,
        r"weights.packed is sharded in 4 parts along its dimension 2, which has 2 whole tiles .* in 1, 2 parts",
        one_expert, (wide_rows(), down), (P(), cut(down, "columns")),
    )  # fmt: skip
    refused(
        kind,
        r"shared.down is sharded along its dimension 0; moe_layer .* the op needs it whole",
        layer, layer_operands(), (P(), P(), *(cut(leaf, None) for leaf in (gate_up, down)),
                                  dataclasses.replace(cut(shared, None), down=P("model"))),
    )  # fmt: skip


def main():
    found = {}
    for name in sys.argv[1:] or [*CALLS, *REFUSALS]:
        try:
            if name in REFUSALS:
                refusals(REFUSALS[name])
            else:
                check(*CALLS[name])
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
