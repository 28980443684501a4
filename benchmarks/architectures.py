"""Runs the kernels of other architectures on this machine's card, as PTX that its driver compiles.

Each architecture's tiles, shared memory and instructions, over a part of the tests that has every op, format, type
and routing once. `python -m benchmarks.architectures` prints a line for each architecture. The driver keeps what it
compiles in CUDA_CACHE_PATH (~/.nv/ComputeCache by default), so a second run is faster.
"""

import argparse
import os
import re
import subprocess
import sys
import time

from cuda.bindings import driver

from jax_marlin_moe.cuda import compiler

ARCHITECTURES = ("compute_75", "compute_80", "compute_86", "compute_89")
TESTS = (
    "tests/ops/test_align.py",
    "tests/test_formats.py::test_blocks_of_real_width",
    "tests/ops/test_moe_gemm.py::test_product",
    "tests/ops/test_moe_gemm.py::test_what_memory_held_before_stays_out",
    "tests/ops/test_repeated_slots.py",
    "tests/ops/test_fused_moe.py::test_block",
    "tests/ops/test_fused_moe.py::test_what_memory_held_before_stays_out",
    "tests/cuda/test_block_tiles.py::test_grouped_slots_give_the_bits_of_aligned_ones",
    "tests/cuda/test_block_tiles.py::test_tiles_of_odd_width",
    "tests/cuda/test_block_tiles.py::test_shares_of_k_that_are_not_alike",
    "tests/cuda/test_values_of_bytes.py",
)


def unreadable_ptx() -> str | None:
    """Why the driver does not read what NVRTC writes, or None where it does."""
    status, version = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"cuDriverGetVersion returned {status}"
    reads, writes = (version // 1000, version % 1000 // 10), compiler.version()
    if reads >= writes:
        return None
    return (
        f"NVRTC {writes[0]}.{writes[1]} writes PTX that a driver of CUDA {reads[0]}.{reads[1]} does not read; install "
        f"nvidia-cuda-nvrtc=={reads[0]}.{reads[1]}.*, or a newer driver"
    )


def main() -> int:
    """Runs the tests for each architecture; 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="virtual architectures")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of pytest-xdist")
    parser.add_argument("-k", dest="keyword", default="", help="of the tests, those that pytest -k selects")
    options = parser.parse_args()
    reason = unreadable_ptx()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    failed = False
    for architecture in options.arch:
        environment = os.environ | {
            compiler.ARCHITECTURE_VARIABLE: architecture,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-q", "-m", "gpu", "-n", str(options.workers)]
        finished = subprocess.run(
            [*command, "--dist", "worksteal", "-r", "fE", "-k", options.keyword, *TESTS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        summary = (finished.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        passed = finished.returncode == 0 and re.search(r"\b[1-9]\d* passed", summary) is not None
        failed |= not passed
        print(f"{architecture:12s} {'right' if passed else 'WRONG'}: {summary}, {time.perf_counter() - start:.0f} s")
        if not passed:
            print(finished.stdout)
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
