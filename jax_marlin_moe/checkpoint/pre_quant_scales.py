"""`pre_quant_scale` of AWQ in ModelOpt's files: factors of the columns of a linear's input.

That of gate and up is the layer's `expert_input_scale`, where all experts share it, as ModelOpt exports them. That of
down multiplies the activation's result; where up is a factor of that, it goes into the scales of up's columns, once,
rounded to float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import FLOAT_SCALES, get_format

SUFFIX = ".pre_quant_scale"


def shared_input_scale(files: TensorFolder, experts: Sequence[Sequence[Linear]], k: int) -> jax.Array | None:
    """What multiplies x for all linears of a matrix, in the dtype of the file; None where nothing does.

    Raises:
        ValueError: the linears differ, or a tensor holds something else than positive finite numbers.
    """
    linears = [linear for expert in experts for linear in expert]
    values = _read(files, linears, k)
    if values is None:
        return None
    first, name = values[0], linears[0].name(SUFFIX)
    for linear, value in zip(linears, values, strict=True):
        if not np.array_equal(value, first):
            raise files.fault(
                linear.name(SUFFIX),
                f"differs from {name}; gates and ups of all experts must have one, since they read the same rows of x: "
                "export the model with ModelOpt's export_hf_checkpoint, which averages it over the experts",
            )
    return jnp.asarray(first)


def scales_of_up(
    files: TensorFolder,
    experts: Sequence[Sequence[Linear]],
    size: int,
    weight_format: str,
    activation: str | Activation,
) -> np.ndarray | None:
    """By expert what multiplies the columns of up, float32 [experts, size]; None where nothing does.

    Args:
        files: the checkpoint.
        experts: by expert the linear down, whose input is scaled.
        size: the intermediate size.
        weight_format: of gate and up.
        activation: of the experts.

    Raises:
        ValueError: the factors cannot go into up's scales, or a tensor holds something else than positive finite
            numbers.
    """
    downs = [linear for expert in experts for linear in expert]
    values = _read(files, downs, size)
    if values is None:
        return None
    name = downs[0].name(SUFFIX)
    if not get_activation(activation).passes_factors:
        raise files.fault(
            name,
            f"multiplies the result of the activation {get_activation(activation)!r}, of which up is no factor; it "
            "must be 1: export the model without AWQ",
        )
    if get_format(weight_format).scale != FLOAT_SCALES:
        raise files.fault(
            name,
            f"multiplies the input of the linear, and the scales of up, of format {weight_format}, are not floats and "
            "cannot take it up; it must be 1: export the model as ModelOpt does NVFP4_AWQ, which multiplies it into "
            "up_proj before quantising, or without AWQ",
        )
    return np.stack(values).astype(np.float32)


def refuse_input_scale(files: TensorFolder, linear: Linear, k: int, advice: str) -> None:
    """Raises ValueError where the input of a linear is scaled, and nothing multiplies it."""
    if _read(files, [linear], k) is not None:
        raise files.fault(
            linear.name(SUFFIX),
            f"multiplies the input of the linear (AWQ) and is not 1 throughout; it must be 1: {advice}",
        )


def _read(files: TensorFolder, linears: Sequence[Linear], k: int) -> list[np.ndarray] | None:
    """The factors of each linear, in the dtype of the file; None where there are none, or all are 1."""
    there = [linear for linear in linears if linear.name(SUFFIX) in files]
    values = [_read_one(files, linear, k) for linear in there]
    if all((value == 1).all() for value in values):
        return None
    if len(there) < len(linears):
        missing = next(linear for linear in linears if linear.name(SUFFIX) not in files)
        raise ValueError(
            f"{files.folder} has no tensor {missing.name(SUFFIX)}, although {there[0].name(SUFFIX)} exists"
        )
    files.drop_pages()
    return values


def _read_one(files: TensorFolder, linear: Linear, k: int) -> np.ndarray:
    name = linear.name(SUFFIX)
    shape = files.info(name).shape
    if math.prod(shape) not in (1, k):
        raise files.fault(name, f"has shape {shape}; it must be ({k},)")
    value = np.array(np.broadcast_to(files.read(name, shape, FLOATS).reshape(-1), (k,)))
    if not ((value > 0) & np.isfinite(value.astype(np.float32))).all():
        raise files.fault(name, "holds values that are not positive and finite; every factor must be both")
    return value
