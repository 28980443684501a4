"""The command line: `python -m jax_marlin_moe COMMAND`, or `jax-marlin-moe COMMAND` where the package is installed."""

import argparse
from collections.abc import Sequence

import jax_marlin_moe
from jax_marlin_moe.cli import bench, convert, demo, doctor, inspect, precompile, tune
from jax_marlin_moe.cli.console import status_of

_COMMANDS = {
    "demo": demo,
    "doctor": doctor,
    "convert": convert,
    "inspect": inspect,
    "bench": bench,
    "tune": tune,
    "precompile": precompile,
}


def main(arguments: Sequence[str] | None = None, *, program: str = "jax-marlin-moe") -> int:
    """Runs a command.

    Args:
        arguments: the command and its options; those of the process by default.
        program: what the usage calls the program.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog=program, description="Quantised expert layers for JAX.")
    parser.add_argument("--version", action="version", version=f"jax_marlin_moe {jax_marlin_moe.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))

    def command() -> int:
        options = parser.parse_args(arguments)
        return _COMMANDS[options.command].run(options)

    return status_of(command)
