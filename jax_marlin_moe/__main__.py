"""`python -m jax_marlin_moe`: the command line of `jax_marlin_moe.cli.main`."""

import sys

from jax_marlin_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m jax_marlin_moe"))
