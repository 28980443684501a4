"""The example of low-rank adapters beside packed experts: the loss falls, and nothing but adapters moves."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import qlora
from examples.models import SIZES, load

CHECKPOINT = pathlib.Path(__file__).parents[1] / "data" / "ck_q3_gptq_True"


def test_the_loss_falls_and_only_adapters_move(capsys):
    model = qlora.adapt(load(CHECKPOINT, dtype=jnp.float16), rank=2)
    before = jax.tree.map(np.asarray, nnx.split(model, qlora.Lora, ...)[1:])
    tokens = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    losses = qlora.train(model, tokens, steps=4, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.05
    adapters, frozen = nnx.split(model, qlora.Lora, ...)[1:]
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), adapters, before[0])
    assert all(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, frozen, before[1])
    assert "tokens per second; peak memory" in capsys.readouterr().out


def test_models_whose_experts_it_does_not_compute_are_refused():
    config = json.loads((CHECKPOINT.parent / "gpt_oss" / "config.json").read_text())
    model = types.SimpleNamespace(sizes=SIZES["gpt_oss"].from_config(config))
    with pytest.raises(ValueError, match=r"model is of examples\.gpt_oss; adapters are for examples\.qwen3_moe alone"):
        qlora.adapt(model, rank=2)
