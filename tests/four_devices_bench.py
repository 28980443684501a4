"""Runs `benchmarks.sharded` on four virtual CPU devices, twice into one file; prints the file.

Its arguments are the file, and what is added to the command. XLA reads the number of devices when it starts, so
`test_sharded_bench.py` runs this in a process of its own.
"""

import contextlib
import json
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(pathlib.Path(__file__).parents[1]))

from benchmarks import sharded
from jax_marlin_moe.measure.models import MODELS, ModelShape

MODELS["tiny"] = ModelShape("tiny", num_experts=8, top_k=2, hidden=64, intermediate=256, group_size=64)


def main():
    out, *more = sys.argv[1:]
    for recipes in (["ep-tp-ragged", "tp"], ["tp"]):
        sys.argv[1:] = ["--models", "tiny", "--formats", "int4", "--tokens", "8", "--recipes", *recipes]
        sys.argv += ["--commit", "-".join(recipes), "--out", out, *more]
        with contextlib.redirect_stdout(sys.stderr):
            sharded.main()
    print(json.dumps(json.loads(pathlib.Path(out).read_text())))


if __name__ == "__main__":
    main()
