"""The command line: `python -m jax_marlin_moe demo | doctor | precompile | convert | inspect`."""

import argparse
import sys
from collections.abc import Sequence

from jax_marlin_moe import convert, demo, doctor, inspect, precompile

_COMMANDS = {"demo": demo, "doctor": doctor, "precompile": precompile, "convert": convert, "inspect": inspect}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_marlin_moe", description="Quantised expert layers for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    return _COMMANDS[options.command].run(options)


if __name__ == "__main__":
    sys.exit(main())
