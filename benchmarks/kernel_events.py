"""The kernels of a profile that `jax.profiler` has written."""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax.profiler import ProfileData


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
