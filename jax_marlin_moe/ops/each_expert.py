"""Functions of each expert by itself, over the devices that have them: no weights leave their device.

In plain JAX a loop over experts would have XLA gather what it loops over, and explicit axes refuse it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.division import ROWS, Labels
from jax_marlin_moe.ops.explicit import explicit_mesh, over_explicit_axes
from jax_marlin_moe.ops.partition import over_devices, with_devices


def define_each_expert(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A primitive for `function(dense, **params)`, whose arrays begin with the experts, as `dense` does.

    Args:
        name: of the primitive.
        function: in plain JAX; a loop over experts, for instance. It gets as many as a device has.

    Returns:
        A function of the same arguments, parameters static; it can be batched, and differentiated as the other is.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def leaves_of(dense: jax.Array, **params: Any) -> list[jax.Array]:
        return jax.tree.leaves(function(dense, **params))

    def labels_of(dense: Any, results: Any) -> Labels:
        return Labels(
            operands=[(ROWS, *[None] * (dense.ndim - 1))],
            results=[(ROWS, *[None] * (result.ndim - 1)) for result in results],
            units={ROWS: dense.shape[0]},
            weights=[None],
            wholes={},
        )

    def types_of(dense: Any, **params: Any) -> Any:
        return jax.eval_shape(partial(function, **params), jax.ShapeDtypeStruct(dense.shape, dense.dtype))

    def abstract(dense: Any, **params: Any) -> list[Any]:
        return [replicated_type(dense, one.shape, one.dtype) for one in jax.tree.leaves(types_of(dense, **params))]

    def lowered(platform: str | None) -> Callable[..., Any]:
        def rule(ctx: Any, *values: Any, **params: Any) -> Any:
            named = None if platform is None else with_devices(ctx, platform)
            call: Any = partial(leaves_of, **params)

            def traced(dense: jax.Array) -> list[jax.Array]:
                with jax.named_scope(name):
                    if named is None:
                        return call(dense)
                    labels = labels_of(dense, ctx.avals_out)
                    return over_devices(
                        call, call, ctx.avals_out, [dense], labels, (), op=name, identity=(name, params)
                    )

            return mlir.lower_fun(traced, multiple_results=True)(named or ctx, *values)

        return rule

    def batched(leaves: Any, dims: Any, **params: Any) -> tuple[list[jax.Array], list[int]]:
        dense = jnp.moveaxis(leaves[0], dims[0], 0)
        joined = dense.reshape(math.prod(dense.shape[:2]), *dense.shape[2:])
        found = primitive.bind(joined, **params)
        return [one.reshape(*dense.shape[:2], *one.shape[1:]) for one in found], [0] * len(found)

    def differentiated(primals: Any, tangents: Any, **params: Any) -> tuple[list[Any], list[Any]]:
        found, dots = jax.jvp(partial(leaves_of, **params), primals, tangents)
        known = [jnp.issubdtype(one.dtype, jnp.inexact) for one in found]
        zeros = [ad.Zero(jax.typeof(one).to_tangent_aval()) for one in found]
        return found, [dot if is_float else zero for dot, is_float, zero in zip(dots, known, zeros, strict=True)]

    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowered(None))
    mlir.register_lowering(primitive, lowered("cpu"), platform="cpu")
    mlir.register_lowering(primitive, lowered("cuda"), platform="cuda")
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = differentiated

    def call(dense: jax.Array, **params: Any) -> Any:
        types = types_of(dense, **params)
        mesh = explicit_mesh([dense])
        if mesh is None:
            found = primitive.bind(dense, **params)
        else:
            compute = partial(leaves_of, **params)
            labels = labels_of(dense, jax.tree.leaves(types))
            found = over_explicit_axes(compute, compute, [dense], labels, (), mesh, op=name)
        return jax.tree.unflatten(jax.tree.structure(types), found)

    return call
