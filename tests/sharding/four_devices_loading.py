"""Loads checkpoints over four virtual CPU devices; prints JSON: what failed, by check. Run by `test_loading.py`."""

import contextlib
import importlib
import os
import pathlib
import sys
import tempfile
from functools import partial

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType
from printed_checks import print_failures

from jax_marlin_moe.checkpoint import convert, load_moe_layer, load_moe_layers, with_facts, without_facts
from jax_marlin_moe.sharding import MoESharding, place

DATA = pathlib.Path(__file__).parents[1] / "data"
BOTH = MoESharding(jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2))
EXPERTS = MoESharding(jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,)))


def assert_same(found, wanted):
    """Structure, bits and shardings."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted), (found, wanted)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        assert one.sharding == other.sharding, (name, one.sharding, other.sharding)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)


def as_placed(folder, sharding, **options):
    found = load_moe_layer(folder, 0, sharding=sharding, **options)
    whole = load_moe_layer(folder, 0, **options)
    assert_same(found, place(whole, sharding))


def packed():
    """A folder that `convert` wrote: mapped in shares."""
    with tempfile.TemporaryDirectory() as folder:
        convert(DATA / "ck_llmc_W4A16_ASYM", pathlib.Path(folder) / "packed")
        for sharding in (BOTH, EXPERTS):
            as_placed(pathlib.Path(folder) / "packed", sharding)


def stack():
    found = load_moe_layers(DATA / "ck_llmc_W4A16", stacked=True, sharding=BOTH)
    assert_same(found, place(load_moe_layers(DATA / "ck_llmc_W4A16", stacked=True), BOTH))


def orbax():
    """What Orbax saved of one device is restored over several, and what it saved of these as well."""
    try:
        from orbax.checkpoint import StandardCheckpointer
    except ImportError:
        return
    whole = load_moe_layer(DATA / "ck_llmc_W4A16", 0)
    for layer, sharding in ((whole, EXPERTS), (place(whole, BOTH), BOTH)):
        with tempfile.TemporaryDirectory() as folder, StandardCheckpointer() as saver:
            saver.save(pathlib.Path(folder) / "layer", with_facts({"layer": layer}))
            saver.wait_until_finished()
            template = with_facts({"layer": sharding.abstract(sharding.lay_out(layer))})
            restored = without_facts(saver.restore(pathlib.Path(folder) / "layer", template))["layer"]
        assert_same(restored, place(layer, sharding))


def example():
    """The command of `examples/sharded.py`: the same rows over four devices as over one."""
    sys.path.append(str(DATA.parents[1]))
    command = importlib.import_module("examples.sharded").main
    folder = str(DATA / "ck_llmc_W4A16")
    with contextlib.redirect_stdout(sys.stderr):
        y = command([folder, "--expert", "2", "--tensor", "2", "--tokens", "8", "--exchange", "ragged"])
        wanted = command([folder, "--tokens", "8"])
    difference = np.asarray(y, np.float32) - np.asarray(wanted, np.float32)
    assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(np.asarray(wanted, np.float32))
    assert y.sharding.spec[0] == "expert", y.sharding


CHECKS = {
    **{
        f"{folder} {name}": partial(as_placed, DATA / folder, sharding, **options)
        for folder, options in (
            ("ck_awq", {}),
            ("ck_llmc_MXFP4A16", {}),
            ("ck_llmc_NVFP4A16", {}),
            ("ck_llmc_W4A16", {}),
            ("ck_modelopt", {}),
            ("ck_q3_gptq_True", {}),
            ("ck_q3", {"quantize": "int4", "group_size": 64}),
        )
        for name, sharding in (("both", BOTH), ("experts", EXPERTS))
        if name == "both" or folder == "ck_q3"
    },
    "nvfp4 from plain weights": partial(as_placed, DATA / "ck_q3", BOTH, quantize="nvfp4"),
    "packed": packed,
    "stack": stack,
    "orbax": orbax,
    "example": example,
}


if __name__ == "__main__":
    print_failures(CHECKS)
