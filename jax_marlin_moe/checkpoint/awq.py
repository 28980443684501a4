"""AutoAWQ checkpoints, version "gemm": 4-bit codes packed along N, integer zero points in every group."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jax_marlin_moe.checkpoint.tensors import TensorFolder, check_scales, stack_experts_side_by_side
from jax_marlin_moe.quantize import from_awq
from jax_marlin_moe.weights import MarlinWeights

_CODES_PER_WORD = 8


@dataclasses.dataclass(frozen=True)
class AwqParameters:
    """What the quantisation config says that tensors depend on; `group_size` None means one group over K."""

    group_size: int | None


def parse(config: Mapping[str, Any], source: object) -> AwqParameters:
    """Reads a quantisation config; AutoAWQ's own key names (`w_bit`, `q_group_size`) count as well.

    Raises:
        ValueError: a version, width or zero-point mode that is not supported, naming `source`.
    """
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise ValueError(f"{source}: AWQ version is {version!r}; only 'gemm' files have a layout that can be loaded")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise ValueError(f"{source}: AWQ bits is {bits!r}; it must be 4")
    if not config.get("zero_point", True):
        raise ValueError(f"{source}: AWQ zero_point is false; only files with zero points can be loaded")
    group_size = config.get("group_size", config.get("q_group_size"))
    if not isinstance(group_size, int):
        raise ValueError(f"{source}: AWQ group_size is {group_size!r}; it must be an integer, -1 for one group")
    return AwqParameters(None if group_size == -1 else group_size)


def read_matrix(
    files: TensorFolder, linears: Sequence[Sequence[str]], k: int, n: int, parameters: AwqParameters
) -> MarlinWeights:
    """Reads and packs one matrix of all experts.

    Args:
        files: the checkpoint.
        linears: per expert the modules that stand side by side, each of shape (k, n).
        k: input features.
        n: output features of one module.
        parameters: from `parse`.
    """
    groups = 1 if parameters.group_size is None else -(-k // parameters.group_size)
    words = n // _CODES_PER_WORD
    qweight = stack_experts_side_by_side(files, linears, "qweight", (k, words), ("I32",))
    qzeros = stack_experts_side_by_side(files, linears, "qzeros", (groups, words), ("I32",))
    scales = stack_experts_side_by_side(files, linears, "scales", (groups, n), ("F16", "BF16"))
    check_scales(files, linears, "scales", scales)
    return from_awq(jnp.asarray(qweight), jnp.asarray(qzeros), jnp.asarray(scales))
