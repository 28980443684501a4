"""The dtypes and shapes in signatures of public functions are those of what they take and return."""

import inspect
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float

import jax_marlin_moe as jmm

E, H, I, TOKENS, TOP_K = 4, 128, 64, 6, 2


def arrays_in(annotation):
    """The array types among the alternatives of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return (annotation,)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(found for part in typing.get_args(annotation) for found in arrays_in(part))
    return ()


def call(function, *args, **kwargs):
    """Calls; arrays must be as annotated, and names of sizes mean one size. Returns the names of what was looked at."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    looked_at = []

    def look(name, value, annotation):
        allowed = arrays_in(annotation)
        if allowed and isinstance(value, jax.Array):
            assert isinstance(value, allowed), f"{name} is {value.dtype}{list(value.shape)}; annotated as {allowed}"
            looked_at.append(name)

    with jaxtyping.jaxtyped("context"):
        for name, value in bound.arguments.items():
            look(name, value, signature.parameters[name].annotation)
        result = function(*args, **kwargs)
        annotation = signature.return_annotation
        if typing.get_origin(annotation) is tuple:
            for part, of_part in zip(result, typing.get_args(annotation), strict=True):
                look("result", part, of_part)
        else:
            look("result", result, annotation)
    return looked_at


@pytest.fixture(scope="module")
def layer():
    keys = jax.random.split(jax.random.key(0), 4)

    def packed(key, k, n):
        return jmm.quantize(jax.random.normal(key, (E, k, n)) * k**-0.5, "int4", group_size=64)

    return types.SimpleNamespace(
        x=jax.random.normal(keys[0], (TOKENS, H), jnp.bfloat16),
        router=jax.random.normal(keys[1], (H, E), jnp.bfloat16),
        gate_up=packed(keys[2], H, 2 * I),
        down=packed(keys[3], I, H),
        weights=jnp.full((TOKENS, TOP_K), 0.5, jnp.float32),
        ids=jnp.arange(TOKENS * TOP_K, dtype=jnp.int32).reshape(TOKENS, TOP_K) % E,
    )


CALLS = {
    "fused_moe": lambda a: (jmm.fused_moe, a.x, a.gate_up, a.down, a.weights, a.ids),
    "moe_layer": lambda a: (jmm.moe_layer, a.x, a.router, a.gate_up, a.down, {"routing": jmm.Routing(TOP_K)}),
    "ragged_dot": lambda a: (jmm.ragged_dot, a.x, a.gate_up, jnp.asarray([3, 0, 1, 2], jnp.int32)),
    "linear": lambda a: (jmm.linear, a.x, a.gate_up, {"expert": 2}),
    "linear of a batch": lambda a: (jmm.linear, a.x.reshape(2, 3, H), a.gate_up.expert(1)),
    "route": lambda a: (jmm.route, a.x.astype(jnp.float32) @ a.router.astype(jnp.float32), {"top_k": TOP_K}),
    "dequantize": lambda a: (jmm.dequantize, a.gate_up),
    "quantize": lambda a: (jmm.quantize, jnp.ones((E, H, I)), "int8", {"group_size": 64}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arrays_are_as_annotated(layer, name):
    function, *args = CALLS[name](layer)
    options = args.pop() if isinstance(args[-1], dict) else {}
    looked_at = call(function, *args, **options)
    assert looked_at
    returned = inspect.signature(function).return_annotation
    if arrays_in(returned) or typing.get_origin(returned) is tuple:
        assert "result" in looked_at


def test_names_of_sizes_mean_one_size_throughout():
    def wrong(x: Float[Array, "tokens H"]) -> Float[Array, "tokens H"]:
        return x.T

    call(wrong, jnp.ones((3, 3)))
    with pytest.raises(AssertionError, match="result is float32"):
        call(wrong, jnp.ones((2, 3)))
