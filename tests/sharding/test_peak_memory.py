"""Loading a share of a checkpoint takes little more of the host's memory than the share."""

import json
import os
import pathlib

import numpy as np
import pytest
from checkpoint_files import read, write
from other_process import last_lines_of_two

DATA = pathlib.Path(__file__).parents[1] / "data"
EXPERTS, TIMES = 48, 8


def enlarge(folder, source):
    """A checkpoint of layer 0 of another with more and larger experts."""
    config = json.loads((source / "config.json").read_text())
    for size in ("hidden_size", "moe_intermediate_size"):
        config[size] *= TIMES
    few = config["num_local_experts"]
    config |= {"num_local_experts": EXPERTS, "num_hidden_layers": 1}
    tensors = {}
    for name, value in read(source / "model.safetensors").items():
        before, _, rest = name.partition(".mlp.experts.")
        if name == "model.layers.0.mlp.gate.weight":
            tensors[name] = np.tile(value, (EXPERTS // few, TIMES))
        elif before == "model.layers.0" and rest:
            number, _, leaf = rest.partition(".")
            large = np.tile(value, (TIMES,) * 2) if value.ndim == 2 else value
            for expert in range(int(number), EXPERTS, few):
                tensors[f"{before}.mlp.experts.{expert}.{leaf}"] = large
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="it reads a process's peak from Linux")
def test_a_process_needs_at_most_three_tenths_more_than_its_share(tmp_path):
    enlarge(tmp_path, DATA / "ck_llmc_NVFP4A16")
    # Freed arrays are given back, so that what was there before is not more than it seems. And 80 MB take longer than
    # optimised code takes to compile.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "XLA_FLAGS": ""}
    for line in last_lines_of_two("peak_of_loading.py", __file__, str(tmp_path), environment=environment):
        for axis, found in json.loads(line).items():
            assert found["local"] > 40e6, "the kernel maps files in pieces of 2 MiB: too little to tell from them"
            assert found["peak"] <= 1.3 * found["local"], (axis, found)
