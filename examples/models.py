"""Decoders by the model_type of a checkpoint."""

import argparse
import os
from typing import Any

import jax.numpy as jnp

from examples import deepseek_v3, gpt_oss, qwen3_moe
from examples.decoder import Decoder, Reader
from jax_marlin_moe.checkpoint import Checkpoint

SIZES = {"qwen3_moe": qwen3_moe.Sizes, "gpt_oss": gpt_oss.Sizes, "deepseek_v3": deepseek_v3.Sizes}


def load(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16, **options: Any) -> Decoder:
    """A decoder with the weights of a checkpoint: in any of the package's schemes, or a folder that `convert` wrote.

    Args:
        path: as for `jax_marlin_moe.checkpoint.Checkpoint`.
        dtype: of the rows, and of dense weights: float16 or bfloat16.
        **options: `quantize` and its companions, for plain experts.

    Raises:
        ValueError: the model is none of `SIZES`, or its config has something that its decoder does not compute.
    """
    checkpoint = Checkpoint(path, **options)
    found = checkpoint.config.get("model_type")
    if found not in SIZES:
        raise ValueError(f"model_type is {found!r}; there are decoders of {', '.join(map(repr, SIZES))}")
    return Decoder(
        Reader(checkpoint.tensor, checkpoint.linear, dtype),
        lambda number: checkpoint.load(number) if number in checkpoint.layers else None,
        SIZES[found].from_config(checkpoint.config),
    )


def load_for(
    parser: argparse.ArgumentParser, path: str | os.PathLike, *, dtype: str, quantize: str | None = None
) -> Decoder:
    """`load` for a command, which ends with the reason in a line where it fails."""
    try:
        return load(path, dtype=jnp.dtype(dtype), **({"quantize": quantize} if quantize else {}))
    except (OSError, ValueError) as error:
        parser.exit(1, f"cannot load: {error}\n")
