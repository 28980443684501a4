"""Random layers and routings: shapes, spread and distinctness that the timings rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.argument_shapes import MODELS, ModelShape
from jax_marlin_moe.random_layers import layers_to_rotate, random_layers, random_routings

SHAPE = ModelShape("small", 8, 4, 512, 256, group_size=64)


@pytest.mark.parametrize(("weight_format", "dtype"), [("int4", "bfloat16"), ("int4_zp", "float16")])
def test_layers(weight_format, dtype):
    first, second = random_layers(SHAPE, weight_format, dtype, count=2)
    gate_up, down = first
    assert (gate_up.num_experts, gate_up.k, gate_up.n, gate_up.group_size) == (8, 512, 512, 64)
    assert (down.num_experts, down.k, down.n, down.group_size) == (8, 256, 512, 64)
    assert gate_up.scales.dtype == dtype
    assert not np.array_equal(gate_up.packed, second[0].packed)
    assert not np.array_equal(gate_up.packed[0], gate_up.packed[1])


def test_rows_keep_their_size():
    (layer,) = random_layers(SHAPE, "int4", "bfloat16", count=1)
    x = jax.random.normal(jax.random.key(0), (64, SHAPE.hidden), jnp.bfloat16)
    ids = jnp.asarray(random_routings(SHAPE.num_experts, SHAPE.top_k, 64, 1)[0])
    y = jmm.fused_moe(x, *layer, jnp.full(ids.shape, 1 / SHAPE.top_k), ids, implementation="xla")
    assert 0.8 < float(jnp.std(y.astype(jnp.float32))) < 1.25


def test_layers_to_rotate_exceed_caches():
    for shape in MODELS.values():
        layer_bytes = 1.5 * shape.num_experts * shape.hidden * shape.intermediate
        count = layers_to_rotate(shape, "int4")
        assert 1 <= count <= 8
        assert count * layer_bytes >= 1e9
        assert count == 1 or count * layer_bytes < 2.5e9


@pytest.mark.parametrize("zipf", [False, True])
def test_routings(zipf):
    ids = random_routings(16, 4, 32, 10, zipf=zipf)
    assert ids.shape == (10, 32, 4)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < 16
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
    counts = np.sort(np.bincount(ids.ravel(), minlength=16))
    if zipf:
        assert counts[-1] > 4 * counts[0]
    else:
        assert counts[-1] < 1.6 * counts[0]
    assert not np.array_equal(ids, random_routings(16, 4, 32, 10, zipf=zipf, seed=1))
