"""Scales of 8-bit activations that calibration has fixed, as files have them: an `input_scale` for each linear."""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import StoredMatrix
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder

_LOGGER = logging.getLogger(__name__)
_SUFFIX = ".input_scale"
# W4AFP8 files have them beside the linears, under these names.
_BESIDE = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def input_scale_name(files: TensorFolder, linear: Linear) -> str:
    """The name of the tensor with the scale of a linear's rows: in the linear's module, or beside it (W4AFP8)."""
    own = linear.name(_SUFFIX)
    expert, _, name = linear.module.rpartition(".")
    beside = f"{expert}.{_BESIDE.get(name, name)}{_SUFFIX}"
    return beside if own not in files and beside in files else own


def read_input_scales(
    files: TensorFolder, gate_up: StoredMatrix, down: StoredMatrix, quantization: Quantization
) -> tuple[jax.Array | None, jax.Array | None]:
    """The scale of x and, by expert, those of the rows between the products; None where the file fixes none.

    x is quantised once for all experts, so the largest of theirs is its scale. Where some linears have no scale, or one
    that is not positive and finite, as experts that calibration never reached, there is none for the matrix, and a
    warning in the log.

    Raises:
        ValueError: a scale has another shape or dtype than one number has.
    """
    first, second = (_of_matrix(files, matrix, quantization) for matrix in (gate_up, down))
    x_scale = None if first is None else jnp.float32(first.max())
    return x_scale, None if second is None else jnp.asarray(second.max(axis=1))


def _of_matrix(files: TensorFolder, matrix: StoredMatrix, quantization: Quantization) -> np.ndarray | None:
    """float32 [experts, linears], None where there are none that can be used."""
    linears = [linear for expert in matrix.experts for linear in expert]
    fixed = [
        linear not in matrix.plain and matrix.storage.fixes_input_scale(linear, quantization) for linear in linears
    ]
    names = [input_scale_name(files, linear) for linear in linears]
    there = [name in files for name in names]
    if _SUFFIX in matrix.storage.ignored:
        for name in names:
            files.ignore(name)
    if not any(there) or not any(fixed):
        return None
    scales = np.zeros(len(linears), np.float32)
    for i, linear in enumerate(linears):
        if fixed[i] and there[i]:
            scales[i] = _read(files, names[i], linear)
    usable = (scales > 0) & np.isfinite(scales)
    if not usable.all():
        name = names[int(np.argmin(usable))]
        _LOGGER.warning(
            "%s is %s: rows have scales of their own with activation_dtype, in place of the file's",
            name,
            "missing" if scales[int(np.argmin(usable))] == 0 and name not in files else "not positive and finite",
        )
        return None
    return scales.reshape(len(matrix.experts), -1)


def _read(files: TensorFolder, name: str, linear: Linear) -> np.float32:
    """The number of a linear: alone in the tensor, or that of its expert in a tensor with one for each expert."""
    shape = files.info(name).shape
    size = int(np.prod(shape))
    if size != 1 and (linear.expert is None or size != linear.num_experts):
        many = "" if linear.expert is None else f", or one number for each of {linear.num_experts} experts"
        raise files.fault(name, f"has shape {shape}; it must be () or (1,), one number{many}")
    values = files.read(name, shape, FLOATS).astype(np.float32).reshape(-1)
    return values[0 if size == 1 else linear.expert or 0]
