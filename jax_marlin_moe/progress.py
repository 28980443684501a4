"""What a terminal shows of long work: a bar on stderr once it has taken a while, and nothing where that is a file."""

from tqdm import tqdm

_AFTER_SECONDS = 2.0


def progress_bar(what: str, total: int) -> tqdm:
    """A bar of a number of steps: `update()` after each, `close()` at the end, or a `with` block around them."""
    return tqdm(desc=what, total=total, delay=_AFTER_SECONDS, disable=None, leave=False)
