"""The error of every path, format, dtype and group size against float32 of the dequantised weights.

    python -m benchmarks.errors --out errors.json

Shapes of one Qwen3-30B expert (K = 2048, N = 1536; H = 2048, I = 768) with 8 experts, 33 tokens, top 2. The products
are held to the acceptance of FORMATS section 6: relative L2 at most 1e-3 (float16) or 5e-3 (bfloat16), cosine at
least 0.999 for a product and 0.9999 for a block. The exit status says whether all of them kept it.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.record import current_commit, recorded_command
from jax_marlin_moe.formats import FORMATS

_EXPERTS, _TOKENS, _TOP_K, _HIDDEN, _INTERMEDIATE = 8, 33, 2, 2048, 768
_MOST = {"float16": 1e-3, "bfloat16": 5e-3}


def relative_l2_and_cosine(ours: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """In float64; NaN stays NaN."""
    ours, exact = (np.asarray(a, np.float64).ravel() for a in (ours, exact))
    norms = np.linalg.norm(ours) * np.linalg.norm(exact)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact)), float(ours @ exact / norms)


def exact_product(x: np.ndarray, dense: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """x[t] @ W[ids[t, j]] in float64, one row a slot."""
    return np.stack([x[t] @ dense[e] for t in range(len(x)) for e in ids[t]])


def measure(weight_format: str, dtype: str, group_size: int | None, platform: str) -> list[dict]:
    """One row for `moe_gemm` and one for `fused_moe`."""
    rng = np.random.default_rng(1)
    scale_dtype = jnp.dtype(dtype)
    gate_up, down = (
        jmm.quantize(
            jnp.asarray(rng.standard_normal((_EXPERTS, k, n)) / k**0.5, jnp.float32),
            weight_format,
            group_size=group_size,
            scale_dtype=scale_dtype,
        )
        for k, n in ((_HIDDEN, 2 * _INTERMEDIATE), (_INTERMEDIATE, _HIDDEN))
    )
    x = jnp.asarray(rng.standard_normal((_TOKENS, _HIDDEN)), scale_dtype)
    weights, ids = jmm.route(jnp.asarray(rng.standard_normal((_TOKENS, _EXPERTS)), jnp.float32), top_k=_TOP_K)
    alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=_EXPERTS, implementation="xla")
    product = jmm.moe_gemm(x, gate_up, alignment, top_k=_TOP_K, implementation=platform)
    block = jax.jit(lambda *a: jmm.fused_moe(*a, implementation=platform))(x, gate_up, down, weights, ids)

    rows, chosen = np.asarray(x, np.float64), np.asarray(ids)
    first, second = (np.asarray(jmm.dequantize(w), np.float64) for w in (gate_up, down))
    h = exact_product(rows, first, chosen)
    gate, up = h[:, :_INTERMEDIATE], h[:, _INTERMEDIATE:]
    a = gate / (1 + np.exp(-gate)) * up
    y = exact_product(a, second, chosen.reshape(-1, 1)).reshape(_TOKENS, _TOP_K, _HIDDEN)
    exact_block = (y * np.asarray(weights, np.float64)[:, :, None]).sum(1)

    results = []
    for op, ours, exact, least_cosine in (("moe_gemm", product, h, 0.999), ("fused_moe", block, exact_block, 0.9999)):
        error, cosine = relative_l2_and_cosine(np.asarray(ours, np.float64), exact)
        kept = cosine >= least_cosine and (op == "fused_moe" or error <= _MOST[dtype])
        results.append(
            {
                "op": op,
                "format": weight_format,
                "dtype": dtype,
                "group_size": group_size or "channel",
                "platform": platform,
                "rel_l2": error,
                "cosine": cosine,
                "accepted": bool(kept),
            }
        )
    return results


def main() -> None:
    """Runs every combination on this machine's platforms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    platforms = ["cuda" if jax.devices()[0].platform == "gpu" else "cpu"]
    rows = []
    for platform in platforms:
        for weight_format, row in FORMATS.items():
            for dtype in ("float16", "bfloat16"):
                for group_size in (*row.group_sizes, None):
                    for result in measure(weight_format, dtype, group_size, platform):
                        rows.append(result)
                        print(
                            " ".join(
                                f"{value:.2e}" if isinstance(value, float) else str(value) for value in result.values()
                            ),
                            flush=True,
                        )
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
