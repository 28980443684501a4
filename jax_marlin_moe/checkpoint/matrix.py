"""One matrix of all experts: read, decoded and packed linear by linear into arrays that are there from the start."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.checkpoint.linears import CannotCutError, Cut, Linear
from jax_marlin_moe.checkpoint.pre_quant_scales import refuse_input_scale
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.schemes import find_storage
from jax_marlin_moe.checkpoint.schemes.plain import Target, plain_suffix
from jax_marlin_moe.checkpoint.schemes.storage import Storage
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import assemble, dense_weights, pack_expert
from jax_marlin_moe.weights import MarlinWeights

Experts = Sequence[Sequence[Linear]]  # per expert the linears (k, n) that are side by side


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """One matrix of all experts as it lies in a checkpoint.

    Attributes:
        experts: its linears.
        k: input features.
        n: output features of one linear.
        storage: how all of them are stored, but for those of `plain`.
        orders: per expert the row order that its linears share, None for the natural one.
        plain: how linears are stored that a file has plain among quantised ones; they become what those are.
    """

    experts: Experts
    k: int
    n: int
    storage: Storage
    orders: Sequence[np.ndarray | None]
    plain: Mapping[Linear, Storage] = dataclasses.field(default_factory=dict)

    @property
    def column_orders(self) -> Sequence[np.ndarray | None] | None:
        """Orders for the columns of the matrix before this one, None where they stay as they are."""
        return None if all(order is None for order in self.orders) else self.orders


def find_matrix(
    files: TensorFolder, experts: Experts, k: int, n: int, quantization: Quantization, target: Target | None
) -> StoredMatrix:
    """Finds out how a matrix is stored: bit for bit where it is quantised, else rounded to `target`.

    Raises:
        ValueError: a tensor is missing or wrong, or experts are stored in different ways.
    """
    storage, plain = _shared_storage(files, experts, k, n, quantization, target)
    orders = []
    for linears in experts:
        orders.append(_shared_order(files, storage, [linear for linear in linears if linear not in plain], k))
        files.drop_pages()
    return StoredMatrix(experts, k, n, storage, orders, plain)


def load_matrix(
    files: TensorFolder,
    matrix: StoredMatrix,
    *,
    biased: bool | None,
    column_orders: Sequence[np.ndarray | None] | None = None,
    column_scales: np.ndarray | None = None,
    scaled_input: bool | str = "export the model without AWQ",
    advance: Callable[[], object] = lambda: None,
    members: Sequence[int] | None = None,
    cut: Cut | None = None,
) -> MarlinWeights:
    """Loads one matrix. Beside the result, the host holds the tensors of one linear at a time.

    Args:
        files: the checkpoint.
        matrix: of `find_matrix`.
        biased: whether biases belong to the model; zero ones are dropped where they do not, others refused. None
            leaves them to the caller.
        column_orders: per expert the order of the columns of each of its linears.
        column_scales: float32 [experts, n], what multiplies the columns of the last linear of each; scales of all are
            then float32.
        scaled_input: True where the caller sees to it that the input is multiplied by a `pre_quant_scale`; else what
            is advised where one is not 1.
        advance: called after each expert.
        members: the experts that are loaded, by default all.
        cut: what is loaded of each linear, by default all: whole groups of rows, and columns as `column_orders` has
            them.

    Raises:
        ValueError: a tensor is missing or wrong.
    """
    members = range(len(matrix.experts)) if members is None else members
    experts = [matrix.experts[e] for e in members]
    k, n, storage = matrix.k, matrix.n, matrix.storage
    orders = [matrix.orders[e] for e in members]
    column_orders = None if column_orders is None else [column_orders[e] for e in members]
    column_scales = None if column_scales is None else column_scales[list(members)]
    row = get_format(storage.weight_format)
    buffers, scale_dtype = None, None
    biases = None if biased is None else _read_biases(files, experts, n, biased=biased)
    for e, linears in enumerate(experts):
        order = orders[e]
        columns = None if column_orders is None else column_orders[e]
        for j, linear in enumerate(linears):
            its = matrix.plain.get(linear, storage)
            for suffix in its.ignored:
                files.ignore(linear.name(suffix))
            if not isinstance(scaled_input, bool):
                refuse_input_scale(files, linear, k, scaled_input)
            scales = None
            if column_scales is not None:
                scales = column_scales[e] if linear is linears[-1] else np.ones(n, np.float32)
            part = _read_and_pack(files, its, linear, (k, n), order, columns, cut, scales)
            if scale_dtype is None:
                scale_dtype = part[1].dtype
            elif part[1].dtype != scale_dtype:
                advice = "; plain linears beside quantised ones get that of scale_dtype" if matrix.plain else ""
                raise ValueError(
                    f"{files.folder}: scales of {linear.module} have dtype {part[1].dtype}; they must be "
                    f"{scale_dtype}, as those of {experts[0][0].module}{advice}"
                )
            if buffers is None:
                buffers = jax.tree.map(partial(_buffer, len(experts), len(linears)), part)
            # Work in flight holds its inputs and what it computes with, several times a packed linear.
            buffers = jax.block_until_ready(_store(buffers, part, np.int32(e), np.int32(j)))
        files.drop_pages()
        advance()
    assert buffers is not None
    if cut is not None:
        k, n = cut.rows[1] - cut.rows[0], cut.columns[1] - cut.columns[0]
    if biases is not None and column_scales is not None:
        biases[:, -1] *= column_scales
    if biases is not None and column_orders is not None:
        stacked = [bias if order is None else bias[:, order] for bias, order in zip(biases, column_orders, strict=True)]
        biases = np.stack(stacked)
    if biases is not None and cut is not None:
        biases = biases[..., slice(*cut.columns)]
    return assemble(
        buffers,
        k,
        n,
        row,
        storage.rows_per_group(k),
        name=experts[0][0].module,
        bias=None if biases is None else biases.reshape(len(biases), -1),  # type: ignore[arg-type]
        input_order=None if cut is not None and cut.rows != (0, matrix.k) else _stack_orders(orders, k),
        parts=len(experts[0]),
    )


def read_dense(files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> np.ndarray:
    """The weight [K, N] of one quantised linear, float32: of a router, or beside plain linears."""
    matrix = find_matrix(files, [[linear]], k, n, quantization, None)
    return np.asarray(dense_weights(load_matrix(files, matrix, biased=None))[0])


def _shared_storage(
    files: TensorFolder, experts: Experts, k: int, n: int, quantization: Quantization, target: Target | None
) -> tuple[Storage, Mapping[Linear, Storage]]:
    """The storage that all linears share, and that of plain ones among quantised ones, which become the same.

    Raises:
        ValueError: two linears differ, and no `quantize` could make them alike; names both.
    """
    linears = [linear for expert in experts for linear in expert]
    quantised = [linear for linear in linears if plain_suffix(files, linear) is None] or linears
    first = find_storage(files, quantised[0], k, n, quantization, target)
    for linear in quantised[1:]:
        other = find_storage(files, linear, k, n, quantization, target)
        if other != first:
            raise ValueError(
                f"{files.folder}: {linear.module} is stored as {other}, {quantised[0].module} as {first}; the experts "
                "of a matrix must share one way"
            )
    first = first.of_matrix(files, quantised, k, n)
    plain: dict[Linear, Storage] = {}
    if len(quantised) == len(linears):
        return first, plain
    if target is not None and target.scale_dtype is None and target.weight_format == first.weight_format:
        decoded = jax.eval_shape(partial(first.decode, None), *first.read(files, quantised[0], k, n))
        target = dataclasses.replace(target, scale_dtype=decoded.scales.dtype.name)
    for linear in linears:
        if plain_suffix(files, linear) is None:
            continue
        size = min(first.rows_per_group(k), k)
        found = None if target is None else find_storage(files, linear, k, n, quantization, target)
        if found is None or (found.weight_format, min(found.rows_per_group(k), k)) != (first.weight_format, size):
            asked = "" if found is None else f" (found {found.weight_format}, {found.rows_per_group(k)})"
            raise ValueError(
                f"{files.folder}: {linear.module} is plain, and {quantised[0].module}, of the same matrix, is "
                f"{first.weight_format} in groups of {size}; the linears of a matrix must be alike: to round it to "
                f"that, pass quantize={first.weight_format!r} and group_size={None if size == k else size}{asked}"
            )
        plain[linear] = found
    return first, plain


def _shared_order(files: TensorFolder, storage: Storage, linears: Sequence[Linear], k: int) -> np.ndarray | None:
    if not linears:
        return None
    first, *others = linears
    order = storage.row_order(files, first, k)
    for other in others:
        its = storage.row_order(files, other, k)
        if (its is None) != (order is None) or (
            its is not None and order is not None and not np.array_equal(its, order)
        ):
            raise ValueError(
                f"{files.folder}: the g_idx of {other.module} differs from that of {first.module}; gate and up of an "
                "expert must read their input in the same order"
            )
    return order


def _stack_orders(orders: Sequence[np.ndarray | None], k: int) -> jax.Array | None:
    if all(order is None for order in orders):
        return None
    natural = np.arange(k, dtype=np.int32)
    return jnp.asarray(np.stack([natural if order is None else order for order in orders]))


def _read_and_pack(
    files: TensorFolder,
    storage: Storage,
    linear: Linear,
    size: tuple[int, int],
    order: np.ndarray | None,
    columns: np.ndarray | None,
    cut: Cut | None,
    scales: np.ndarray | None,
) -> Any:
    """The packed leaves of a linear, or of a share of it; of an order, any row of the file may be in a share."""
    k, n = size
    whole = Cut((0, k), (0, n))
    if cut is not None and cut != whole and columns is None and (order is None or cut.rows == whole.rows):
        share = dataclasses.replace(linear, cut=cut, size=size)
        local = storage.cut_to(cut.rows[1] - cut.rows[0], cut.columns[1] - cut.columns[0])
        try:
            tensors = storage.read(files, share, k, n)
        except CannotCutError:
            pass
        else:
            scales = None if scales is None else scales[slice(*cut.columns)]
            return _decode_and_pack(tensors, order, None, scales, storage=local, cut=None)
    return _decode_and_pack(
        storage.read(files, linear, k, n), order, columns, scales, storage=storage, cut=None if cut == whole else cut
    )


@partial(jax.jit, static_argnames=("storage", "cut"))
def _decode_and_pack(tensors: Any, order: Any, columns: Any, scales: Any, *, storage: Storage, cut: Cut | None) -> Any:
    logical = storage.decode(order, *tensors)
    if scales is not None:
        logical = logical._replace(scales=logical.scales.astype(jnp.float32) * scales)
    if columns is not None:
        logical = logical.columns(columns)
    if cut is not None:
        logical = logical.cut(cut.rows, cut.columns, storage.rows_per_group(logical.codes.shape[0]))
    return pack_expert(*logical, get_format(storage.weight_format))


def _buffer(experts: int, parts: int, leaf: jax.Array) -> jax.Array:
    return jnp.empty((experts, *leaf.shape[:-1], parts * leaf.shape[-1]), leaf.dtype)


@partial(jax.jit, donate_argnums=0)
def _store(buffers: Any, part: Any, expert: Any, position: Any) -> Any:
    """Writes the leaves of one linear in place: the packing of [a | b] is that of a beside that of b."""

    def write(buffer: jax.Array, leaf: jax.Array) -> jax.Array:
        zero = jnp.zeros((), expert.dtype)  # a Python 0 would be int64 under x64
        start = (expert, *([zero] * (leaf.ndim - 1)), position * jnp.asarray(leaf.shape[-1], expert.dtype))
        return jax.lax.dynamic_update_slice(buffer, leaf[None], start)

    return jax.tree.map(write, buffers, part)


def _read_biases(files: TensorFolder, experts: Experts, n: int, *, biased: bool) -> np.ndarray | None:
    """float32 [experts, parts, n]; None where there are none, or zeros that the model has no place for."""
    rows: list[np.ndarray | None] = []
    for linears in experts:
        for linear in linears:
            suffix = next((s for s in (".bias", "_bias") if linear.name(s) in files), None)
            if suffix is None:
                rows.append(None)
                continue
            bias = linear.read(files, suffix, (n,), FLOATS).astype(np.float32)
            if not np.isfinite(bias).all():
                raise files.fault(linear.name(suffix), "holds infinities or NaN; every value must be finite")
            if not biased and bias.any():
                raise files.fault(linear.name(suffix), "is not zero; experts of this model have no bias")
            rows.append(bias)
        files.drop_pages()
    if all(row is None for row in rows) or not biased:
        return None
    missing = next(
        (linear for linear, row in zip([x for y in experts for x in y], rows, strict=True) if row is None), None
    )
    if missing is not None:
        raise ValueError(f"{files.folder} has no tensor {missing.module}.bias, although other experts have a bias")
    return np.stack(rows).reshape(len(experts), len(experts[0]), n)  # type: ignore[arg-type]
