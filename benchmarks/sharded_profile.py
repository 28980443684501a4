"""Device time of the kernels of programs, by kind, from a profile that `jax.profiler` has written."""

import re
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.kernel_events import kernel_events

_KINDS = (
    ("jmm_align", "alignment"),
    ("jmm_count_slots", "alignment"),
    ("jmm_combine", "sums of slots"),
    ("jmm_pack_share", "sums over cards"),
    ("jmm_add_shares", "sums over cards"),
    ("jmm", "products"),
    ("nccl", "collectives"),
)
Span = tuple[float, float]


def kind_of(kernel: str) -> str:
    """What a kernel is, by its name."""
    return next((kind for part, kind in _KINDS if part in kernel.lower()), "xla")


def module_of(program: str) -> str:
    """What a profile calls a program of this name."""
    return "jit_chain_" + re.sub(r"\W", "_", program)


def block_microseconds(folder: str, programs: Sequence[str], blocks: int) -> dict[str, dict[str, float]]:
    """Microseconds of a block on the first card, by program and kind of kernel; programs without kernels are not there.

    "idle" is what no kernel covers, of the time from the first to the last.

    Args:
        folder: of the profile.
        programs: their names.
        blocks: of a chain.
    """
    names = {module_of(program): program for program in programs}
    spans: dict[str, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for event in kernel_events(folder, device="0"):
        program = names.get(str(dict(event.stats).get("hlo_module")))
        if program is not None:
            spans[program][kind_of(event.name)].append((event.start_ns, event.start_ns + event.duration_ns))
    found = {}
    for program, kinds in spans.items():
        times = {kind: sum(stop - start for start, stop in each) for kind, each in kinds.items()}
        times["idle"] = uncovered([span for each in kinds.values() for span in each])
        found[program] = {kind: float(f"{time / blocks / 1e3:.4g}") for kind, time in sorted(times.items())}
    return found


def uncovered(spans: Sequence[Span]) -> float:
    """What no span covers, of the time from the first one's start to the last one's end."""
    ordered = sorted(spans)
    gaps, until = 0.0, ordered[0][0]
    for start, stop in ordered:
        gaps += max(start - until, 0.0)
        until = max(until, stop)
    return gaps
