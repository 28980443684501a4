"""How an op becomes a JAX primitive: a shape rule, a reference for every platform, custom calls for some.

The operands of an op are pytrees, `MarlinWeights` among them. The primitive binds their leaves, so that an array that
is absent is not an operand, and the structure is a parameter. Which form runs a call, and what happens where none
can, is decided here for all ops. So is what a `LayerSlice` among the operands is: for custom calls the whole stack and
an index, for the reference and for derivatives with respect to it an array that is read.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_marlin_moe.layer_slice import read_slices, share_indices, spread_indices
from jax_marlin_moe.no_derivative import NoDerivative, refused_tangents
from jax_marlin_moe.operand_types import alike, vary_alike
from jax_marlin_moe.ops.division import Division, Labels, Part, label
from jax_marlin_moe.ops.explicit import explicit_mesh, over_explicit_axes
from jax_marlin_moe.ops.implementation import becomes_custom_call, refuse_named
from jax_marlin_moe.ops.partition import over_devices, with_devices
from jax_marlin_moe.ops.row_ranges import is_symbolic, over_ranges
from jax_marlin_moe.ops.tangents import flat_cotangents, read_moving


@dataclasses.dataclass(eq=False)
class Op:
    """A primitive with several results, and the reference that specifies it.

    All rules take the operands as the op does, and its parameters by name. The forms `cpu` and `cuda` say only how
    their platform computes the results. Whether they run is decided here: not for `implementation="xla"` (the
    reference, traced in place of the primitive), not on other platforms (the reference), not where the module or the
    compiler is missing (an error if the form was asked for by name or the program is an artefact, else the reference
    and a warning).

    Attributes:
        name: the name in jaxprs and, as a scope and of the custom call, in HLO and profiles.
        shape_rule: abstract operands, alike in all but shape and dtype, to a list of abstract results.
        reference: the specification in jnp, one array or several.
        cpu: the native CPU form, written with `jax_marlin_moe.custom_call`.
        cuda: the CUDA form, likewise; it compiles the kernels when it is traced, that is, at lowering.
        operands: their names; without them, those of the reference's parameters.
        cuda_options: parameters that only `cuda` takes.
        batching_rule: gets the op, the leaves and their batch dimensions, `structure`, and the parameters; returns
            results and their batch dimensions. The batch is not empty. Without it, batched `rows` become one call over
            all of them; where anything else is batched, or a call has an operand of `gathered_with`, each element is a
            call.
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
        primitive: of the leaves of the operands; parameter `structure` is their tree.
    """

    name: str
    _: dataclasses.KW_ONLY
    shape_rule: Callable
    reference: Callable
    cpu: Callable
    cuda: Callable
    operands: Sequence[str] = ()
    cuda_options: Sequence[str] = ()
    batching_rule: Callable | None = None
    jvp: Callable | None = None
    transpose: Callable | None = None
    rows: Sequence[str] = ()
    gathered_with: Sequence[str] = ()
    division: Callable[..., Division] | None = None
    primitive: Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.operands = self.operands or list(inspect.signature(self.reference).parameters)
        primitive = self.primitive = Primitive(self.name)
        primitive.multiple_results = True
        primitive.def_impl(partial(xla.apply_primitive, primitive))
        primitive.def_abstract_eval(self._abstract)
        mlir.register_lowering(primitive, self._lowering(self._specified, None))
        mlir.register_lowering(primitive, self._lowering(self.cpu, "cpu"), platform="cpu")
        mlir.register_lowering(primitive, self._lowering(self.cuda, "cuda"), platform="cuda")
        batching.primitive_batchers[primitive] = self._batched
        ad.primitive_jvps[primitive] = self._differentiated
        ad.primitive_transposes[primitive] = self._transposed

    def __call__(self, *operands: Any, implementation: str | None, **params: Any) -> list[jax.Array]:
        """The results; `implementation` "xla" leaves no trace of the primitive."""
        leaves, structure = jax.tree.flatten(share_indices(operands))
        _check_no_symbolic_shards(self.name, leaves)
        mesh = explicit_mesh(leaves)
        if mesh is not None:
            return self._over_explicit_axes(leaves, structure, mesh, implementation=implementation, **params)
        leaves = alike(leaves)
        if implementation == "xla":
            with jax.named_scope(self.name):
                return self._specified(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)
        return self.primitive.bind(*leaves, structure=structure, implementation=implementation, **params)

    def _over_explicit_axes(self, leaves: Sequence[jax.Array], structure: Any, mesh: Any, **params: Any) -> Any:
        def call(*leaves: jax.Array) -> list[jax.Array]:
            return self(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)

        def share(part: Part, *leaves: jax.Array) -> list[jax.Array]:
            operands = jax.tree.unflatten(structure, leaves)
            return _share(division, partial(self, implementation=params["implementation"]), part, operands, **params)

        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        types = jax.eval_shape(partial(self.primitive.bind, structure=structure, **params), *abstract)
        division, labels = self._divided(jax.tree.unflatten(structure, leaves), types, **params)
        return over_explicit_axes(call, share, leaves, labels, division.summed, mesh, op=self.name)

    def _shared(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that all platforms take."""
        return {key: value for key, value in params.items() if key not in self.cuda_options}

    def _specified(self, *operands: Any, **params: Any) -> list[jax.Array]:
        """The reference of operands and parameters, those that only `cuda` takes among them."""
        results = self.reference(*read_slices(operands), **self._shared(params))
        return list(results) if isinstance(results, (list, tuple)) else [results]

    def _divided(
        self, operands: tuple, types: Any, *, implementation: str | None = None, **params: Any
    ) -> tuple[Division, Labels]:
        """What devices may divide, and how its dimensions are labelled, of operands and the types of results."""
        present = [name for name, operand in zip(self.operands, operands, strict=False) if jax.tree.leaves(operand)]
        related = not set(present).isdisjoint(self.gathered_with)
        none = Division(matrices={}, share=_no_share)
        division = none if self.division is None else self.division(**self._shared(params))
        rows = () if related else self.rows
        return division, label(division, self.operands[: len(operands)], operands, rows, types)

    def _abstract(self, *leaves: Any, structure: Any, implementation: str | None, **params: Any) -> Any:
        return self.shape_rule(*jax.tree.unflatten(structure, leaves), **self._shared(params))

    def _lowering(self, form: Callable, platform: str | None) -> Callable:
        """The lowering of a form for its platform, or, of the reference, for all that have none."""

        def rule(ctx: mlir.LoweringRuleContext, *values: Any, **params: Any) -> Any:
            divisible = self.rows or self.division is not None
            named = with_devices(ctx, platform) if divisible and platform is not None else None
            traced = partial(self._lowered, form, platform, types=ctx.avals_out, divide=named is not None)
            return mlir.lower_fun(traced, multiple_results=True)(named or ctx, *values, **params)

        return rule

    def _lowered(
        self,
        form: Callable,
        platform: str | None,
        *leaves: jax.Array,
        structure: Any,
        implementation: str | None,
        types: Sequence[jax.core.ShapedArray],
        divide: bool,
        **params: Any,
    ) -> list[jax.Array]:
        """What a call becomes on a platform; `divide` says whether the program has several devices to share it."""

        def computed(function: Callable, *leaves: jax.Array, **params: Any) -> list[jax.Array]:
            return function(*spread_indices(jax.tree.unflatten(structure, leaves)), **params)

        with jax.named_scope(self.name):
            if platform is None:
                refuse_named(implementation)
            if platform is None or not becomes_custom_call(platform, implementation):
                return computed(self._specified, *leaves, **params)
            params = params if platform == "cuda" else self._shared(params)
            call = partial(computed, form, **params)
            # A form that is one for all platforms is a composition, whose ops see to it themselves.
            exact = platform == "cuda" and form is not self.cpu
            shapes = *(leaf.shape for leaf in leaves), *(type_.shape for type_ in types)
            if exact and any(map(is_symbolic, shapes)):
                places = [place for place, name in enumerate(self._names(structure)) if name in self.rows]
                return over_ranges(call, leaves, places, types, op=self.name)
            if not divide:
                return call(*leaves)

            def share(part: Part, *leaves: jax.Array) -> list[jax.Array]:
                operands = jax.tree.unflatten(structure, leaves)
                part = dataclasses.replace(part, platform=platform)
                return _share(division, form, part, operands, implementation=implementation, **params)

            division, labels = self._divided(jax.tree.unflatten(structure, leaves), types, **params)
            identity = (self.name, structure, params)
            return over_devices(call, share, types, leaves, labels, division.summed, op=self.name, identity=identity)

    def _names(self, structure: Any) -> list[str]:
        """The operand of each leaf."""
        operands = jax.tree.unflatten(structure, range(structure.num_leaves))
        return [self.operands[path[0].idx] for path, _ in jax.tree.leaves_with_path(operands)]

    def _batched(
        self, leaves: Sequence[jax.Array], dims: Sequence[int | None], *, structure: Any, **params: Any
    ) -> tuple[list[jax.Array], list[int]]:
        leaves = vary_alike(leaves)
        pairs = list(zip(leaves, dims, strict=True))
        if next(leaf.shape[dim] for leaf, dim in pairs if dim is not None) == 0:
            elements = [
                jax.ShapeDtypeStruct([n for axis, n in enumerate(leaf.shape) if axis != dim], leaf.dtype)
                for leaf, dim in pairs
            ]
            types = jax.eval_shape(partial(self.primitive.bind, structure=structure, **params), *elements)
            empty = [jnp.zeros((0, *type_.shape), type_.dtype) for type_ in types]
            return alike((empty, leaves))[0], [0] * len(empty)
        if self.batching_rule is not None:
            return self.batching_rule(self, alike(leaves), dims, structure=structure, **params)
        names = self._names(structure)
        moving = {name for name, dim in zip(names, dims, strict=True) if dim is not None}
        if moving <= set(self.rows) and set(names).isdisjoint(self.gathered_with):
            of_rows = [name in self.rows for name in names]
            return _join_batch(self, leaves, dims, of_rows, structure=structure, **params)
        return map_batch(self, alike(leaves), dims, structure=structure, **params)

    def _differentiated(
        self, primals: Sequence[Any], tangents: Sequence[Any], *, structure: Any, **params: Any
    ) -> tuple[list[jax.Array], list[Any]]:
        moving = [None if isinstance(tangent, ad.Zero) else tangent for tangent in tangents]
        try:
            if self.jvp is None:
                raise NoDerivative(self._no_derivative(structure, moving))
            read = read_moving(*(jax.tree.unflatten(structure, leaves) for leaves in (primals, moving)))
            results, dots = self.jvp(self, *read, **params)
        except NoDerivative as refusal:
            results = self.primitive.bind(*primals, structure=structure, **params)
            return results, refused_tangents(refusal.error, results, [dot for dot in moving if dot is not None])
        pairs = zip(results, dots, strict=True)
        return results, [ad.Zero(jax.typeof(result).to_tangent_aval()) if dot is None else dot for result, dot in pairs]

    def _transposed(self, cotangents: Sequence[Any], *leaves: Any, structure: Any, **params: Any) -> list[Any]:
        if self.transpose is None:
            linear = [leaf if ad.is_undefined_primal(leaf) else None for leaf in leaves]
            raise self._no_derivative(structure, linear)
        present = [None if isinstance(cotangent, ad.Zero) else cotangent for cotangent in cotangents]
        returned = self.transpose(self, present, spread_indices(jax.tree.unflatten(structure, leaves)), **params)
        flat: list[Any] = []
        for value, operand in zip(returned, structure.children(), strict=True):
            flat += [None] * operand.num_leaves if value is None else flat_cotangents(operand, value)
        return flat

    def _no_derivative(self, structure: Any, moving: Sequence[Any]) -> NotImplementedError:
        """The error that names the leaves that are not None."""
        places = jax.tree.leaves_with_path(jax.tree.unflatten(structure, range(len(moving))))
        where = ", ".join(
            self.operands[path[0].idx] + jax.tree_util.keystr(path[1:])
            for (path, _), leaf in zip(places, moving, strict=True)
            if leaf is not None
        )
        return NotImplementedError(
            f"{self.name} cannot be differentiated with respect to {where}: its kernels have no derivative. Pass "
            "implementation='xla' (the reference, which JAX differentiates, slowly), or, where no gradient is needed, "
            f"put jax.lax.stop_gradient around {where} or the result"
        )


def _check_no_symbolic_shards(name: str, leaves: Sequence[jax.Array]) -> None:
    """Raises ValueError for what takes down the process that loads it: symbolic shapes in the body of a `shard_map`."""
    for leaf in leaves:
        if is_symbolic(leaf.shape) and jax.typeof(leaf).sharding.mesh.manual_axes:
            raise ValueError(
                f"{name} has an operand of the symbolic shape {leaf.shape} inside of jax.shard_map, and jaxlib crashes "
                "when it loads such a program: export one for each number of rows"
            )


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
