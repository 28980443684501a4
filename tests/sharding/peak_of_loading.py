"""What one of two processes needs of the host's memory while it loads its share of a checkpoint; prints JSON.

Arguments: the coordinator's address, the number of the process, and the checkpoint. Run by `test_peak_memory.py`.
"""

import gc
import json
import os
import pathlib
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.sharding import AxisType

from jax_marlin_moe.checkpoint import load_moe_layer
from jax_marlin_moe.sharding import MoESharding


def resident(kind):
    """Bytes of the process that are in memory: "VmRSS" now, "VmHWM" at most; pages of mapped files included."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def main():
    address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    found = {}
    for axis in ("expert", "tensor"):
        sharding = MoESharding(jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,)))
        load_moe_layer(folder, 0, sharding=sharding)  # what is compiled once is not of the layer
        gc.collect()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        layer = load_moe_layer(folder, 0, sharding=sharding)
        peak = resident("VmHWM") - before
        local = sum(shard.data.nbytes for leaf in jax.tree.leaves(layer) for shard in leaf.addressable_shards)
        found[axis] = {"peak": peak, "local": local}
        del layer
    jax.distributed.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
