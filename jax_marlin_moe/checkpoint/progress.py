"""What a terminal shows of a long load."""

import sys
import time

_AFTER = 2.0  # seconds before a bar appears


class Progress:
    """A line on stderr, once a load has taken a while; nothing where stderr is no terminal."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start, self._shown = time.monotonic(), False
        self._stream = sys.stderr

    def advance(self) -> None:
        """One more of `total` is done."""
        self.done += 1
        if time.monotonic() - self._start < _AFTER or not self._stream.isatty():
            return
        self._shown = True
        filled = 30 * self.done // self.total
        bar = "#" * filled + "." * (30 - filled)
        self._stream.write(f"\r{self.what} [{bar}] {self.done}/{self.total}")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._shown:
            self._stream.write("\n")
