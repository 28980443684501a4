"""Compiles the kernels of named models for an architecture and fills the kernel cache; needs no GPU."""

import argparse
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.checkpoint.whole_files import named_errors
from jax_marlin_moe.cli.console import complain, progress
from jax_marlin_moe.cli.shape_options import positive
from jax_marlin_moe.cuda import cache, compiler
from jax_marlin_moe.formats import FORMATS, WeightFormat, get_format
from jax_marlin_moe.measure.models import DECODE_TOKENS, LAYERS, MODELS, ModelShape
from jax_marlin_moe.ops.implementation import unavailable_reason

_OPS = ("fused_moe", "moe_layer")
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
    parser.add_argument("--ops", nargs="+", default=_OPS, choices=_OPS, metavar="OP",
                        help=f"blocks, layers with the model's router: {', '.join(_OPS)} (default: both)")  # fmt: skip
    parser.add_argument("--router-dtype", choices=["bfloat16", "float16", "float32"],
                        help="of the routers of layers (default: that of x)")  # fmt: skip


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
    router_dtype = jnp.dtype(options.router_dtype or options.dtype)
    before, failures = _count(folder), 0
    for architecture in options.arch:
        for model in options.models:
            shape = MODELS[model].grouped(row, options.group_size)
            for tokens, op in itertools.product(options.tokens, options.ops):
                start = time.perf_counter()
                try:
                    if op == "moe_layer":
                        lower_layer(shape, tokens, architecture, row, dtype, router_dtype)
                    else:
                        lower_block(shape, tokens, architecture, row, dtype)
                    outcome = f"{time.perf_counter() - start:.1f} s"
                except (ValueError, compiler.CompilationError) as error:
                    failures += 1
                    outcome = f"FAILED: {error}"
                progress(f"{architecture:8s} {model:18s} {op:10s} {tokens:6d} tokens  {outcome}")
    kept = _count(folder)
    print(f"{folder}: {kept} programs, {kept - before} of them new")
    if failures:
        complain(f"{failures} programs were not compiled")
        return 1
    return 0 if _can_keep(folder) else 1


def lower_block(shape: ModelShape, tokens: int, architecture: str, row: WeightFormat, dtype: jnp.dtype) -> None:
    """Lowers one expert block for CUDA, which compiles its kernels.

    Args:
        shape: sizes of the layer, and rows of K that share a scale.
        tokens: rows of x.
        architecture: such as "sm_90a".
        row: the weight format.
        dtype: of x and of the scales.

    Raises:
        ValueError: the architecture or the shapes are not supported.
        CompilationError: the compiler refused a kernel.
    """
    gate_up, down = _experts(shape, shape.num_experts, row, dtype, halves=2)
    weights = jax.ShapeDtypeStruct((tokens, shape.top_k), jnp.float32)
    ids = jax.ShapeDtypeStruct((tokens, shape.top_k), jnp.int32)

    def block(*arguments: object) -> jax.Array:
        return jmm.fused_moe(*arguments, implementation="cuda")  # type: ignore[arg-type]

    _lower(architecture, block, _rows(shape, tokens, dtype), gate_up, down, weights, ids)


def lower_layer(
    shape: ModelShape, tokens: int, architecture: str, row: WeightFormat, dtype: jnp.dtype, router_dtype: jnp.dtype
) -> None:
    """Lowers one layer of the model that `shape` is named after, as `lower_block` does its experts.

    Args:
        shape: see there.
        tokens: see there.
        architecture: see there.
        row: see there.
        dtype: of x, of the scales and of the router's bias.
        router_dtype: of the router.

    Raises:
        ValueError: see there.
        CompilationError: see there.
    """
    model, experts = LAYERS[shape.name], shape.num_experts
    halves = get_activation(model.activation).halves
    gate_up, down = _experts(shape, experts, row, dtype, halves=halves, biased=model.biased)
    layer = jmm.MoELayer(
        gate_up,
        down,
        _abstract((shape.hidden, experts), router_dtype),
        model.routing,
        activation=model.activation,
        router_bias=_abstract((experts,), dtype) if model.router_bias else None,
        correction_bias=_abstract((experts,), jnp.float32) if model.correction_bias else None,
        shared=jmm.SharedExpert(*_experts(shape, 1, row, dtype, halves=halves)) if model.shared else None,
    )

    def call(x: jax.Array, layer: jmm.MoELayer) -> jax.Array:
        return layer(x, implementation="cuda")

    _lower(architecture, call, _rows(shape, tokens, dtype), layer)


def _lower(architecture: str, call: Callable[..., jax.Array], *arguments: object) -> None:
    previous = os.environ.get(compiler.ARCHITECTURE_VARIABLE)
    os.environ[compiler.ARCHITECTURE_VARIABLE] = architecture
    try:
        jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    finally:
        if previous is None:
            del os.environ[compiler.ARCHITECTURE_VARIABLE]
        else:
            os.environ[compiler.ARCHITECTURE_VARIABLE] = previous


def _rows(shape: ModelShape, tokens: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((tokens, shape.hidden), dtype)


def _experts(
    shape: ModelShape, experts: int, row: WeightFormat, dtype: jnp.dtype, *, halves: int, biased: bool = False
) -> tuple[jmm.MarlinWeights, jmm.MarlinWeights]:
    """Shapes and dtypes of the packed matrices of that many experts, without data."""
    hidden, inner, group = shape.hidden, shape.intermediate, shape.group_size
    return (
        _weights(experts, hidden, halves * inner, row, group, dtype, biased),
        _weights(experts, inner, hidden, row, group, dtype, biased),
    )


def _weights(
    experts: int, k: int, n: int, row: WeightFormat, group_size: int, dtype: jnp.dtype, biased: bool
) -> jmm.MarlinWeights:
    dense = jax.ShapeDtypeStruct((experts, k, n), dtype)
    packed = jax.eval_shape(lambda values: jmm.quantize(values, row.name, group_size=group_size), dense)
    return dataclasses.replace(packed, bias=_abstract((experts, n), jnp.float32)) if biased else packed


def _abstract(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """An array of which there is only the shape and the dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _can_keep(folder: pathlib.Path) -> bool:
    """Whether kernels can be written into a folder: the cache itself drops those that cannot, silently."""
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
