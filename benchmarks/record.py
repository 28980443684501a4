"""What stands beside every number: the commit that was measured and the command that measured it."""

import subprocess
import sys


def recorded_command(module: str) -> str:
    """The command line, less the output's folder and the commit, which are no part of what was measured."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word != "--commit":
            words.append(word.rsplit("/", 1)[-1])
        skip = word == "--commit"
    return " ".join(["python -m", module, *words])


def current_commit() -> str:
    """HEAD of the checkout; empty outside of one."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
