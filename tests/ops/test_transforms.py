"""Every transformation of JAX on every implementation, and docs/transforms.md, which says which test has it."""

import ast
import functools
import pathlib

import host_arrays
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import CALL, needs_nvrtc
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler

ROOT = pathlib.Path(__file__).parents[2]
TABLE = ROOT / "docs" / "transforms.md"
EXPERTS, HIDDEN, TOKENS, TOP_K = 4, 64, 4, 2
ALLOWED = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]


@functools.cache
def operands():
    dense = [host_arrays.normal(n, (EXPERTS, HIDDEN, HIDDEN * n), scale=1 / 8) for n in (2, 1)]
    x = host_arrays.normal(4, (TOKENS, HIDDEN), jnp.bfloat16)
    choice = jmm.route(host_arrays.normal(3, (TOKENS, EXPERTS)), top_k=TOP_K)
    return (x, *choice, *(jmm.quantize(matrix, "int4", group_size=64) for matrix in dense))


def block(implementation, x, w, ids, gate_up, down):
    return jmm.fused_moe(x, gate_up, down, w, ids, implementation=implementation)


def gradient(function, x, *rest):
    return jax.grad(lambda x: jnp.sin(function(x, *rest).astype(jnp.float32)).sum())(x)


def looped(function, x, *rest):
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, function(s[1], *rest)), (jnp.int32(0), x))[1]


def mapped(function, *arguments):
    return jax.shard_map(function, mesh=one_device(AxisType.Auto), in_specs=P(), out_specs=P())(*arguments)


def one_device(kind):
    return jax.make_mesh((1,), ("d",), axis_types=(kind,), devices=jax.devices("cpu")[:1])


# What is traced, and what the result is made of where nothing is transformed.
TRACED = {
    "jit": (lambda f, *a: f(*a), lambda f, *a: f(*a)),
    "vmap": (
        lambda f, x, *r: jax.vmap(f, (0, *[None] * len(r)))(jnp.stack([x, x]), *r),
        lambda f, x, *r: jnp.stack([f(x, *r)] * 2),
    ),
    "scan": (
        lambda f, x, *r: jax.lax.scan(lambda h, _: (f(h, *r), None), x, length=2)[0],
        lambda f, x, *r: f(f(x, *r), *r),
    ),
    "while": (looped, lambda f, x, *r: f(f(x, *r), *r)),
    "cond": (
        lambda f, x, w, ids, *r: jax.lax.cond(ids[0, 0] >= 0, f, lambda x, *_: x, x, w, ids, *r),
        lambda f, *a: f(*a),
    ),
    "remat": (lambda f, *a: gradient(jax.checkpoint(f), *a), gradient),
    "grad": (gradient, gradient),
    "shard_map": (mapped, lambda f, *a: f(*a)),
}


def donated(function, x, *rest):
    rows = x + 0
    y = jax.jit(function, donate_argnums=0)(rows, *rest)
    assert rows.is_deleted()
    return y


def exported(function, *arguments):
    leaves, structure = jax.tree.flatten(arguments)
    program = jax.jit(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)))
    return jax.export.export(program, disabled_checks=ALLOWED)(*leaves).call(*leaves)


def sharded(kind):
    def run(function, *arguments):
        placed = jax.device_put(arguments, NamedSharding(one_device(kind), P()))
        rows, *rest = placed
        rows = jax.device_put(rows, NamedSharding(one_device(kind), P("d")))
        return jax.jit(function)(rows, *rest)

    return run


RUN = {
    "eager": lambda f, *a: f(*a),
    "donation": donated,
    "export": exported,
    "AOT": lambda f, *a: jax.jit(f).lower(*a).compile()(*a),
    "automatic sharding": sharded(AxisType.Auto),
    "explicit sharding": sharded(AxisType.Explicit),
}


@functools.cache
def result(wanted):
    return np.asarray(wanted(functools.partial(block, "cpu"), *operands()), np.float64)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("transformation", [*TRACED, *RUN])
def test_a_transformed_block_computes_the_same(transformation, implementation):
    function = functools.partial(block, implementation)
    if transformation in RUN:
        wanted, ours = TRACED["jit"][1], RUN[transformation](function, *operands())
    else:
        transform, wanted = TRACED[transformation]
        ours = jax.jit(functools.partial(transform, function))(*operands())
    ours = np.asarray(ours, np.float64)
    assert np.linalg.norm(ours - result(wanted)) <= 1e-2 * np.linalg.norm(result(wanted))


@needs_nvrtc
@pytest.mark.sampled(3)
@pytest.mark.parametrize("transformation", TRACED)
def test_a_transformed_block_is_lowered_to_the_program_for_cuda(transformation, monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    transform, _ = TRACED[transformation]
    program = jax.jit(functools.partial(transform, functools.partial(block, "cuda"))).trace(*operands())
    assert CALL in program.lower(lowering_platforms=("cuda",)).as_text()


HERE = "tests/ops/test_transforms.py"
OF_DEVICES = "tests/test_partition.py"
CARD = "tests/cuda/test_card_programs.py"
EACH = "test_each_device_computes_{}with_what_it_has[{}]"


def on_devices(call):
    ordinary = _constants(OF_DEVICES)["ORDINARY"]
    return f"{OF_DEVICES}::{EACH.format('' if call in ordinary else 'every_op_', call)}"


@functools.cache
def _constants(path):
    """Lists of strings of a test file, by name."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            found[node.targets[0].id] = [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
    return found


# Of four devices, and of CUDA where another test has it; None where there is nothing to test, with the reason.
OTHERS = {
    "jit": (None, on_devices("block, experts")),
    "eager": ("on a card: its calls are those of `jit`", on_devices("eager, experts")),
    "vmap": (None, on_devices("vmap, experts")),
    "scan": (None, on_devices("scan, experts")),
    "while": (None, on_devices("while, experts")),
    "cond": (None, on_devices("cond, experts")),
    "remat": (None, on_devices("remat, experts")),
    "donation": ("on a card: XLA's, whatever is called", on_devices("donation, experts")),
    "export": (
        "tests/cuda/test_cuda_exports.py::test_an_export_for_cuda_carries_its_kernels",
        "XLA gathers what is sharded: export the body of a `jax.shard_map`",
    ),
    "AOT": (f"{CARD}::test_a_block_is_one_call_and_copies_no_weights[block]", on_devices("block, experts")),
    "grad": (None, on_devices("gradients of a block, experts, tokens over another axis")),
    "shard_map": (None, "tests/test_sharding.py::test_four_devices_agree_with_one[parallel_experts cpu]"),
    "automatic sharding": (
        f"{CARD}::test_only_rows_and_sums_go_between_cards[experts]",
        on_devices("block, experts and tokens over one axis"),
    ),
    "explicit sharding": (
        "tests/test_two_cards.py::test_two_cards_agree_with_one",
        on_devices("explicit block, experts and tokens over one axis"),
    ),
}


def cells():
    for transformation, (of_cuda, of_devices) in OTHERS.items():
        on_one = [
            f"{HERE}::test_a_transformed_block_computes_the_same[{transformation}-{name}]" for name in ("xla", "cpu")
        ]
        lowered = f"{HERE}::test_a_transformed_block_is_lowered_to_the_program_for_cuda[{transformation}]"
        yield transformation, [*on_one, of_cuda or lowered, of_devices]
    processes, each = "tests/sharding/test_two_processes.py::test_two_processes_", "agree_with_one"
    on_cards = f"{processes}with_a_card_each_{each}"
    yield "two processes", ["no call of its own", processes + each, on_cards, processes + each]


def rendered():
    lines = [
        "# Transformations and implementations",
        "",
        f"A test for each transformation of JAX on each implementation. Written by `pytest {HERE} --write-transforms`;",
        "do not edit it by hand.",
        "",
        "| | reference | CPU | CUDA, lowered or compiled | four devices |",
        "|---|---|---|---|---|",
    ]
    for transformation, tests in cells():
        spelled = (test if "::" not in test else f"`{test.removeprefix('tests/')}`" for test in tests)
        lines.append(f"| {transformation} | {' | '.join(spelled)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_transformations_names_tests_that_there_are(request):
    for _, tests in cells():
        for test in tests:
            if "::" in test:
                path, _, name = test.partition("::")
                assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test
    if request.config.getoption("--write-transforms"):
        TABLE.write_text(rendered())
    assert TABLE.read_text() == rendered(), f"run pytest {HERE} --write-transforms"
