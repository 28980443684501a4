"""What commands print and where: results on stdout, complaints on stderr; a closed pipe is no error message."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from tabulate import tabulate

from jax_marlin_moe.progress import progress_bar

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signals that end a program of C in the same place


def complain(text: str) -> None:
    """Prints why a command fails, or what it warns of."""
    print(text, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """Prints a line of progress, on which no result depends: it is dropped where it cannot be written."""
    try:
        print(text, flush=True)
    except OSError:
        _discard_output()


@contextlib.contextmanager
def measured_table(what: str, count: int, *headers: str) -> Iterator[Callable[..., None]]:
    """A table whose `count` rows take a while; yields a function that adds a row of texts.

    A terminal shows the progress. The rows are printed when the block ends, also where an error ends it.
    """
    rows: list[tuple[str, ...]] = []
    try:
        with progress_bar(what, count) as bar:

            def add_row(*row: str) -> None:
                rows.append(row)
                bar.update()

            yield add_row
    finally:
        if rows:
            print(tabulate(rows, headers, disable_numparse=True), flush=True)


def escaped(text: str) -> str:
    """A line with escapes in place of what is not printable: names in a file must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def status_of(command: Callable[[], int]) -> int:
    """Runs a command; its exit status, once all that it has printed is written.

    After Ctrl-C it prints one line; where the reader of a pipe has closed it, nothing; where the output cannot be
    written, the reason.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:  # as it is where the descriptor was closed before Python began
                sys.stdout.flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        _discard_output()
        complain(f"cannot write the output: {error.strerror}")
        return 1


def _discard_output() -> None:
    """Drops what is still in the buffer of stdout: Python would try to write it when it exits, and fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
