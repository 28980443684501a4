"""The options that name the blocks a command measures: models by name, or one block by its sizes."""

import argparse

import jax

from jax_marlin_moe.cli.console import complain
from jax_marlin_moe.cli.devices import no_device_reason
from jax_marlin_moe.formats import FORMATS, get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.ops.implementation import unavailable_reason

_SIZES = {"experts": "num_experts", "top_k": "top_k", "hidden": "hidden", "intermediate": "intermediate"}


def add_shape_options(parser: argparse.ArgumentParser, tokens: list[int]) -> None:
    """Declares the options; `tokens` is the default of `--tokens`."""
    parser.add_argument("--models", nargs="+", default=[], choices=sorted(MODELS), metavar="MODEL",
                        help=f"from {', '.join(sorted(MODELS))}")  # fmt: skip
    parser.add_argument("--experts", type=int, help="in place of --models: experts of the layer")
    parser.add_argument("--top-k", type=int, help="in place of --models: experts of a token")
    parser.add_argument("--hidden", type=int, help="in place of --models: columns of x")
    parser.add_argument("--intermediate", type=int, help="in place of --models: columns between the products")
    parser.add_argument("--group-size", type=int, help="rows that share a scale (default: the model's or the format's)")
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens, help="rows of x")
    parser.add_argument("--format", default="int4", choices=sorted(FORMATS), help="weight format")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="type of x and scales")


def positive(text: str) -> int:
    """The type of an option: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def chosen_shapes(options: argparse.Namespace) -> list[ModelShape]:
    """The blocks that the options name.

    Raises:
        ValueError: neither models nor all four sizes are given, or both are, or a number is not positive.
    """
    sizes = {field: getattr(options, name) for name, field in _SIZES.items()}
    missing = ["--" + name.replace("_", "-") for name in _SIZES if getattr(options, name) is None]
    if options.models and len(missing) < len(sizes):
        raise ValueError("--models names whole blocks; leave the sizes out, or name a block by its sizes alone")
    if not options.models and missing:
        raise ValueError(f"{', '.join(missing)} missing; give --models, or all four sizes of a block")
    numbers = {**sizes, "group_size": options.group_size, "tokens": min(options.tokens)}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be positive")
    if options.models:
        shapes = [MODELS[name] for name in options.models]
    else:
        if sizes["top_k"] > sizes["num_experts"]:
            raise ValueError(f"--top-k is {sizes['top_k']}; it must not exceed --experts, {sizes['num_experts']}")
        shapes = [ModelShape("block", **sizes)]
    return [shape.grouped(get_format(options.format), options.group_size) for shape in shapes]


def shapes_to_measure(options: argparse.Namespace, action: str) -> tuple[list[ModelShape], int]:
    """The blocks that the options name and status 0; or no blocks and the exit status, once it has printed why.

    Args:
        options: of `add_shape_options`.
        action: what cannot be done then, such as "measure".
    """
    try:
        shapes = chosen_shapes(options)
    except ValueError as error:
        complain(f"cannot {action}: {error}")
        return [], 2
    reason = no_cuda_reason()
    if reason:
        complain(f"cannot {action}: {reason}")
        return [], 1
    return shapes, 0


def no_cuda_reason() -> str | None:
    """Why nothing can be measured on this machine, or None."""
    if no_device_reason("cuda"):
        reason = no_device_reason() or f"JAX finds only {jax.default_backend()}"
        return f"it measures on an NVIDIA GPU, and {reason}; with a card, install jax_marlin_moe[cuda13] (or [cuda12])"
    return unavailable_reason("cuda")
