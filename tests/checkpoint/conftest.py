"""Small checkpoints of tensors that a test makes."""

import json

import checkpoint_files as files
import numpy as np
import pytest
import scheme_tensors


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def save(tmp_path):
    def make(config, tensors, folder="checkpoint"):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        sizes = {"hidden_size": scheme_tensors.H, "moe_intermediate_size": scheme_tensors.I}
        base = sizes | {"num_experts": scheme_tensors.E, "num_experts_per_tok": 2}
        (path / "config.json").write_text(json.dumps(base | config))
        files.write(path / "model.safetensors", tensors)
        return path

    return make
