"""Two processes of `jax.distributed`, as on two hosts: each reads and holds its share, and the sums are right."""

import pathlib
import socket
import subprocess
import sys


def test_two_processes_agree_with_one():
    program = pathlib.Path(__file__).with_name("one_of_two_processes.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, program, address, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=600)
            assert out.splitlines()[-1:] == ["right"], err  # behind what gloo says
    finally:
        for run in runs:
            run.kill()
