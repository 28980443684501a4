"""What programs beside the tests find in processes of their own, which may have other devices than the tests."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Container, Sequence
from typing import Any

import pytest
from printed_checks import NOT_ASKED

_TESTS = str(pathlib.Path(__file__).parent)  # whose modules programs in other folders import, too

# Runs the program that its first argument names, as Python itself does, but looks for cycles seldom, which few programs
# have and which takes a twentieth of their time.
_SELDOM = """
import gc, os, runpy, sys
gc.set_threshold(50_000, 20, 20)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def cases_of(checks: Sequence[str], exhaustive: Container[str] = ()) -> list[Any]:
    """Parameters of a test named `check`: those of `exhaustive` are skipped by ordinary runs."""
    return [pytest.param(name, marks=pytest.mark.exhaustive if name in exhaustive else ()) for name in checks]


def checked_by(program: str, request: pytest.FixtureRequest, checks: Sequence[str]) -> dict[str, str | None]:
    """What a program finds of those of its checks that have a case in this run; it must have these checks."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = dict.fromkeys(item.callspec.params["check"] for item in items if "check" in item.callspec.params)
    found = found_by(program, str(request.path), *asked)
    assert list(found) == list(checks), "the test and its program list different checks"
    assert [name for name, result in found.items() if result != NOT_ASKED] == [name for name in checks if name in asked]
    return found


def found_by(program: str, test_file: str, *arguments: str) -> Any:
    """The JSON in the last line that a program beside the file of a test prints."""
    path = pathlib.Path(test_file).with_name(program)
    run = subprocess.run(
        [sys.executable, "-c", _SELDOM, path, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])},
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    return json.loads(run.stdout.splitlines()[-1])


def last_lines_of_two(
    program: str, test_file: str, *arguments: str, environment: dict[str, str] | None = None
) -> list[str]:
    """The last lines that two processes of `jax.distributed` print, as on two hosts.

    They get the coordinator's address, their number and the arguments, and print the line behind what gloo says.
    """
    path = pathlib.Path(test_file).with_name(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _SELDOM, path, address, str(process), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        for process in range(2)
    ]
    lines = []
    try:
        for run in runs:
            out, err = run.communicate(timeout=600)
            assert run.returncode == 0, err
            lines.append(out.splitlines()[-1])
    finally:
        for run in runs:
            run.kill()
    return lines
