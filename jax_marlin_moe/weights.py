"""`MarlinWeights`: the packed weights of all experts of one matrix, as a pytree.

Slices by expert, by column and by row are slices of the leaves: the packing never has to be undone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.layout import TILE_K, TILE_N

# The fields of `MarlinWeights` that are arrays, in the order of its leaves, and those that are static. Whatever lists
# them reads it here.
LEAVES = ("packed", "scales", "zeros", "bias", "input_order", "global_scales")
STATIC = ("format", "group_size", "layout", "row_padding", "column_padding")


@dataclasses.dataclass(frozen=True, repr=False)
class MarlinWeights:
    """E quantised matrices of shape (K, N), K the input dimension.

    Packed tiles are 16 x 64. A matrix that does not consist of whole tiles is padded with zero rows and columns, which
    the ops add to x and remove from their results; `k` and `n` are those of the matrix as it was given. The last group
    of K may be shorter than the others.

    Attributes:
        packed: codes in Marlin order.
        scales: one per group of K and column, columns in Marlin grouped order (also when there is one group), in a
            dtype that the format allows.
        zeros: zero points of formats that store them: int32 words in Marlin order, or floats in the dtype and order of
            the scales.
        bias: float32, logical column order, or None.
        input_order: where groups were sorted at load (act-order): row k of the matrix multiplies
            `x[:, input_order[e, k]]`. None means the identity.
        format: the row of the format registry.
        group_size: rows that share a scale; K where one scale covers all of them.
        layout: "a16", the packing for 16-bit activations; weights packed for another mode are refused. "a16/128" where
            `jax_marlin_moe.sharding.tensor_parallel` has laid columns out for ranks that have 128 each.
        global_scales: float32 factors of each 64 columns, for formats that have them.
        row_padding: zero rows at the end of K.
        column_padding: zero columns at the end of each of as many equal parts as there are entries: one entry for a
            matrix, two for [gate | up]. Empty where nothing is padded.
    """

    packed: Int32[Array, "E K//16 words"]
    scales: Shaped[Array, "E G N"]
    zeros: Shaped[Array, "E G words_or_N"] | None
    bias: Float[Array, "E N"] | None
    input_order: Int32[Array, "E K"] | None
    format: WeightFormat
    group_size: int
    layout: str = "a16"
    global_scales: Float[Array, "E N//64"] | None = None
    row_padding: int = 0
    column_padding: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """One line: what the codes mean, the dtype and shape of each array, and their bytes."""
        return summary(self, format=repr(getattr(self.format, "name", self.format)))

    def __hash__(self) -> int:
        """Refused, since arrays have no hash."""
        refuse_hash(self)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.packed.shape[-3]

    @property
    def padded_k(self) -> int:
        """Rows as packed, a multiple of 16."""
        return self.packed.shape[-2] * TILE_K

    @property
    def padded_n(self) -> int:
        """Columns as packed, a multiple of 64."""
        return self.packed.shape[-1] * self.format.codes_per_word // TILE_K

    @property
    def k(self) -> int:
        """Rows of the logical matrix: the input dimension."""
        return self.padded_k - self.row_padding

    @property
    def n(self) -> int:
        """Columns of the logical matrix: the output dimension."""
        return self.padded_n - sum(self.column_padding)

    @property
    def num_groups(self) -> int:
        """Groups of K that share scales."""
        return self.scales.shape[-2]

    @property
    def rows_per_scale(self) -> int:
        """Rows of the packed matrix under one scale: those of a group, or all of them, padding included."""
        return self.padded_k if self.num_groups == 1 else self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def expert(self, index: int | Int32[Array, ""]) -> "MarlinWeights":
        """The weights of one expert, as a stack of one: a dense quantised linear.

        A traced index is clamped to the experts there are, as those of `jax.lax.dynamic_slice` are.

        Raises:
            IndexError: the index is out of range, and not traced.
            TypeError: the index is no integer.
        """
        if not jnp.issubdtype(getattr(index, "dtype", type(index)), jnp.integer) or getattr(index, "shape", ()) != ():
            raise TypeError(f"index is {index!r}; it must be an integer, or an int32 array of one")
        if not isinstance(index, jax.core.Tracer) and not 0 <= index < self.num_experts:
            raise IndexError(f"index is {index}; it must lie in [0, {self.num_experts})")

        def cut(leaf: Array) -> Array:
            if isinstance(index, int):  # no transfer of the index
                return jax.lax.slice_in_dim(leaf, index, index + 1)
            return jax.lax.dynamic_slice_in_dim(leaf, index, 1)

        return _slice_leaves(self, lambda weights: jax.tree.map(cut, weights))

    def columns(self, start: int, stop: int) -> "MarlinWeights":
        """Output columns [start, stop), multiples of 64: a tensor-parallel shard, or gate or up of a pair.

        Raises:
            ValueError: the range is empty, not of whole tiles or out of range, or the matrix has padded columns.
        """
        if self.column_padding:
            raise ValueError(
                f"column_padding is {self.column_padding}: columns of a padded matrix do not lie in whole tiles; slice "
                "before packing"
            )
        _check_slice("columns", start, stop, self.n, TILE_N, "a packed tile")
        words = TILE_K // self.format.codes_per_word  # packed words per column
        per_zero = self.scales.shape[-1] // self.zeros.shape[-1] if self.zeros is not None else 1

        def cut(leaf: Array | None, columns_per_entry: int) -> Array | None:
            return None if leaf is None else leaf[..., start // columns_per_entry : stop // columns_per_entry]

        return _slice_leaves(
            self,
            lambda weights: dataclasses.replace(
                weights,
                packed=weights.packed[..., words * start : words * stop],
                scales=weights.scales[..., start:stop],
                zeros=cut(weights.zeros, per_zero),
                bias=cut(weights.bias, 1),
                global_scales=cut(weights.global_scales, TILE_N),
            ),
        )

    def rows(self, start: int, stop: int) -> "MarlinWeights":
        """Input rows [start, stop): whole groups (any multiple of 16 where one scale covers all); without the bias.

        Raises:
            ValueError: the range is empty, not of whole groups or out of range, or the rows have an `input_order`,
                which names columns of the whole x.
        """
        if self.input_order is not None:
            raise ValueError("input_order is not None: its rows read x from anywhere, so they have no input slice")
        step = TILE_K if self.num_groups == 1 else self.group_size
        last = stop == self.k  # the end of the matrix may be inside a group
        _check_slice("rows", start, stop, self.k, step, "a group that shares its scales", open_end=True)
        groups = slice(None) if self.num_groups == 1 else slice(start // step, -(-stop // step))
        return _slice_leaves(
            self,
            lambda weights: dataclasses.replace(
                weights,
                packed=weights.packed[..., start // TILE_K : -(-stop // TILE_K), :],
                scales=weights.scales[..., groups, :],
                zeros=None if weights.zeros is None else weights.zeros[..., groups, :],
                bias=None,
                group_size=min(self.group_size, stop - start),
                row_padding=self.row_padding if last else 0,
            ),
        )


jax.tree_util.register_dataclass(MarlinWeights, data_fields=list(LEAVES), meta_fields=list(STATIC))


def refuse_hash(parts: Any) -> NoReturn:
    """Raises TypeError: what says what to do where a compiled function needs the hash of arrays."""
    raise TypeError(
        f"a {type(parts).__name__} holds arrays, which have no hash; pass it to compiled functions as an argument that "
        "is not static, as in jax.jit(lambda layer, x: layer(x))(layer, x)"
    )


def summary(parts: Any, **spelled: str) -> str:
    """One line for a dataclass of arrays: its fields, arrays by dtype and shape, and the bytes of all arrays.

    Fields that have their default value are skipped. Leaves may be anything that a pytree can hold: tracers, shapes,
    specs of a sharding. What is not an array is shown by its own `repr`.

    Args:
        parts: the dataclass.
        **spelled: fields by name that come first, with text in place of their `repr`.
    """
    texts = [f"{name}={text}" for name, text in spelled.items()]
    for field in dataclasses.fields(parts):
        value = getattr(parts, field.name)
        if field.name in spelled or value is None or (not hasattr(value, "shape") and value == field.default):
            continue
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        else:
            text = repr(value)
        texts.append(f"{field.name}={text}")
    leaves = jax.tree.leaves(parts)
    # A size may be symbolic, and no number of bytes then.
    if leaves and all(isinstance(getattr(leaf, "size", None), int) and hasattr(leaf, "dtype") for leaf in leaves):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        texts.append(f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size} bytes")
    return f"{type(parts).__name__}({', '.join(texts)})"


def _slice_leaves(weights: MarlinWeights, cut: Callable[[MarlinWeights], MarlinWeights]) -> MarlinWeights:
    """`cut` of the weights, whose leaves may be `jax.ShapeDtypeStruct`s."""
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights))
    return jax.eval_shape(cut, weights) if abstract else cut(weights)


def as_packed(weights: MarlinWeights) -> MarlinWeights:
    """The matrix that the kernels see: padding included, rows in packed order."""
    return dataclasses.replace(
        weights, input_order=None, group_size=weights.rows_per_scale, row_padding=0, column_padding=()
    )


def drop_column_padding(y: Shaped[Array, "... padded_n"], weights: MarlinWeights) -> Shaped[Array, "... n"]:
    """The logical columns of a product with the packed matrix."""
    if not weights.column_padding:
        return y
    parts = jnp.split(y, len(weights.column_padding), axis=-1)
    return jnp.concatenate(
        [part[..., : part.shape[-1] - padding] for part, padding in zip(parts, weights.column_padding, strict=True)],
        axis=-1,
    )


def pad_columns(values: Shaped[Array, "... n"], weights: MarlinWeights) -> Shaped[Array, "... padded_n"]:
    """Zeros where the packed matrix has padding columns: the inverse of `drop_column_padding`."""
    if not weights.column_padding:
        return values
    parts, padding = len(weights.column_padding), weights.column_padding
    width = weights.padded_n // parts
    starts = [sum(width - columns for columns in padding[:part]) for part in range(1, parts)]
    padded = [
        jnp.pad(part, [(0, 0)] * (values.ndim - 1) + [(0, columns)])
        for part, columns in zip(jnp.split(values, starts, axis=-1), padding, strict=True)
    ]
    return jnp.concatenate(padded, axis=-1)


def pad_rows(x: Shaped[Array, "... k"], weights: MarlinWeights) -> Shaped[Array, "... padded_k"]:
    """Zeros where the packed matrix has padding rows."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, weights.row_padding)]) if weights.row_padding else x


def concatenate_columns(parts: Sequence[MarlinWeights]) -> MarlinWeights:
    """Joins matrices with equal E, K, groups and format side by side: [gate | up].

    Raises:
        TypeError: if their scales have different dtypes.
        ValueError: if the parts disagree in format, shape, grouping, row order or in having a bias.
    """
    first, *rest = parts
    for number, part in enumerate(rest, start=1):
        _check_alike(
            "parts",
            number,
            part,
            first,
            ("format", "layout", "num_experts", "k", "num_groups", "group_size", "row_padding"),
        )
        if first.input_order is not None and not _equal_arrays(first.input_order, part.input_order):
            raise ValueError(
                f"parts[{number}].input_order differs from parts[0].input_order; matrices that read the same "
                "input through different row orders cannot be joined: keep them apart, or requantise"
            )

    def join(name: str) -> Any:  # optional leaves are there in all parts or in none
        leaves = [getattr(part, name) for part in parts]
        return None if leaves[0] is None else jnp.concatenate(leaves, axis=-1)

    padding = [part.column_padding or (0,) for part in parts]
    if any(map(any, padding)) and len({part.padded_n for part in parts}) > 1:
        raise ValueError(f"parts have {[part.n for part in parts]} columns; padded matrices must be equally wide")
    return dataclasses.replace(
        first,
        **{name: join(name) for name in LEAVES if name != "input_order"},
        column_padding=sum(padding, ()) if any(map(any, padding)) else (),
    )


def stack_experts(experts: Sequence[MarlinWeights]) -> MarlinWeights:
    """Stacks along the expert axis.

    Raises:
        TypeError: if the scales of the experts have different dtypes.
        ValueError: if the experts disagree in format, shape, grouping or in having a bias or a row order.
    """
    first, *rest = experts
    for number, part in enumerate(rest, start=1):
        _check_alike(
            "experts", number, part, first, ("format", "layout", "k", "n", "num_groups", "group_size", "column_padding")
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *experts)


def _check_alike(
    what: str, number: int, part: MarlinWeights, first: MarlinWeights, properties: tuple[str, ...]
) -> None:
    for name in properties:
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ValueError(f"{what}[{number}].{name} is {theirs}; it must equal {what}[0].{name} = {ours}")
    if part.scales.dtype != first.scales.dtype:  # joining them would widen both to float32
        raise TypeError(
            f"{what}[{number}].scales has dtype {part.scales.dtype}; it must be {first.scales.dtype}, as in {what}[0]"
        )
    for name in ("bias", "input_order"):
        if (getattr(first, name) is None) != (getattr(part, name) is None):
            raise ValueError(f"{what}[{number}].{name} must be given exactly where {what}[0].{name} is")


def _equal_arrays(a: Array, b: Array | None) -> bool:
    return a is b or (b is not None and (a.shape == b.shape and bool(jnp.array_equal(a, b))))


def _check_slice(what: str, start: int, stop: int, size: int, step: int, unit: str, *, open_end: bool = False) -> None:
    """Both ends must be multiples of `step`, the extent of `unit`; `open_end` lets the range end where `size` does."""
    for end in (start, stop):
        if not isinstance(end, int | np.integer):
            raise TypeError(f"{what} [{start!r}, {stop!r}) must be a range between two ints")
    if not 0 <= start < stop <= size:
        raise ValueError(f"{what} [{start}, {stop}) must be a non-empty range inside [0, {size})")
    for end in (start, stop):
        if end % step and not (open_end and end == size):
            below = end // step * step
            raise ValueError(
                f"{what} [{start}, {stop}) would split {unit}: both ends must be multiples of {step}; the nearest to "
                f"{end} are {below} and {min(below + step, size)}"
            )
