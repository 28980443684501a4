"""Decoders by the model_type of a checkpoint."""

import argparse
import os
from typing import Any

import jax.numpy as jnp

from examples import deepseek_v3, gpt_oss, qwen3_moe
from examples.decoder import Decoder, Reader
from jax_marlin_moe.checkpoint import Checkpoint

SIZES = {"qwen3_moe": qwen3_moe.Sizes, "gpt_oss": gpt_oss.Sizes, "deepseek_v3": deepseek_v3.Sizes}


def load(
    path: str | os.PathLike, *, dtype: Any = jnp.bfloat16, activation_dtype: str | None = None, **options: Any
) -> Decoder:
    """A decoder with the weights of a checkpoint: in any of the package's schemes, or a folder that `convert` wrote.

    Args:
        path: as for `jax_marlin_moe.checkpoint.Checkpoint`.
        dtype: of the rows, and of dense weights: float16 or bfloat16.
        activation_dtype: what the rows of experts are quantised to, as for `MarlinMoE`; "checkpoint" for what the
            config says, layer by layer.
        **options: `quantize` and its companions, for plain experts.

    Raises:
        ValueError: the model is none of `SIZES`, or its config has something that its decoder does not compute.
    """
    checkpoint = Checkpoint(path, **options)
    found = checkpoint.config.get("model_type")
    if found not in SIZES:
        raise ValueError(f"model_type is {found!r}; there are decoders of {', '.join(map(repr, SIZES))}")
    decoder = Decoder(
        Reader(checkpoint.tensor, checkpoint.linear, dtype),
        lambda number: checkpoint.load(number) if number in checkpoint.layers else None,
        SIZES[found].from_config(checkpoint.config),
    )
    for number in checkpoint.layers if activation_dtype is not None else ():
        stated = checkpoint.activation_dtype(number) if activation_dtype == "checkpoint" else activation_dtype
        decoder.blocks[number].experts.activation_dtype = stated
    return decoder


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of `load_for`, to a command."""
    parser.add_argument("--quantize", help="format for plain experts, such as int4")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="of the rows")
    parser.add_argument(
        "--activation-dtype", choices=["checkpoint", "int8", "float8_e4m3fn", "float8_e4m3fn_g128"],
        help="what the rows of experts are quantised to; checkpoint: what its config says",
    )  # fmt: skip


def load_for(
    parser: argparse.ArgumentParser,
    path: str | os.PathLike,
    *,
    dtype: str,
    quantize: str | None = None,
    activation_dtype: str | None = None,
) -> Decoder:
    """`load` for a command, which ends with the reason in a line where it fails."""
    try:
        return load(path, dtype=jnp.dtype(dtype), quantize=quantize, activation_dtype=activation_dtype)
    except (OSError, ValueError) as error:
        parser.exit(1, f"cannot load: {error}\n")
