"""Digests of the machine code of a fixed list of programs, to see which of them a change touches.

python -m benchmarks.machine_code --out before.json          # on the commit before
python -m benchmarks.machine_code --against before.json      # on the commit after; exits 1 where code differs

Needs NVRTC, no card. A digest covers the instructions of each kernel in launch order (ELF sections `.text.*`), not the
kernels' names: renaming a template or a file changes nothing here. Constant banks are part of it.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import struct
import sys
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.measure.models import MODELS

_SMALL = (8, 2, 512, 256)  # experts, top_k, hidden, intermediate: every format has groups for these


def kernels_of(cubin: bytes) -> dict[str, str]:
    """SHA-256 of each kernel's instructions and constants, by section, in the order of the file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]

    def name(section: tuple) -> str:
        start = strings + section[0]
        return cubin[start : cubin.index(b"\0", start)].decode()

    found = {}
    for section in sections:
        if name(section).startswith((".text.", ".nv.constant0.")):
            found[name(section)] = hashlib.sha256(cubin[section[4] : section[4] + section[5]]).hexdigest()[:16]
    return found


def programs() -> Iterator[tuple[str, str, tuple]]:
    """Name, architecture and arguments (format, dtype, sizes, tokens, op) of each program."""
    dtypes = ("bfloat16", "float16")
    for architecture, row, dtype, tokens in itertools.product(("sm_90a", "sm_80"), jmm.FORMATS, dtypes, (1, 16, 512)):
        yield f"{row} {dtype} M{tokens}", architecture, (row, dtype, _SMALL, tokens, "fused_moe")
    for row in jmm.FORMATS:
        yield f"{row} moe_gemm", "sm_90a", (row, "bfloat16", _SMALL, 40, "moe_gemm")
        yield f"{row} float16 M16", "sm_75", (row, "float16", _SMALL, 16, "fused_moe")
    for model, tokens in itertools.product(MODELS.values(), (1, 4, 16, 64, 1024)):
        sizes = (model.num_experts, model.top_k, model.hidden, model.intermediate)
        row = "mxfp4" if "gpt-oss" in model.name else "int4"
        yield f"{model.name} M{tokens}", "sm_90a", (row, "bfloat16", sizes, tokens, "fused_moe")


def sources_of(architecture: str, row: str, dtype: str, sizes: tuple, tokens: int, op: str) -> list[tuple[str, str]]:
    """The translation units of one program, each with the architecture that it is for."""
    experts, top_k, hidden, intermediate = sizes
    found = []

    def recorded(source: str, architecture: str) -> bytes:
        found.append((source, architecture))
        return b"not compiled"

    def weights(k: int, n: int) -> jmm.MarlinWeights:
        dense = jax.ShapeDtypeStruct((experts, k, n), dtype)
        return jax.eval_shape(lambda w: jmm.quantize(w, row), dense)

    x = jax.ShapeDtypeStruct((tokens, hidden), dtype)
    ids = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    router = jax.ShapeDtypeStruct((tokens, top_k), jnp.float32)

    def block(x, gate_up, down, router, ids):
        return jmm.fused_moe(x, gate_up, down, router, ids, implementation="cuda")

    def product(x, gate_up, down, router, ids):
        alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=experts, implementation="cuda")
        return jmm.moe_gemm(
            x, gate_up, alignment, top_k=top_k, topk_weights=router, mul_topk_weights=True, implementation="cuda"
        )

    arguments = (x, weights(hidden, 2 * intermediate), weights(intermediate, hidden), router, ids)
    environment = mock.patch.dict(os.environ, {compiler.ARCHITECTURE_VARIABLE: architecture})
    with environment, mock.patch.object(compiler, "compile_cubin", recorded):
        call = jax.jit(block if op == "fused_moe" else product)
        call.trace(*arguments).lower(lowering_platforms=("cuda",))
    return found


def digests(sources: list[tuple[str, str]]) -> list[str]:
    """What `kernels_of` says of each."""
    return [digest for unit in sources for digest in sorted(kernels_of(compiler.compile_cubin(*unit)).values())]


def main() -> int:
    """Compiles all programs; prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--against", type=pathlib.Path)
    parser.add_argument("--only", default="", help="programs whose name holds this text")
    arguments = parser.parse_args()
    sources = {}
    for name, architecture, options in programs():
        if arguments.only in f"{name} {architecture}":
            sources[f"{name} {architecture}"] = sources_of(architecture, *options)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs beside the interpreter
        found = dict(zip(sources, pool.map(digests, sources.values()), strict=True))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.against:
        return 0
    before = json.loads(arguments.against.read_text())
    compared = {name for name in before.keys() | found.keys() if arguments.only in name}
    differing = [name for name in sorted(compared) if before.get(name) != found.get(name)]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(compared) - len(differing)} of {len(compared)} programs have the same machine code")
    return 1 if differing else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
