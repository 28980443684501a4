"""What programs beside the tests find in processes of their own, which may have other devices than the tests."""

import json
import pathlib
import subprocess
import sys
from typing import Any


def found_by(program: str, test_file: str, *arguments: str) -> Any:
    """The JSON in the last line that a program beside the file of a test prints."""
    path = pathlib.Path(test_file).with_name(program)
    run = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, check=True, timeout=1200)
    return json.loads(run.stdout.splitlines()[-1])
