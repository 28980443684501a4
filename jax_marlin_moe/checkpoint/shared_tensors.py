"""The shared expert of a layer: found, read as it is stored, and packed like the others where that saves a launch."""

import logging

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_marlin_moe.checkpoint.layer_tensors import LayerTensors
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import read_dense
from jax_marlin_moe.checkpoint.schemes.plain import plain_suffix, read_plain
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.shared_expert import SharedExpert, split_like

_LOGGER = logging.getLogger(__name__)


def read_shared(tensors: LayerTensors) -> SharedExpert | None:
    """The shared expert, packed or dense as the files have it; None where the layer has none.

    Raises:
        ValueError: the config denies or promises it, or a tensor is wrong.
    """
    files, facts, hidden = tensors.files, tensors.facts, tensors.facts.hidden
    module = _module(tensors)
    if module is None:
        return None
    gate_up, down = _linears(tensors, module)
    gate = tensors.kernel(tensors.family.shared_gate, 1, hidden)
    if any(plain_suffix(files, part) is not None for part in (down, *gate_up)):
        return SharedExpert(*_dense_block(tensors, gate_up, down, hidden), gate)
    if facts.shared_scale != 1:
        raise ValueError(
            f"{files.folder}: the shared expert {module} counts {facts.shared_scale} times and is "
            "quantised; such a factor is supported for plain shared experts alone"
        )
    size = facts.shared_size or facts.usual_shared_size
    matrices = tensors.matrices(
        [gate_up],
        [[down]],
        hidden,
        size,
        None,
        biased=False,
        scaled_input="exclude shared experts when the model is quantised with AWQ: they read x as it is",
        activation=facts.shared_activation or facts.activation,
    )
    return SharedExpert(*matrices, gate)


def in_one_launch(tensors: LayerTensors, layer: MoELayer, shared: SharedExpert) -> SharedExpert:
    """The shared expert as experts like the others, where the kernels can then run all of them at once."""
    if layer.shared_activation not in (None, layer.activation):
        reason: str | None = f"its activation is {layer.shared_activation!r}, that of the others {layer.activation!r}"
    else:
        shared, reason = split_like(shared, layer.gate_up, layer.down)
    if reason is not None:
        _LOGGER.info(
            "layer %s of %s: the shared expert is not in the launch of the others: %s",
            tensors.layer,
            tensors.files.folder,
            reason,
        )
    return shared


def _module(tensors: LayerTensors) -> str | None:
    """Where the shared expert's tensors are; raises ValueError where the config denies or promises it."""
    files, facts = tensors.files, tensors.facts
    modules = map(tensors.name, tensors.family.shared)
    module = next((m for m in modules if any(name.startswith(f"{m}.") for name in files.names)), None)
    if module is None and facts.promised is not None:
        key, value = facts.promised
        raise ValueError(
            f"{files.folder} has no tensors {tensors.name(tensors.family.shared[0])}.* of a shared expert; "
            f"{tensors.source} says {key} = {value}"
        )
    if module is not None and facts.denied is not None:
        key, value = facts.denied
        raise ValueError(
            f"{files.folder} has tensors {module}.* of a shared expert; {tensors.source} says {key} = {value}"
        )
    return module


def _linears(tensors: LayerTensors, module: str) -> tuple[list[Linear], Linear]:
    """The linears of gate and up, and of down, of the shared expert, by the first names that the files have."""
    family, files = tensors.family, tensors.files
    found = (
        names
        for names in family.shared_linears
        if any(name.startswith(f"{module}.{names[2]}.") for name in files.names)
    )
    gate, up, down = next(found, family.linears)
    if gate == up:
        gate_up = [Linear(f"{module}.{up}", part=part, parts=2) for part in range(2)]
    else:
        gate_up = [Linear(f"{module}.{name}") for name in (gate, up) if name is not None]
    return gate_up, Linear(f"{module}.{down}")


def _dense_block(tensors: LayerTensors, gate_up: list[Linear], down: Linear, hidden: int) -> tuple[Array, Array]:
    """Both matrices of a shared expert of which a linear is plain; its size is the config's, or that linear's."""
    files, size, scale = tensors.files, tensors.facts.shared_size, tensors.facts.shared_scale
    if size is None:
        plain = next(part for part in (down, *gate_up) if plain_suffix(files, part) is not None)
        name = plain.name(plain_suffix(files, plain) or "")
        shape = files.info(name).shape
        if len(shape) != 2:
            raise files.fault(name, f"has shape {shape}; it must have two dimensions")
        size = shape[plain is down] // plain.parts
    dense = [_dense(tensors, part, hidden, size) for part in gate_up]
    last = _dense(tensors, down, size, hidden)
    last = last if scale == 1 else (last.astype(np.float32) * scale).astype(last.dtype)
    return jnp.asarray(np.concatenate(dense, axis=1)), jnp.array(last, copy=True)


def _dense(tensors: LayerTensors, linear: Linear, k: int, n: int) -> np.ndarray:
    """A linear that stays dense, [k, n], or becomes so; raises ValueError where it holds infinities or NaN."""
    suffix = plain_suffix(tensors.files, linear)
    if suffix is None:
        return read_dense(tensors.files, linear, k, n, tensors.quantization)
    value = read_plain(tensors.files, linear, suffix, k, n)
    if not np.isfinite(value.astype(np.float32, copy=False)).all():
        raise tensors.files.fault(linear.name(suffix), "holds infinities or NaN; every value must be finite")
    return value.T
