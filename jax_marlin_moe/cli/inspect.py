"""Prints what a checkpoint holds: its layers of experts, their formats and sizes."""

import argparse
from collections.abc import Iterator

from jax_marlin_moe.checkpoint import packed_form
from jax_marlin_moe.checkpoint.loading import Checkpoint
from jax_marlin_moe.checkpoint.source import Source
from jax_marlin_moe.cli.console import complain, escaped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("path", help="folder of a checkpoint, or of the packed form")


def run(options: argparse.Namespace) -> int:
    """Prints; returns 1, with the reason, where the folder is not a checkpoint."""
    try:
        if not options.path:
            raise ValueError("path is ''; it must be a folder")
        checkpoint = Checkpoint(options.path)
        contents = checkpoint.contents
        lines = _packed(contents) if isinstance(contents, packed_form.Manifest) else _source(contents)
        while (line := next(lines, None)) is not None:
            print(escaped(line))
    except BrokenPipeError:  # of the output, not of the checkpoint
        raise
    except (OSError, ValueError) as error:
        complain(escaped(f"cannot inspect: {error}"))
        return 1
    return 0


def _packed(manifest: packed_form.Manifest) -> Iterator[str]:
    yield f"{manifest.folder}: packed form, version {manifest.version}, {len(manifest.layers)} layers"
    for number in manifest.layers:
        facts, size = manifest.describe(number)
        matrices = ", ".join(f"{path} {about['format'].name}" for path, about in facts.matrices.items())
        routing = facts.routing
        yield f"layer {number:4d}  {size / 1e6:9.1f} MB  {matrices}; {routing.scoring} top {routing.top_k}"


def _source(checkpoint: Source) -> Iterator[str]:
    quantization = checkpoint.quantization
    method = quantization.method or "none"
    yield (f"{checkpoint.folder}: {checkpoint.model_type}, quant_method {method} ({quantization.source.name})")
    files = checkpoint.files
    for position, module in enumerate(checkpoint.layer_names):
        prefix = f"{module}."
        block = f"{prefix}{checkpoint.family.block}."
        kinds: dict[tuple[str, str], int] = {}
        for name in files.names:
            if name.startswith(block):
                # Without the numbers of experts, so that equal tensors count together.
                short = ".".join("*" if part.isdigit() else part for part in name.removeprefix(prefix).split("."))
                kind = (short, f"{files.info(name).dtype} {list(files.info(name).shape)}")
                kinds[kind] = kinds.get(kind, 0) + 1
        yield f"layer {checkpoint.layers[position] if position < len(checkpoint.layers) else module}"
        for (name, described), count in sorted(kinds.items()):
            yield f"  {count:5d} x {name}  {described}"
