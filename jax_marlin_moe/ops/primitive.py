"""How an op becomes a JAX primitive: a shape rule, a reference for every platform, custom calls for some.

The operands of an op are pytrees, `MarlinWeights` among them. The primitive binds their leaves, so that an array that
is absent is no operand at all, and the structure is a parameter.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jax_marlin_moe.operand_types import alike
from jax_marlin_moe.ops.implementation import refuse_named, serves


@dataclasses.dataclass(frozen=True)
class Op:
    """A primitive with several results, and the reference that it stands for.

    Attributes:
        primitive: of the leaves of the operands; parameter `structure` is their tree.
        reference: operands and parameters to the results.
    """

    primitive: Primitive
    reference: Callable

    def __call__(self, *operands: Any, implementation: str | None, **params: Any) -> list[jax.Array]:
        """The results; `implementation` "xla" leaves no trace of the primitive."""
        leaves, structure = jax.tree.flatten(alike(operands))
        if implementation == "xla":
            with jax.named_scope(self.primitive.name):
                return self.reference(*jax.tree.unflatten(structure, leaves), **params)
        return self.primitive.bind(*leaves, structure=structure, implementation=implementation, **params)


def define_op(
    name: str,
    *,
    shape_rule: Callable,
    reference: Callable,
    cpu: Callable,
    cuda: Callable,
    batching_rule: Callable,
) -> Op:
    """Registers a primitive. All rules take the operands as the op does, and its parameters by name.

    Args:
        name: the name in jaxprs and, as a scope, in HLO and profiles.
        shape_rule: abstract operands, alike in all but shape and dtype, to a list of abstract results.
        reference: the specification in jnp; lowered wherever no custom call can serve.
        cpu: the native CPU form, written with `jax.ffi.ffi_call`.
        cuda: the CUDA form, likewise; it compiles the kernels when it is traced, that is, at lowering.
        batching_rule: gets the op, the leaves and their batch dimensions, `structure`, and the parameters; returns
            results and their batch dimensions. The batch is not empty.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    op = Op(primitive, reference)

    def abstract(*leaves, structure, implementation, **params):
        return shape_rule(*jax.tree.unflatten(structure, leaves), **params)

    def lowered(form: Callable, platform: str | None):
        def rule(*leaves, structure, implementation, **params):
            operands = jax.tree.unflatten(structure, leaves)
            with jax.named_scope(name):
                if platform is None:
                    refuse_named(implementation)
                elif serves(platform, implementation):
                    return form(*operands, **params)
                return reference(*operands, **params)

        return mlir.lower_fun(rule, multiple_results=True)

    def batched(leaves, dims, *, structure, **params):
        leaves = alike(leaves)
        pairs = list(zip(leaves, dims, strict=True))
        if next(leaf.shape[dim] for leaf, dim in pairs if dim is not None) == 0:
            elements = [
                jax.ShapeDtypeStruct([n for axis, n in enumerate(leaf.shape) if axis != dim], leaf.dtype)
                for leaf, dim in pairs
            ]
            types = jax.eval_shape(partial(primitive.bind, structure=structure, **params), *elements)
            empty = [jnp.zeros((0, *type_.shape), type_.dtype) for type_ in types]
            return alike((empty, leaves))[0], [0] * len(empty)
        return batching_rule(op, leaves, dims, structure=structure, **params)

    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowered(reference, None))
    mlir.register_lowering(primitive, lowered(cpu, "cpu"), platform="cpu")
    mlir.register_lowering(primitive, lowered(cuda, "cuda"), platform="cuda")
    batching.primitive_batchers[primitive] = batched
    return op


def map_batch(
    op: Op, leaves: Sequence[jax.Array], dims: Sequence[int | None], **params: Any
) -> tuple[list[jax.Array], list[int]]:
    """A batching rule that runs the op once per batch element, in sequence."""
    batched = [jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]

    def one(elements: Sequence[jax.Array]) -> list[jax.Array]:
        element = iter(elements)
        return op.primitive.bind(
            *alike([o if dim is None else next(element) for o, dim in zip(leaves, dims, strict=True)]), **params
        )

    outputs = jax.lax.map(one, batched)
    return outputs, [0] * len(outputs)
