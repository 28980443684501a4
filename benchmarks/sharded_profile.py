"""Device time of the kernels of a program, by kind, from a profile that `jax.profiler` has written."""

import pathlib
import re
from collections import defaultdict

from jax.profiler import ProfileData

_KINDS = (
    ("jmm_align", "alignment"),
    ("jmm_count_slots", "alignment"),
    ("jmm_combine", "sums of slots"),
    ("jmm", "products"),
    ("nccl", "collectives"),
)


def kind_of(kernel: str) -> str:
    """What a kernel is, by its name."""
    return next((kind for part, kind in _KINDS if part in kernel.lower()), "xla")


def device_microseconds(folder: str, program: str, blocks: int) -> dict[str, float]:
    """Microseconds of a block on the first card, by kind of kernel, and "idle": of the time from the first to the last.

    Args:
        folder: of the profile.
        program: the name of a recipe.
        blocks: of its chain.

    Returns:
        Nothing where the profile has no kernels of the program.
    """
    module = "jit_chain_" + re.sub(r"\W", "_", program)
    spans: dict[str, float] = defaultdict(float)
    busy: list[tuple[float, float]] = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if plane.name != "/device:GPU:0":
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    if dict(event.stats).get("hlo_module") == module:
                        spans[kind_of(event.name)] += event.duration_ns
                        busy.append((event.start_ns, event.start_ns + event.duration_ns))
    if not busy:
        return {}
    covered, until = 0.0, 0.0
    for start, stop in sorted(busy):
        covered += max(stop - max(start, until), 0.0)
        until = max(until, stop)
    spans["idle"] = until - min(start for start, _ in busy) - covered
    return {kind: float(f"{time / blocks / 1e3:.4g}") for kind, time in sorted(spans.items())}
