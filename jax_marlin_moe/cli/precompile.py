"""Compiles the kernels of named layers for an architecture and fills the kernel cache; needs no GPU."""

import argparse
import os
import pathlib
import time

import jax
import jax.numpy as jnp

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint.whole_files import named_errors
from jax_marlin_moe.cli.console import complain, progress
from jax_marlin_moe.cli.shape_options import positive
from jax_marlin_moe.cuda import cache, compiler
from jax_marlin_moe.formats import FORMATS, WeightFormat, get_format
from jax_marlin_moe.measure.models import DECODE_TOKENS, MODELS, ModelShape
from jax_marlin_moe.ops.implementation import unavailable_reason

_PROBE_BYTES = 1 << 20  # more than the kernels of a call have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--arch", nargs="+", type=_architecture, required=True, metavar="ARCH",
                        help="architectures, such as sm_80 sm_90a")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=sorted(MODELS), choices=sorted(MODELS), metavar="MODEL",
                        help=f"from {', '.join(sorted(MODELS))} (default: all)")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=positive, default=list(DECODE_TOKENS), help="rows of x")
    parser.add_argument("--format", default="int4", choices=sorted(FORMATS), help="weight format")
    parser.add_argument(
        "--group-size", type=positive, help="rows that share a scale (default: the model's or the format's)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="type of x and scales")


def _architecture(name: str) -> str:
    """The type of an option: an architecture that the kernels have."""
    try:
        return compiler.checked_architecture("the architecture", name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> int:
    """Lowers every combination; returns 1 if one fails or the cache cannot keep the kernels."""
    reason = unavailable_reason("cuda")
    if reason:
        complain(f"cannot compile: {reason}")
        return 1
    try:
        folder = cache.located()
    except cache.OffError as error:
        complain(f"cannot keep kernels: the kernel cache is off: {error}")
        return 1
    if not _can_keep(folder):
        return 1
    dtype, row = jnp.dtype(options.dtype), get_format(options.format)
    before, failures = _count(folder), 0
    for architecture in options.arch:
        for model in options.models:
            shape = MODELS[model].grouped(row, options.group_size)
            for tokens in options.tokens:
                start = time.perf_counter()
                try:
                    lower(shape, tokens, architecture, row, shape.group_size, dtype)
                    outcome = f"{time.perf_counter() - start:.1f} s"
                except (ValueError, compiler.CompilationError) as error:
                    failures += 1
                    outcome = f"FAILED: {error}"
                progress(f"{architecture:8s} {model:18s} {tokens:6d} tokens  {outcome}")
    kept = _count(folder)
    print(f"{folder}: {kept} programs, {kept - before} of them new")
    if failures:
        complain(f"{failures} programs were not compiled")
        return 1
    return 0 if _can_keep(folder) else 1


def lower(
    shape: ModelShape, tokens: int, architecture: str, row: WeightFormat, group_size: int, dtype: jnp.dtype
) -> None:
    """Lowers one expert block for CUDA, which compiles its kernels.

    Args:
        shape: sizes of the layer.
        tokens: rows of x.
        architecture: such as "sm_90a".
        row: the weight format.
        group_size: rows of K that share a scale.
        dtype: of x and of the scales.

    Raises:
        ValueError: the architecture or the shapes are not supported.
        CompilationError: the compiler refused a kernel.
    """
    gate_up = _weights(shape.num_experts, shape.hidden, 2 * shape.intermediate, row, group_size, dtype)
    down = _weights(shape.num_experts, shape.intermediate, shape.hidden, row, group_size, dtype)
    x = jax.ShapeDtypeStruct((tokens, shape.hidden), dtype)
    weights = jax.ShapeDtypeStruct((tokens, shape.top_k), jnp.float32)
    ids = jax.ShapeDtypeStruct((tokens, shape.top_k), jnp.int32)

    def block(*arguments: object) -> jax.Array:
        return jmm.fused_moe(*arguments, implementation="cuda")  # type: ignore[arg-type]

    previous = os.environ.get(compiler.ARCHITECTURE_VARIABLE)
    os.environ[compiler.ARCHITECTURE_VARIABLE] = architecture
    try:
        jax.jit(block).trace(x, gate_up, down, weights, ids).lower(lowering_platforms=("cuda",))
    finally:
        if previous is None:
            del os.environ[compiler.ARCHITECTURE_VARIABLE]
        else:
            os.environ[compiler.ARCHITECTURE_VARIABLE] = previous


def _weights(experts: int, k: int, n: int, row: WeightFormat, group_size: int, dtype: jnp.dtype) -> jmm.MarlinWeights:
    """Shapes and dtypes of packed experts, without data."""
    dense = jax.ShapeDtypeStruct((experts, k, n), dtype)
    return jax.eval_shape(lambda values: jmm.quantize(values, row.name, group_size=group_size), dense)


def _can_keep(folder: pathlib.Path) -> bool:
    """Whether kernels can be written into a folder: the cache itself drops what cannot, without a word."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        with named_errors(folder):
            cache.write_file(probe, bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        complain(f"cannot keep kernels: {error}; set {cache.ENVIRONMENT_VARIABLE} to a folder that can be written")
        return False
    return True


def _count(folder: pathlib.Path) -> int:
    return len(list(folder.glob("*.cubin")))
