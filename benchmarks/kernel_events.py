"""The kernels of profiles that `jax.profiler` has written, and the time that those of a call take."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.profiler import ProfileData

_PROFILED_CALLS = 3


def kernel_events(folder: str, device: str = "") -> Iterator[Any]:
    """Events of the streams of all cards, or of one, each with its name, start and duration in nanoseconds.

    Args:
        folder: of the profile.
        device: the number of the card; "" for all of them.
    """
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            kind, _, number = plane.name.rpartition(":")
            if kind == "/device:GPU" and device in ("", number):
                yield from (event for line in plane.lines if line.name.startswith("Stream") for event in line.events)


def device_microseconds(call: Callable[[], Any]) -> float:
    """The sum of the times of a call's kernels, by the profiler; 0 where it shows none."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready([call() for _ in range(_PROFILED_CALLS)])
        nanoseconds = sum(event.duration_ns for event in kernel_events(folder))
    return nanoseconds / _PROFILED_CALLS / 1e3
