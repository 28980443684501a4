"""Writes the expert layers of a checkpoint in the packed form, which loads without repacking."""

import argparse
import time

from jax_marlin_moe.checkpoint import convert
from jax_marlin_moe.cli.console import INTERRUPTED, complain, escaped, progress
from jax_marlin_moe.formats import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("source", help="folder of the checkpoint")
    parser.add_argument("destination", help="folder to make")
    parser.add_argument(
        "--quantize", choices=sorted(FORMATS), help="format for plain bfloat16, float16 or float32 experts"
    )
    parser.add_argument("--group-size", type=int, help="rows that share a scale (default: the format's; -1: one group)")


def run(options: argparse.Namespace) -> int:
    """Converts; returns 1, with the reason, where the checkpoint is refused or a file cannot be written."""
    size = {None: "customary", -1: None}.get(options.group_size, options.group_size)
    start = time.perf_counter()

    def report(layer: int, written: int) -> None:
        progress(f"layer {layer:4d}  {written / 1e6:9.1f} MB  {time.perf_counter() - start:6.1f} s")

    try:
        convert(options.source, options.destination, quantize=options.quantize, group_size=size, report=report)
    except (OSError, TypeError, ValueError) as error:
        complain(escaped(f"cannot convert: {error}"))
        return 1
    except KeyboardInterrupt:
        complain("interrupted; finished layers are kept, and the same command goes on behind them")
        return INTERRUPTED
    return 0
