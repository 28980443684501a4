"""Exports a decoder as one compiled step and its weights, and runs them where neither Flax nor the model's code is.

python -m examples.export_and_run export path/to/checkpoint exported --capacity 256
python -m examples.export_and_run run exported --tokens 5 17 --new-tokens 16

The folder has `step.bin`, by `jax.export`, and `weights.npz`, the bytes of its arguments. To run it takes JAX and
jax_marlin_moe, which registers the custom calls; a program for CUDA runs on cards of the architecture that it was made
for. A program is code: run only what you trust.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm


def export(model: Any, folder: pathlib.Path, capacity: int) -> int:
    """Writes the step of a decoder for one sequence, and its weights.

    Args:
        model: an `examples.decoder.Decoder`.
        folder: for both files; made if it is missing.
        capacity: tokens of a sequence, which is rounded up as `Cache.empty` does.

    Returns:
        The size of the program in bytes.
    """
    from flax import nnx

    from examples.decoder import Cache

    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    remembered, cache_structure = jax.tree.flatten(Cache.empty(model.sizes, 1, capacity, model.dtype))

    def step(weights: list, remembered: list, token: jax.Array) -> tuple[jax.Array, list]:
        model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
        logits, cache = model(token[None, None], jax.tree.unflatten(cache_structure, remembered))
        return jnp.argmax(logits[0, -1]).astype(jnp.int32), jax.tree.leaves(cache)

    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in jmm.CUSTOM_CALL_TARGETS]
    exported = jax.export.export(jax.jit(step), disabled_checks=allowed)(
        weights, remembered, jax.ShapeDtypeStruct((), jnp.int32)
    )
    program = exported.serialize()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.bin").write_bytes(program)
    np.savez(folder / "weights.npz", *(np.frombuffer(np.asarray(leaf).tobytes(), np.uint8) for leaf in weights))
    return len(program)


def run(folder: pathlib.Path, tokens: list[int], new_tokens: int) -> Iterator[int]:
    """Yields the likeliest tokens behind `tokens`, by what `export` wrote.

    Raises:
        ValueError: there are no tokens, more than the program has room for, or the files do not belong together.
    """
    exported = jax.export.deserialize((folder / "step.bin").read_bytes())
    avals, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    expected, shapes, _ = avals
    capacity = shapes[0].shape[2]
    if not tokens or len(tokens) + new_tokens > capacity:
        raise ValueError(
            f"there are {len(tokens)} tokens and {new_tokens} new ones; the first must not be 0, and both together at "
            f"most {capacity}"
        )
    with np.load(folder / "weights.npz") as stored:
        found = [stored[f"arr_{number}"] for number in range(len(stored.files))]
    sizes = [math.prod(aval.shape) * aval.dtype.itemsize for aval in expected]
    if [len(raw) for raw in found] != sizes:
        raise ValueError(f"{folder / 'weights.npz'} has other arrays than step.bin takes; export both again")
    weights = [jnp.asarray(raw.view(aval.dtype).reshape(aval.shape)) for raw, aval in zip(found, expected, strict=True)]
    remembered = [jnp.zeros(aval.shape, aval.dtype) for aval in shapes]
    step = jax.jit(exported.call, donate_argnums=1)
    for token in tokens:
        chosen, remembered = step(weights, remembered, np.int32(token))
    for number in range(new_tokens):
        yield int(chosen)
        if number + 1 < new_tokens:
            chosen, remembered = step(weights, remembered, chosen)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write the step and the weights of a checkpoint")
    exporting.add_argument("checkpoint", help="folder of a checkpoint, or of the packed form")
    exporting.add_argument("folder", type=pathlib.Path)
    exporting.add_argument("--capacity", type=int, default=256, help="tokens of a sequence, rounded up")
    exporting.add_argument("--quantize", help="format for plain experts, such as int4")
    exporting.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="of the rows")
    running = commands.add_parser("run", help="write the likeliest tokens behind some")
    running.add_argument("folder", type=pathlib.Path)
    running.add_argument("--tokens", type=int, nargs="+", required=True)
    running.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    if options.command == "export":
        from examples.models import load_for

        model = load_for(parser, options.checkpoint, dtype=options.dtype, quantize=options.quantize)
        size = export(model, options.folder, options.capacity)
        print(f"{options.folder}: a step of {size / 1e3:.0f} kB for {jax.default_backend()}")
        return 0
    for token in run(options.folder, options.tokens, options.new_tokens):
        print(token, end=" ", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
