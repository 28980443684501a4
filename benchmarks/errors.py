"""The error of every path, format, dtype and group size against float64 products with the dequantised weights.

    python -m benchmarks.errors --out errors.json

Shapes of one Qwen3-30B expert (K = 2048, N = 1536; H = 2048, I = 768) with 8 experts, top 2. The native path of the
machine and the reference run on a decode's worth of tokens, CUDA also on a prefill's, for which it has other kernels.
All are held to the acceptance of docs/formats.md, "Numerics": of a product, relative L2 at most 1e-3 (float16) or 5e-3
(bfloat16) and cosine at least 0.999; of a block, every value within 0.05 + 2 %, and cosine at least 0.9999. The exit
status says whether all of them kept it.
"""

import argparse
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.record import current_commit, recorded_command
from jax_marlin_moe.formats import FORMATS, WeightFormat

_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE = 8, 2, 2048, 768
_DECODE_TOKENS, _PREFILL_TOKENS = 33, 1024
_MOST = {"float16": 1e-3, "bfloat16": 5e-3}


def paths() -> tuple[tuple[str, int], ...]:
    """Implementations to measure on this machine, with their tokens."""
    if jax.devices()[0].platform == "gpu":
        return (("cuda", _DECODE_TOKENS), ("cuda", _PREFILL_TOKENS), ("xla", _DECODE_TOKENS))
    return (("cpu", _DECODE_TOKENS), ("xla", _DECODE_TOKENS))


def relative_l2_and_cosine(ours: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """In float64; NaN stays NaN."""
    ours, exact = (np.asarray(a, np.float64).ravel() for a in (ours, exact))
    norms = np.linalg.norm(ours) * np.linalg.norm(exact)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact)), float(ours @ exact / norms)


def exact_product(rows: np.ndarray, dense: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """rows[s] @ dense[experts[s]] in float64."""
    out = np.empty((len(rows), dense.shape[2]))
    for e in np.unique(experts):
        out[experts == e] = rows[experts == e] @ dense[e]
    return out


def measure(row: WeightFormat, dtype: str, group_size: int | None) -> Iterator[dict]:
    """For each path, one row for `moe_gemm` and one for `fused_moe`."""
    rng = np.random.default_rng(1)
    gate_up, down = (
        jmm.quantize(
            jnp.asarray(rng.standard_normal((_EXPERTS, k, n)) / k**0.5, jnp.dtype(dtype)),
            row.name,
            group_size=group_size,
        )
        for k, n in ((_HIDDEN, 2 * _INTERMEDIATE), (_INTERMEDIATE, _HIDDEN))
    )
    first, second = (np.asarray(jmm.dequantize(w), np.float64) for w in (gate_up, down))
    for path, tokens in paths():
        x = jnp.asarray(rng.standard_normal((tokens, _HIDDEN)), jnp.dtype(dtype))
        weights, ids = jmm.route(jnp.asarray(rng.standard_normal((tokens, _EXPERTS)), jnp.float32), top_k=_TOP_K)
        alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=_EXPERTS, implementation="xla")
        product = jmm.moe_gemm(x, gate_up, alignment, top_k=_TOP_K, implementation=path)
        block = jax.jit(lambda *a, path=path: jmm.fused_moe(*a, implementation=path))(x, gate_up, down, weights, ids)

        chosen = np.asarray(ids).reshape(-1)
        h = exact_product(np.asarray(x, np.float64).repeat(_TOP_K, axis=0), first, chosen)
        gate, up = h[:, :_INTERMEDIATE], h[:, _INTERMEDIATE:]
        y = exact_product(gate / (1 + np.exp(-gate)) * up, second, chosen).reshape(tokens, _TOP_K, _HIDDEN)
        exact_block = (y * np.asarray(weights, np.float64)[:, :, None]).sum(1)

        for op, result, exact in (("moe_gemm", product, h), ("fused_moe", block, exact_block)):
            ours = np.asarray(result, np.float64)
            error, cosine = relative_l2_and_cosine(ours, exact)
            if op == "moe_gemm":
                accepted = cosine >= 0.999 and error <= _MOST[dtype]
            else:
                accepted = cosine >= 0.9999 and np.allclose(ours, exact, atol=0.05, rtol=0.02)
            yield {
                "op": op,
                "format": row.name,
                "scales": str(gate_up.scales.dtype),
                "dtype": dtype,
                "group_size": group_size or "channel",
                "path": path,
                "tokens": tokens,
                "rel_l2": error,
                "cosine": cosine,
                "accepted": bool(accepted),
            }


def combinations() -> list[tuple[str, str, int | None]]:
    """Every (format, dtype, group size)."""
    return [
        (row.name, dtype, group_size)
        for row in FORMATS.values()
        for group_size in (*row.group_sizes, *([None] if row.per_channel else []))
        for dtype in _MOST
    ]


def measured(combination: tuple[str, str, int | None]) -> list[dict]:
    """The rows of one combination."""
    name, dtype, group_size = combination
    return list(measure(FORMATS[name], dtype, group_size))


def main() -> None:
    """Runs every combination on this machine's platforms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="that share the combinations, and the card")
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(measured, combinations()):
            for result in results:
                rows.append(result)
                values = (f"{v:.2e}" if isinstance(v, float) else str(v) for v in result.values())
                print(" ".join(values), flush=True)
    document = {
        "device": jax.devices()[0].device_kind,
        "commit": args.commit or current_commit(),
        "command": recorded_command("benchmarks.errors"),
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0 if all(row["accepted"] for row in rows) else 1)


if __name__ == "__main__":
    main()
