"""`fake_quantize`, and packing again while training goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm

W = jnp.asarray(np.random.default_rng(0).normal(size=(2, 96, 64)), jnp.float32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", sorted(oracle.FACTS))
def test_weights_become_what_is_packed_bit_for_bit(weight_format):
    packed = jmm.quantize(W, weight_format)
    np.testing.assert_array_equal(jmm.fake_quantize(W, weight_format), jmm.dequantize(packed))


def test_groups_and_leading_dimensions_are_those_of_quantize():
    packed = jmm.quantize(W, "int8_zp", group_size=None, scale_dtype=jnp.float16)
    faked = jmm.fake_quantize(W[None], "int8_zp", None, scale_dtype=jnp.float16)
    np.testing.assert_array_equal(faked[0], jmm.dequantize(packed))
    one = jmm.fake_quantize(W[1].astype(jnp.bfloat16), "int4", 32)
    assert one.dtype == jnp.bfloat16
    wanted = jmm.dequantize(jmm.quantize(W[1:].astype(jnp.bfloat16), "int4", group_size=32))[0]
    np.testing.assert_array_equal(one, wanted.astype(jnp.bfloat16))


def test_the_derivative_is_that_of_the_identity_in_both_modes():
    probe = jnp.cos(jnp.arange(W.size, dtype=jnp.float32)).reshape(W.shape)
    gradient = jax.jit(jax.grad(lambda w: (jmm.fake_quantize(w, "nvfp4") * probe).sum()))(W)
    np.testing.assert_array_equal(gradient, probe)
    _, dot = jax.jvp(lambda w: jmm.fake_quantize(w, "int4"), (W,), (probe,))
    np.testing.assert_array_equal(dot, probe)


def test_packing_again_compiles_once_and_reuses_the_memory():
    packed = jmm.quantize(W, "int4", group_size=32)
    compiled = []

    def renew(_, dense):
        compiled.append(None)
        return jmm.quantize(dense, "int4", group_size=32)

    renewed = jax.jit(renew, donate_argnums=0, keep_unused=True)
    for scale in (1.0, 2.0, 3.0):
        before = packed
        packed = renewed(packed, W * scale)
        assert before.packed.is_deleted()
    assert len(compiled) == 1
    wanted = jmm.quantize(W * 3.0, "int4", group_size=32)
    jax.tree.map(np.testing.assert_array_equal, packed, wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.zeros((64,)),), ValueError, r"w has shape \(64,\)"),
        ((jnp.zeros((64, 64), jnp.int8),), TypeError, "w has dtype int8"),
        ((W, "int3"), ValueError, "int3"),
        ((W, "nvfp4", 32), ValueError, "group_size is 32; format nvfp4"),
        ((W, "int4", "largest"), TypeError, "group_size is 'largest'; it must be an int, None"),
        ((W, "int4", 32.0), TypeError, r"group_size is 32\.0; it must be an int"),
        (([[1.0]],), TypeError, "w has type list; it must be an array"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        jmm.fake_quantize(*arguments)
