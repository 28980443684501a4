"""GPTQ checkpoints, v1 and v2, with or without act-order: 4-bit codes packed along K."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.checkpoint.tensors import TensorFolder, check_scales, stack_experts_side_by_side
from jax_marlin_moe.quantize import from_gptq
from jax_marlin_moe.weights import MarlinWeights

_CODES_PER_WORD = 8


@dataclasses.dataclass(frozen=True)
class GptqParameters:
    """What the quantisation config says that tensors depend on.

    Attributes:
        group_size: rows of K that share a scale, None for one group.
        checkpoint_format: "gptq" (v1, zero points stored less one) or "gptq_v2".
        desc_act: whether groups follow the activations: `g_idx` must then be there.
        overrides: patterns of modules that have a config of their own.
        source: the file that said so.
    """

    group_size: int | None
    checkpoint_format: str
    desc_act: bool
    overrides: tuple[str, ...]
    source: object


def parse(config: Mapping[str, Any], source: object) -> GptqParameters:
    """Reads a quantisation config.

    Raises:
        ValueError: a width, packing or variant that is not supported, naming `source`.
    """
    if config.get("bits") != 4:
        raise ValueError(f"{source}: GPTQ bits is {config.get('bits')!r}; it must be 4")
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"{source}: GPTQ pack_dtype is {config['pack_dtype']!r}; it must be 'int32'")
    if config.get("is_marlin_format"):
        raise ValueError(f"{source}: is_marlin_format is true; only unpermuted GPTQ files can be loaded")
    variant = config.get("checkpoint_format", config.get("format", "gptq"))
    if variant not in ("gptq", "gptq_v2"):
        raise ValueError(f"{source}: GPTQ checkpoint_format is {variant!r}; it must be 'gptq' or 'gptq_v2'")
    group_size = config.get("group_size")
    if not isinstance(group_size, int):
        raise ValueError(f"{source}: GPTQ group_size is {group_size!r}; it must be an integer, -1 for one group")
    # "-:pattern" leaves modules unquantised, which shows in their tensors; anything else changes their format.
    overrides = tuple(rule.removeprefix("+:") for rule in config.get("dynamic") or () if not rule.startswith("-:"))
    return GptqParameters(
        group_size=None if group_size == -1 else group_size,
        checkpoint_format=variant,
        desc_act=bool(config.get("desc_act", False)),
        overrides=overrides,
        source=source,
    )


def read_matrix(
    files: TensorFolder, linears: Sequence[Sequence[str]], k: int, n: int, parameters: GptqParameters
) -> MarlinWeights:
    """Reads and packs one matrix of all experts; biases that are all zero are dropped.

    Args:
        files: the checkpoint.
        linears: per expert the modules that stand side by side, each of shape (k, n).
        k: input features.
        n: output features of one module.
        parameters: from `parse`.
    """
    for pattern in parameters.overrides:
        for module in (module for modules in linears for module in modules):
            if re.match(pattern, module):
                raise ValueError(
                    f"{parameters.source}: dynamic rule {pattern!r} gives {module} a config of its own; experts must "
                    "share one"
                )
    groups = 1 if parameters.group_size is None else -(-k // parameters.group_size)
    shape = (k // _CODES_PER_WORD, n)
    qweight = stack_experts_side_by_side(files, linears, "qweight", shape, ("I32",))
    qzeros = stack_experts_side_by_side(files, linears, "qzeros", (groups, n // _CODES_PER_WORD), ("I32",))
    scales = stack_experts_side_by_side(files, linears, "scales", (groups, n), ("F16", "BF16"))
    check_scales(files, linears, "scales", scales)
    g_idx = _read_groups(files, linears, k, parameters)
    try:
        weights = from_gptq(
            jnp.asarray(qweight),
            jnp.asarray(qzeros),
            jnp.asarray(scales),
            g_idx=None if g_idx is None else jnp.asarray(g_idx),
            checkpoint_format=parameters.checkpoint_format,
        )
    except ValueError as error:
        raise ValueError(f"{files.file_of(f'{linears[0][0]}.qweight')}: {linears[0][0]} and others: {error}") from None
    return dataclasses.replace(weights, bias=_read_bias(files, linears, n))


def _read_groups(
    files: TensorFolder, linears: Sequence[Sequence[str]], k: int, parameters: GptqParameters
) -> np.ndarray | None:
    """The group of each row [experts, K]; None where the files leave it to `k // group_size`."""
    if f"{linears[0][0]}.g_idx" not in files.names and not parameters.desc_act:
        return None
    rows = []
    for first, *others in linears:
        index = files.read(f"{first}.g_idx", (k,), ("I32",))
        for other in others:
            if not np.array_equal(index, files.read(f"{other}.g_idx", (k,), ("I32",))):
                raise ValueError(
                    f"{files.file_of(f'{other}.g_idx')}: tensor {other}.g_idx differs from {first}.g_idx; gate and up "
                    "of an expert must read their input in the same order"
                )
        rows.append(index)
    return np.stack(rows)


def _read_bias(files: TensorFolder, linears: Sequence[Sequence[str]], n: int) -> jnp.ndarray | None:
    # Old AutoGPTQ wrote a zero bias for linears that have none.
    if f"{linears[0][0]}.bias" not in files.names:
        return None
    bias = stack_experts_side_by_side(files, linears, "bias", (n,), ("F16", "BF16", "F32")).astype(np.float32)
    return jnp.asarray(bias) if bias.any() else None
