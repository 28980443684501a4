"""What Orbax and `flax.serialization` save comes back, and never into a template with other facts."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_layers import full_layer

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import with_facts, without_facts


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def changed(layer, path, value):
    """A layer with another value at a path such as "down.format"."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(layer, **{name: changed(getattr(layer, name), rest, value) if rest else value})


# A fact that leaves the shapes of all arrays as they are; where it is, what the template has and what was saved.
OTHERS = [
    ("down.format", jmm.FORMATS["fp8"], "down.format is 'fp8' in .*it must be 'int8_fzp', as it was saved"),
    ("gate_up.column_padding", (28, 52), r"column_padding is \[28, 52\] in .*it must be \[40, 40\]"),
    ("gate_up.row_padding", 0, "(row_padding is 0|group_size is 48) in .*it must be (8|40)"),
    ("shared.down.row_padding", 4, "(row_padding is 4|group_size is 28) in .*it must be (8|24)"),
    (
        "routing",
        jmm.Routing(2, renormalize_epsilon=1e-6, identity_experts=2),
        "routing.apply_on_input is False in .*it must be True",
    ),
    ("activation", jmm.swiglu(7), "activation.parameters is "),
    ("norm_epsilon", 1e-6, "norm_epsilon is 1e-06 in .*it must be 1e-05"),
]


@pytest.fixture(scope="module")
def saver():
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as saver:
        yield saver


@pytest.fixture(scope="module")
def saved(saver, tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "layer"
    saver.save(path, with_facts({"layers": [full_layer()]}))
    saver.wait_until_finished()
    return path


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_orbax_restores_what_it_saved(saver, saved):
    layer = full_layer()
    template = with_facts({"layers": [zeros(layer)]})
    assert_same(without_facts(saver.restore(saved, template)), {"layers": [layer]})
    abstract = with_facts({"layers": [jax.eval_shape(lambda: layer)]})
    assert_same(without_facts(saver.restore(saved, abstract)), {"layers": [layer]})


@pytest.mark.parametrize(("path", "value", "message"), OTHERS)
def test_orbax_does_not_restore_into_other_facts(saver, saved, path, value, message):
    template = with_facts({"layers": [changed(zeros(full_layer()), path, value)]})
    with pytest.raises(ValueError, match=rf"\['layers'\]\[0\].*{message}"):
        without_facts(saver.restore(saved, template))


def test_orbax_without_facts_is_refused(saver, saved):
    with pytest.raises(
        ValueError, match=r"the saved tree has packed weights at \['layers'\]\[0\], and the template has none"
    ):
        without_facts(saver.restore(saved))
    layer = full_layer()
    with pytest.raises(ValueError, match="the template has packed weights at its root, and the saved tree has none"):
        without_facts({"tree": layer, "facts": with_facts({})["facts"]})
    with pytest.raises(ValueError, match="restored has no facts"):
        without_facts({"tree": layer})
    with pytest.raises(ValueError, match="restored has no facts"):
        without_facts({"tree": layer, "facts": np.zeros(3, np.uint8)})


@pytest.fixture(scope="module")
def serialization():
    from flax import serialization

    import jax_marlin_moe.flax.serialization  # noqa: F401

    return serialization


def test_flax_restores_what_it_saved(serialization):
    layer = full_layer()
    state = serialization.to_bytes({"layers": [layer, layer.down]})
    assert_same(
        serialization.from_bytes({"layers": [zeros(layer), zeros(layer.down)]}, state), {"layers": [layer, layer.down]}
    )
    (abstract,) = serialization.from_bytes(
        {"a": jax.eval_shape(lambda: layer)}, serialization.to_bytes({"a": layer})
    ).values()
    assert_same(abstract, layer)


@pytest.mark.parametrize(("path", "value", "message"), OTHERS)
def test_flax_does_not_restore_into_other_facts(serialization, path, value, message):
    state = serialization.to_bytes({"layer": full_layer()})
    target = {"layer": changed(zeros(full_layer()), path, value)}
    message = message.removeprefix("down.")  # the message has the path of the part, and the fact's name in it
    with pytest.raises(ValueError, match=message) as refused:
        serialization.from_bytes(target, state)
    assert re.search(r"in the target \w+ at \./layer", str(refused.value))


def test_flax_does_not_restore_into_other_arrays(serialization):
    layer = full_layer()
    state = serialization.to_bytes(layer)
    with pytest.raises(ValueError, match="the list of arrays is "):
        serialization.from_bytes(changed(layer, "down.bias", None), state)
    with pytest.raises(ValueError, match="the list of arrays is "):
        serialization.from_bytes(changed(layer, "shared", None), state)
    with pytest.raises(ValueError, match=r"router\.dtype is dtype\(.float32.\) in the target MoELayer"):
        serialization.from_bytes(changed(layer, "router", layer.router.astype("float32")), state)
    with pytest.raises(ValueError, match=r"router\.shape is \(40, 8\) in the target MoELayer"):
        serialization.from_bytes(changed(layer, "router", jnp.zeros((40, 8), jnp.float16)), state)
    with pytest.raises(ValueError, match="must be restored from the state of one, with its facts"):
        serialization.from_state_dict(layer, {"router": layer.router})


def test_flax_variables_of_a_linen_layer(serialization):
    """Nothing has to be imported beside the layer."""
    code = """
import flax.serialization, jax, jax.numpy as jnp, numpy as np
import jax_marlin_moe as jmm
from jax_marlin_moe.flax.linen import MarlinMoE
weights = jmm.quantize(jnp.ones((2, 64, 64), jnp.bfloat16), "int4", group_size=64)
state = flax.serialization.to_bytes({"quantized": {"down": weights}})
restored = flax.serialization.from_bytes({"quantized": {"down": weights}}, state)
np.testing.assert_array_equal(restored["quantized"]["down"].packed, weights.packed)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
