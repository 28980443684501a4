"""Files that are there whole or not at all: written as `NAME.part`, flushed to the disk, then renamed."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

PART = ".part"


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block ends; when it raises, nothing of it is left.

    Raises:
        OSError: it cannot be written; names the file.
    """
    part = path.with_name(path.name + PART)
    try:
        with named_errors(part):
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # otherwise the name may reach the disk before the content
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def named_errors(path: pathlib.Path) -> Iterator[None]:
    """Gives OSErrors of the block the name of the file where they have none: those of `write` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise


def sync_folder(folder: pathlib.Path) -> None:
    """Flushes names to the disk, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on a folder, which the system takes back even from a process that is killed.

    File systems that have no locks let everybody in.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
