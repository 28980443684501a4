"""How an op becomes a JAX primitive: a shape rule, a reference for every platform, custom calls for some.

The operands of an op are pytrees, `MarlinWeights` among them. The primitive binds their leaves, so that an array that
is absent is not an operand, and the structure is a parameter. Which form runs a call, and what happens where none
can, is decided here for all ops. So is what a `LayerSlice` among the operands is: for custom calls the whole stack and
an index, for the reference and for derivatives with respect to it an array that is read.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_marlin_moe.layer_slice import is_slice, read_slices, share_indices, spread_indices
from jax_marlin_moe.no_derivative import NoDerivative, refused_tangents
from jax_marlin_moe.operand_types import alike, vary_alike
from jax_marlin_moe.ops.division import Division, Labels, Part, label
from jax_marlin_moe.ops.explicit import explicit_mesh, over_explicit_axes
from jax_marlin_moe.ops.implementation import becomes_custom_call, check_implementation, refuse_named
from jax_marlin_moe.ops.partition import over_devices, with_devices
from jax_marlin_moe.ops.row_ranges import is_symbolic, over_ranges


@dataclasses.dataclass(frozen=True)
class Op:
    """A primitive with several results, and the reference that specifies it.

    Attributes:
        primitive: of the leaves of the operands; parameter `structure` is their tree.
        reference: operands and parameters to the list of results.
        divided: what devices may divide, and how its dimensions are labelled, of operands, parameters and the types of
            results.
    """

    primitive: Primitive
    reference: Callable
    divided: Callable[..., tuple[Division, Labels]]

    def __call__(self, *operands: Any, implementation: str | None, **params: Any) -> list[jax.Array]:
        """The results; `implementation` "xla" leaves no trace of the primitive."""
        leaves, structure = jax.tree.flatten(share_indices(operands))
        _check_no_symbolic_shards(self.primitive.name, leaves)
        mesh = explicit_mesh(leaves)
        if mesh is not None:
            return self._over_explicit_axes(leaves, structure, mesh, implementation=implementation, **params)
        leaves = alike(leaves)
        if implementation == "xla":
            with jax.named_scope(self.primitive.name):
                return self.reference(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)
        return self.primitive.bind(*leaves, structure=structure, implementation=implementation, **params)

    def _over_explicit_axes(self, leaves: Sequence[jax.Array], structure: Any, mesh: Any, **params: Any) -> Any:
        def call(*leaves: jax.Array) -> list[jax.Array]:
            return self(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)

        def share(part: Part, *leaves: jax.Array) -> list[jax.Array]:
            operands = jax.tree.unflatten(structure, leaves)
            return _share(division, partial(self, implementation=params["implementation"]), part, operands, **params)

        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        types = jax.eval_shape(partial(self.primitive.bind, structure=structure, **params), *abstract)
        division, labels = self.divided(jax.tree.unflatten(structure, leaves), types, **params)
        return over_explicit_axes(call, share, leaves, labels, division.summed, mesh, op=self.primitive.name)


def _check_no_symbolic_shards(name: str, leaves: Sequence[jax.Array]) -> None:
    """Raises ValueError for what takes down the process that loads it: symbolic shapes in the body of a `shard_map`."""
    for leaf in leaves:
        if is_symbolic(leaf.shape) and jax.typeof(leaf).sharding.mesh.manual_axes:
            raise ValueError(
                f"{name} has an operand of the symbolic shape {leaf.shape} inside of jax.shard_map, and jaxlib crashes "
                "when it loads such a program: export one for each number of rows"
            )


def one_program(*static: str, saved_as: str | None = None) -> Callable[[Callable], Callable]:
    """Decorates what surrounds a primitive: one compiled program where an op is called eagerly, with its constants.

    `implementation` is checked at every call, before anything is traced.

    Args:
        static: names of the static keyword arguments beside `implementation`.
        saved_as: the name of the results for policies of `jax.checkpoint`; None for results that nobody saves.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def of_shared(*operands: Any, **options: Any) -> Any:
            results = function(*spread_indices(operands), **options)
            return results if saved_as is None else checkpoint_name(results, saved_as)

        program = jax.jit(of_shared, static_argnames=(*static, "implementation"), inline=True)

        @wraps(function)
        def checked(*operands: Any, implementation: str | None, **options: Any) -> Any:
            check_implementation(implementation)
            return program(*share_indices(operands), implementation=implementation, **options)

        return checked

    return decorate


def define_op(
    name: str,
    *,
    shape_rule: Callable,
    reference: Callable,
    cpu: Callable,
    cuda: Callable,
    batching_rule: Callable | None = None,
    cuda_options: Sequence[str] = (),
    jvp: Callable | None = None,
    transpose: Callable | None = None,
    rows: Sequence[str] = (),
    gathered_with: Sequence[str] = (),
    division: Callable[..., Division] | None = None,
) -> Op:
    """Registers a primitive. All rules take the operands as the op does, and its parameters by name.

    The forms `cpu` and `cuda` say only how their platform computes the results. Whether they run is decided here: not
    for `implementation="xla"` (the reference, traced in place of the primitive), not on other platforms (the
    reference), not where the module or the compiler is missing (an error if the form was asked for by name or the
    program is an artefact, else the reference and a warning).

    Args:
        name: the name in jaxprs and, as a scope and of the custom call, in HLO and profiles.
        shape_rule: abstract operands, alike in all but shape and dtype, to a list of abstract results.
        reference: the specification in jnp, one array or several; its signature names the operands.
        cpu: the native CPU form, written with `jax_marlin_moe.custom_call`.
        cuda: the CUDA form, likewise; it compiles the kernels when it is traced, that is, at lowering.
        batching_rule: gets the op, the leaves and their batch dimensions, `structure`, and the parameters; returns
            results and their batch dimensions. The batch is not empty. Without it, batched `rows` become one call over
            all of them; where anything else is batched, or a call has an operand of `gathered_with`, each element is a
            call.
        cuda_options: parameters that only `cuda` takes.
        jvp: forward derivatives, `(op, primals, tangents, *, implementation, **params)` to `(results, tangents)`.
            Raises `NoDerivative`, before it computes anything, where there are none: its error is that of their use.
            Primals and tangents are tuples of operands; a leaf without a tangent (integers always) is None among the
            tangents, and so is a result's in the returned list. Called only if there is a tangent. To be
            differentiable in reverse as well, it computes the tangents by an op that is linear in them and has a
            `transpose`; operands of that op beside the tangents are its residuals. Without it, the use of a derivative
            raises NotImplementedError and says what to do.
        transpose: for an op that is linear in some operands, `(op, cotangents, operands, *, implementation, **params)`
            to a tuple like the operands. Cotangents are one per result, None where zero; the leaves in which the op is
            linear are `jax.interpreters.ad.UndefinedPrimal`. The tuple has their cotangents in their places, or None
            in the place of a leaf or of a whole operand. Without it, transposition raises NotImplementedError.
        rows: operands, by their names, whose first dimension is that of rows, or of a fixed number of slots for each,
            as that of all results is, where rows depend on no others. Over the axes of a mesh each device then
            computes the rows that it has, in the forms `cpu` and `cuda`, which get operands of any extents; XLA
            partitions the reference by itself.
        gathered_with: operands that relate rows to each other: rows of calls that have one are neither shared by
            devices nor joined over a batch.
        division: gets the parameters that `shape_rule` gets, and says what else devices may divide: experts, and rows
            and columns of matrices. Without it and without `rows`, XLA gathers all operands on every device.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def shared(params):
        return {key: value for key, value in params.items() if key not in cuda_options}

    def specified(*operands, **params):
        results = reference(*read_slices(operands), **shared(params))
        return list(results) if isinstance(results, (list, tuple)) else [results]

    def divided(operands, types, *, implementation=None, **params):
        present = [name for name, operand in zip(names, operands, strict=False) if jax.tree.leaves(operand)]
        related = not set(present).isdisjoint(gathered_with)
        found = Division(matrices={}, share=_no_share) if division is None else division(**shared(params))
        return found, label(found, names[: len(operands)], operands, () if related else rows, types)

    names = list(inspect.signature(reference).parameters)
    op = Op(primitive, specified, divided)

    def abstract(*leaves, structure, implementation, **params):
        return shape_rule(*jax.tree.unflatten(structure, leaves), **shared(params))

    def lowered(form: Callable, platform: str | None):
        def rule(*leaves, structure, implementation, types, divide, **params):
            def computed(function: Callable, *leaves, **params):
                return function(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)

            with jax.named_scope(name):
                if platform is None:
                    refuse_named(implementation)
                elif becomes_custom_call(platform, implementation):
                    params = params if platform == "cuda" else shared(params)
                    call = partial(computed, form, **params)
                    # A form that is one for all platforms is a composition, whose ops see to it themselves.
                    exact = platform == "cuda" and form is not cpu
                    if exact and any(is_symbolic(array.shape) for array in (*leaves, *types)):
                        operands = [names[operand] for operand in _operands(structure)]
                        places = [place for place, operand in enumerate(operands) if operand in rows]
                        return over_ranges(call, leaves, places, types, op=name)
                    if not divide:
                        return call(*leaves)

                    def share(part, *leaves):
                        operands = jax.tree.unflatten(structure, leaves)
                        part = dataclasses.replace(part, platform=platform)
                        return _share(found, form, part, operands, implementation=implementation, **params)

                    found, labels = divided(jax.tree.unflatten(structure, leaves), types, **params)
                    return over_devices(
                        call, share, types, leaves, labels, found.summed, op=name, identity=(name, structure, params)
                    )
                return computed(specified, *leaves, **params)

        def partitioned(ctx, *values, **params):
            named = with_devices(ctx, platform) if (rows or division) and platform is not None else None
            of_types = partial(rule, types=ctx.avals_out, divide=named is not None)
            return mlir.lower_fun(of_types, multiple_results=True)(named or ctx, *values, **params)

        return partitioned

    def batched(leaves, dims, *, structure, **params):
        leaves = vary_alike(leaves)
        pairs = list(zip(leaves, dims, strict=True))
        if next(leaf.shape[dim] for leaf, dim in pairs if dim is not None) == 0:
            elements = [
                jax.ShapeDtypeStruct([n for axis, n in enumerate(leaf.shape) if axis != dim], leaf.dtype)
                for leaf, dim in pairs
            ]
            types = jax.eval_shape(partial(primitive.bind, structure=structure, **params), *elements)
            empty = [jnp.zeros((0, *type_.shape), type_.dtype) for type_ in types]
            return alike((empty, leaves))[0], [0] * len(empty)
        if batching_rule is not None:
            return batching_rule(op, alike(leaves), dims, structure=structure, **params)
        operands = [names[operand] for operand in _operands(structure)]
        moving = {name for name, dim in zip(operands, dims, strict=True) if dim is not None}
        if moving <= set(rows) and set(operands).isdisjoint(gathered_with):
            of_rows = [name in rows for name in operands]
            return _join_batch(op, leaves, dims, of_rows, structure=structure, **params)
        return map_batch(op, alike(leaves), dims, structure=structure, **params)

    def differentiated(primals, tangents, *, structure, **params):
        moving = [None if isinstance(tangent, ad.Zero) else tangent for tangent in tangents]
        try:
            if jvp is None:
                raise NoDerivative(NotImplementedError(_no_derivative(name, _places(reference, structure, moving))))
            read = read_moving(*(jax.tree.unflatten(structure, leaves) for leaves in (primals, moving)))
            results, dots = jvp(op, *read, **params)
        except NoDerivative as refusal:
            results = primitive.bind(*primals, structure=structure, **params)
            return results, refused_tangents(refusal.error, results, [dot for dot in moving if dot is not None])
        pairs = zip(results, dots, strict=True)
        return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) if dot is None else dot for result, dot in pairs]

    def transposed(cotangents, *leaves, structure, **params):
        linear = [leaf if ad.is_undefined_primal(leaf) else None for leaf in leaves]
        if transpose is None:
            raise NotImplementedError(_no_derivative(name, _places(reference, structure, linear)))
        present = [None if isinstance(cotangent, ad.Zero) else cotangent for cotangent in cotangents]
        returned = transpose(op, present, spread_indices(jax.tree.unflatten(structure, leaves)), **params)
        flat = []
        for value, operand in zip(returned, structure.children(), strict=True):
            flat += [None] * operand.num_leaves if value is None else _flat_cotangents(operand, value)
        return flat

    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowered(specified, None))
    mlir.register_lowering(primitive, lowered(cpu, "cpu"), platform="cpu")
    mlir.register_lowering(primitive, lowered(cuda, "cuda"), platform="cuda")
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = differentiated
    ad.primitive_transposes[primitive] = transposed
    return op


def jvp_of(function: Callable, operands: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """`jax.jvp` of a function of pytrees whose tangents have None in the places of leaves that do not move.

    Slices of stacks do not: those that have tangents have been read.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(tuple(operands), is_leaf=is_slice)
    moving = structure.flatten_up_to(tuple(tangents))
    places = [place for place, tangent in enumerate(moving) if tangent is not None]

    def of_moving(*values: jax.Array) -> Any:
        filled = dict(zip(places, values, strict=True))
        return function(*jax.tree.unflatten(structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, [leaves[place] for place in places], [moving[place] for place in places])


def read_moving(operands: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Operands and tangents with arrays in place of slices that have a tangent; that of other slices is None."""
    structure: Any
    nodes, structure = jax.tree.flatten(spread_indices(operands), is_leaf=is_slice)
    dots = structure.flatten_up_to(tangents)
    for place, node in enumerate(nodes):
        if is_slice(node):
            moves = dots[place].stack is not None
            dots[place] = dataclasses.replace(node, stack=dots[place].stack).read() if moves else None
            nodes[place] = node.read() if moves else node
    return jax.tree.unflatten(structure, nodes), jax.tree.unflatten(structure, dots)


def _flat_cotangents(structure: Any, cotangents: Any) -> list[Any]:
    """Those of the leaves of an operand; slices, in which no op is linear, have none."""
    operand = jax.tree.unflatten(structure, range(structure.num_leaves))
    nodes_structure: Any
    nodes, nodes_structure = jax.tree.flatten(operand, is_leaf=is_slice)
    found = []
    for node, value in zip(nodes, nodes_structure.flatten_up_to(cotangents), strict=True):
        found += [None] * len(jax.tree.leaves(node)) if is_slice(node) else [value]
    return found


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


def _join_batch(
    op: Op,
    leaves: Sequence[jax.Array],
    dims: Sequence[int | None],
    of_rows: Sequence[bool],
    *,
    structure: Any,
    **params: Any,
) -> tuple[list[jax.Array], list[int]]:
    """A batching rule for leaves of rows, the only batched ones: one call over the rows of all elements."""
    batch = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)

    def flat(leaf: jax.Array, dim: int | None) -> jax.Array:
        leaf = jnp.broadcast_to(leaf, (batch, *leaf.shape)) if dim is None else jnp.moveaxis(leaf, dim, 0)
        return leaf.reshape(batch * leaf.shape[1], *leaf.shape[2:])

    places = zip(leaves, dims, of_rows, strict=True)
    joined = [flat(leaf, dim) if has_rows else leaf for leaf, dim, has_rows in places]
    results = op(*jax.tree.unflatten(structure, joined), **params)
    return [y.reshape(batch, y.shape[0] // batch, *y.shape[1:]) for y in results], [0] * len(results)


def _share(
    division: Division, form: Callable, part: Part, operands: tuple, *, implementation: str | None, **params: Any
) -> list[jax.Array]:
    """What one device adds to the results of an op."""

    def call(*operands: Any, **changed: Any) -> list[jax.Array]:
        return form(*operands, **(params | changed))

    return division.share(call, part, *spread_indices(operands), implementation=implementation, **params)


def _no_share(*_: Any, **__: Any) -> list[jax.Array]:
    raise AssertionError("an op without matrices has no sums over devices")


def _operands(structure: Any) -> list[int]:
    """The operand of each leaf."""
    operands = jax.tree.unflatten(structure, range(structure.num_leaves))
    return [path[0].idx for path, _ in jax.tree.leaves_with_path(operands)]


def _places(reference: Callable, structure: Any, leaves: Sequence[Any]) -> list[str]:
    """The names of the leaves that are not None, as those of the op's operands."""
    names = list(inspect.signature(reference).parameters)
    found = zip(jax.tree.leaves_with_path(jax.tree.unflatten(structure, range(len(leaves)))), leaves, strict=True)
    return [names[path[0].idx] + jax.tree_util.keystr(path[1:]) for (path, _), leaf in found if leaf is not None]


def _no_derivative(name: str, places: Sequence[str]) -> str:
    where = ", ".join(places)
    return (
        f"{name} cannot be differentiated with respect to {where}: its kernels have no derivative. Pass "
        "implementation='xla' (the reference, which JAX differentiates, slowly), or, where no gradient is needed, put "
        f"jax.lax.stop_gradient around {where} or the result"
    )
