"""Prints what a checkpoint holds: its layers of experts, their formats and sizes."""

import argparse

from jax_marlin_moe.checkpoint import packed
from jax_marlin_moe.checkpoint.loading import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("path", help="folder of a checkpoint, or of the packed form")


def run(options: argparse.Namespace) -> int:
    """Prints; returns 1, with the reason, where the folder is no checkpoint."""
    try:
        checkpoint = Checkpoint(options.path)
        if checkpoint.manifest is not None:
            _print_packed(checkpoint.manifest)
        else:
            _print_source(checkpoint)
    except (OSError, ValueError) as error:
        print(f"cannot inspect: {error}")
        return 1
    return 0


def _print_packed(manifest: packed.Manifest) -> None:
    print(f"{manifest.folder}: packed form, version {packed.VERSION}, {len(manifest.layers)} layers")
    for number in manifest.layers:
        entry = manifest.entries[number]
        found = packed.describe(manifest.folder / entry["file"])
        facts = entry["layer"]
        matrices = ", ".join(f"{path} {about['format']}" for path, about in facts["matrices"].items())
        size = sum(size for _, _, size in found.values())
        routing = facts["routing"]
        print(f"layer {number:4d}  {size / 1e6:9.1f} MB  {matrices}; {routing['scoring']} top {routing['top_k']}")


def _print_source(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.quantization
    method = quantization.method or "none"
    print(
        f"{checkpoint.folder}: {checkpoint.config.get('model_type')}, quant_method {method} "
        f"({quantization.source.name})"
    )
    files = checkpoint.files
    for number in checkpoint.layers:
        prefix = checkpoint.prefix(number)
        block = f"{prefix}{checkpoint.family.block}."
        kinds: dict[tuple[str, str], int] = {}
        for name in files.names:
            if name.startswith(block):
                # Numbers of experts are left out, so that equal tensors count together.
                short = ".".join("*" if part.isdigit() else part for part in name.removeprefix(prefix).split("."))
                kind = (short, f"{files.info(name).dtype} {list(files.info(name).shape)}")
                kinds[kind] = kinds.get(kind, 0) + 1
        print(f"layer {number}")
        for (name, described), count in sorted(kinds.items()):
            print(f"  {count:5d} x {name}  {described}")
