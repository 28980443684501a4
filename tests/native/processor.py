"""Which instruction sets this processor runs, as /proc/cpuinfo has it."""

import functools
import pathlib

# Flags that a kernel needs.
FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
}


@functools.cache
def processor_flags() -> set[str]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


def runs(kernel: str) -> bool:
    return FLAGS[kernel] <= processor_flags()
