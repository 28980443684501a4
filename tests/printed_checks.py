"""What programs beside the tests print of their checks: JSON that `other_process.py` reads. Imports nothing slow."""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

NOT_ASKED = "not asked for"  # of a check that the program's arguments do not name


def print_failures(checks: Mapping[str, Callable[[], Any] | tuple]) -> None:
    """Runs the checks that the arguments name, by default all; prints None or a traceback of each.

    Args:
        checks: by name, a function, or a function and its arguments.
    """
    found: dict[str, str | None] = {}
    for name, check in checks.items():
        if len(sys.argv) > 1 and name not in sys.argv:
            found[name] = NOT_ASKED
            continue
        function, *arguments = check if isinstance(check, tuple) else (check,)
        try:
            function(*arguments)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
