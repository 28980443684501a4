"""Stops a program at one of its writes: for files that `whole_files` writes, each write, flush and rename is a step."""

import builtins
import os
from collections.abc import Callable
from typing import Any

from jax_marlin_moe.checkpoint import whole_files


class Steps:
    """Calls `stop` at the step with a number, before it happens; counts them."""

    def __init__(self, number: int, stop: Callable[[], None]) -> None:
        self.number, self.stop, self.count = number, stop, 0

    def patch(self, set_attribute: Callable[[Any, str, Any], None]) -> None:
        """Puts the steps in place by `setattr`, or a fixture's."""
        fsync, replace = os.fsync, os.replace

        def opened(path, mode):
            self.step()
            return _File(builtins.open(path, mode), self)

        set_attribute(whole_files, "open", opened)
        set_attribute(os, "fsync", lambda handle: (self.step(), fsync(handle)))
        set_attribute(os, "replace", lambda old, new: (self.step(), replace(old, new)))

    def step(self) -> None:
        self.count += 1
        if self.count == self.number:
            self.stop()


class _File:
    def __init__(self, file: Any, steps: Steps) -> None:
        self.file, self.steps = file, steps

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.file.flush()
        self.steps.step()
        return self.file.write(data)
