"""What is recorded with every number: the commit that was measured and the command that measured it."""

import subprocess
import sys
from collections.abc import Callable, Sequence

import jax

import jax_marlin_moe as jmm


def recorded_command(module: str) -> str:
    """The command line, less the output's folder and the commit, which are not part of what was measured."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--commit":
            words.append(word.rsplit("/", 1)[-1])
        skip = word == "--commit"
    return " ".join(["python -m", module, *words])


def recorded_run(module: str, commit: str | None, **versions: str) -> dict:
    """What a file of results begins with: the card, the commit (git's by default), the command and the versions."""
    return {
        "card": jax.devices()[0].device_kind,
        "commit": commit or current_commit(),
        "command": recorded_command(module),
        "versions": {"jax": jax.__version__, "jax_marlin_moe": jmm.__version__, **versions},
    }


def with_rows(rows: Sequence[dict], more: Sequence[dict], what: Callable[[dict], tuple]) -> list[dict]:
    """All rows, ordered by `what` each has timed; of two of the same, the later one."""
    found = {what(row): row for row in (*rows, *more)}
    return [found[one] for one in sorted(found)]


def current_commit() -> str:
    """HEAD of the checkout; empty outside of one."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
