"""Random layers and routings: shapes, spread and distinctness that the timings rely on."""

import host_arrays
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.formats import FORMATS, get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import layers_to_rotate, random_layers, random_routings

SHAPE = ModelShape("small", 8, 4, 512, 256, group_size=64)


@pytest.mark.covering
@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weight_format", sorted(FORMATS))
def test_layers(weight_format, dtype):
    shape = SHAPE.grouped(get_format(weight_format))
    first, second = random_layers(shape, weight_format, dtype, count=2)
    gate_up, down = first
    assert (gate_up.num_experts, gate_up.k, gate_up.n, gate_up.group_size) == (8, 512, 512, shape.group_size)
    assert (down.num_experts, down.k, down.n, down.group_size) == (8, 256, 512, shape.group_size)
    assert gate_up.format.name == down.format.name == weight_format
    assert gate_up.scales.dtype in (dtype, jnp.uint8)
    assert not np.array_equal(gate_up.packed, second[0].packed)
    assert not np.array_equal(gate_up.packed[0], gate_up.packed[1])
    # The rows keep their size.
    x = host_arrays.normal(0, (64, SHAPE.hidden), dtype)
    ids = jnp.asarray(random_routings(SHAPE.num_experts, SHAPE.top_k, 64, 1)[0])
    y = jmm.fused_moe(x, *first, jnp.full(ids.shape, 1 / SHAPE.top_k), ids)
    assert 0.8 < float(jnp.std(y.astype(jnp.float32))) < 1.25


def test_group_sizes():
    assert SHAPE.grouped(get_format("int4")).group_size == 64
    assert SHAPE.grouped(get_format("int4"), 32).group_size == 32
    assert SHAPE.grouped(get_format("nvfp4")).group_size == 16


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
