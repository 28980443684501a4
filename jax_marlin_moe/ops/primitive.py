"""How an op becomes a JAX primitive: a shape rule, a reference for every platform, custom calls for some."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla


def define_primitive(
    name: str,
    *,
    shape_rule: Callable,
    reference: Callable,
    cpu: Callable,
    cuda: Callable,
    batching_rule: Callable,
) -> Primitive:
    """Registers a primitive with several results.

    Args:
        name: the name in jaxprs.
        shape_rule: abstract operands and parameters to a list of abstract results.
        reference: the specification in jnp; lowered wherever no custom call serves.
        cpu: the native CPU form, written with `jax.ffi.ffi_call`.
        cuda: the CUDA form, likewise; it compiles the kernels when it is traced, that is, at lowering.
        batching_rule: as `jax.interpreters.batching` defines it.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(shape_rule)
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=True))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=True), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(cuda, multiple_results=True), platform="cuda")
    batching.primitive_batchers[primitive] = batching_rule
    return primitive


def map_batch(
    bind: Callable, operands: Sequence[jax.Array], dims: Sequence[int | None]
) -> tuple[list[jax.Array], list[int]]:
    """A batching rule that runs `bind` once per batch element, in sequence."""
    batched = [jnp.moveaxis(operand, dim, 0) for operand, dim in zip(operands, dims, strict=True) if dim is not None]

    def one(elements: Sequence[jax.Array]) -> list[jax.Array]:
        element = iter(elements)
        return bind(*(o if dim is None else next(element) for o, dim in zip(operands, dims, strict=True)))

    outputs = jax.lax.map(one, batched)
    return outputs, [0] * len(outputs)
