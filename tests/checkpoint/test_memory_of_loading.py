"""How much memory loading a layer takes, from its tool's files and from the packed form."""

import json
import os
import pathlib
import subprocess
import sys

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

DATA = pathlib.Path(__file__).parents[1] / "data"

_MEASURE = """
import gc, json, pathlib, sys
import jax
from jax_marlin_moe.checkpoint import convert, load_moe_layer
def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024
def peak_and_size(folder):
    load_moe_layer(folder, 1)  # compiled code is not what is measured
    gc.collect()
    start = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    layer = jax.block_until_ready(load_moe_layer(folder, 0))
    return status("VmHWM") - start, sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
source, packed = sys.argv[1:]
found = {"source": peak_and_size(source)}
convert(source, packed)
found["packed"] = peak_and_size(packed)
print(found, file=sys.stderr)
print(json.dumps(found))
"""


def nvfp4_linear(rng, n, k):
    scales = rng.integers(0, 0x7F, (n, k // 16), dtype=np.uint8)
    return {
        "weight_packed": rng.integers(0, 256, (n, k // 2), dtype=np.uint8),
        "weight_scale": scales.view(ml_dtypes.float8_e4m3fn),
        "weight_global_scale": np.ones(1, np.float32),
    }


def gptq_linear(rng, n, k):
    """With everything that is looked at before the first linear is loaded: zero points, row order, a bias of zero."""
    return {
        "qweight": rng.integers(0, 256, (k // 8, 4 * n), dtype=np.uint8).view(np.int32),
        "qzeros": np.full((k // 128, n // 8), 0x77777777, np.int32),
        "scales": np.ones((k // 128, n), np.float16),
        "g_idx": np.random.default_rng(k).permutation(np.arange(k, dtype=np.int32) // 128),
        "bias": np.zeros(n, np.float16),
    }


LARGE = {"ck_llmc_NVFP4A16": nvfp4_linear, "ck_q3_gptq_True": gptq_linear}


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["ck_llmc_NVFP4A16", pytest.param("ck_q3_gptq_True", marks=pytest.mark.exhaustive)])
def test_peak_memory(tmp_path, name):
    """Loading takes at most 1.3 times the packed layer: 75 MB of experts or more, in the file of both layers."""
    experts, hidden, size = 24, 1024, 2048
    rng = np.random.default_rng(0)
    tensors, config = {}, json.loads((DATA / name / "config.json").read_text())
    config.get("quantization_config", {}).update({"group_size": 128} if name == "ck_q3_gptq_True" else {})
    wide, tall = (LARGE[name](rng, n, k) for n, k in ((size, hidden), (hidden, size)))
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        for e in range(experts):
            for part, found in (("gate_proj", wide), ("up_proj", wide), ("down_proj", tall)):
                tensors |= {f"{block}.experts.{e}.{part}.{suffix}": value for suffix, value in found.items()}
        tensors[f"{block}.gate.weight"] = np.zeros((experts, hidden), np.float32)
    config |= {"hidden_size": hidden, "moe_intermediate_size": size, "num_local_experts": experts}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    files.write(source / "model.safetensors", tensors)
    # 75 MB take longer than optimised code takes to compile. And freed arrays are given back, so that what was there
    # before is not more than it seems.
    environment = os.environ | {"XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEASURE, str(source), str(tmp_path / "packed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for form, (peak, size) in json.loads(done.stdout.splitlines()[-1]).items():
        assert size > 75e6
        assert peak <= 1.3 * size, f"{form}: {peak / size:.2f} times the packed layer"
