"""One of two processes with a device each, as on two hosts: reads its share of a checkpoint and calls the layer.

Arguments: the coordinator's address, the number of the process, and the platform. Run by `test_two_processes.py`.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = sys.argv[3]

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jax_marlin_moe.checkpoint import load_moe_layer
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.sharding import MoESharding, parallel_layer, place

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "ck_llmc_NVFP4A16"


class Counted:
    """Bytes of the views of experts' tensors that are read of files."""

    def __enter__(self):
        self.bytes = 0
        self.read = Linear.read

        def read(linear, *args, **options):
            view = self.read(linear, *args, **options)
            self.bytes += view.nbytes
            return view

        Linear.read = read
        return self

    def __exit__(self, *error):
        Linear.read = self.read


def main():
    address, process = sys.argv[1], int(sys.argv[2])
    one_card = None if sys.argv[3] == "cpu" else [process]
    jax.distributed.initialize(address, num_processes=2, process_id=process, local_device_ids=one_card)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 2, 1)
    with Counted() as all_bytes:
        whole = load_moe_layer(FOLDER, 0)
    x = np.asarray(np.random.default_rng(0).normal(size=(4, 128)), jnp.bfloat16)
    wanted = np.asarray(whole(jnp.asarray(x)), np.float32)
    for axis, options in (("expert", {"tokens": "expert", "exchange": "ragged"}), ("tensor", {})):
        sharding = MoESharding(jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,)))
        with Counted() as read:
            layer = load_moe_layer(FOLDER, 0, sharding=sharding)
        assert read.bytes * 2 == all_bytes.bytes, (axis, read.bytes, all_bytes.bytes)
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(layer.gate_up) for shard in leaf.addressable_shards)
        assert held * 2 == whole.gate_up.nbytes
        for found, other in zip(jax.tree.leaves(layer), jax.tree.leaves(place(whole, sharding)), strict=True):
            assert found.sharding == other.sharding
            np.testing.assert_array_equal(*(one.addressable_data(0) for one in (found, other)))
        y = jax.jit(lambda layer, x, s=sharding, o=options: parallel_layer(layer, x, s, **o))(layer, x)
        mine = y.addressable_shards[0]
        error = np.linalg.norm(np.asarray(mine.data, np.float32) - wanted[mine.index])
        assert error <= 4e-3 * np.linalg.norm(wanted), (axis, error)
    jax.distributed.shutdown()
    print("right")


if __name__ == "__main__":
    main()
