"""Names and counts of a checkpoint that could be meant in two ways, or that promise what is not there."""

import json
import pathlib
import shutil
import subprocess
import sys

import checkpoint_files as files
import numpy as np
import pytest

from jax_marlin_moe.checkpoint import convert, load_moe_layer
from jax_marlin_moe.checkpoint.packed_form import MANIFEST

DATA = pathlib.Path(__file__).parents[1] / "data"
W8 = "ck_llmc_W8A16"


@pytest.fixture
def change(tmp_path):
    """A copy of a folder of `data`, with its tensors and its config put through functions."""

    def make(tensors=dict, config=dict, name=W8):
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        values = config(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(values))
        files.write(folder / "model.safetensors", tensors(files.read(folder / "model.safetensors")))
        return folder

    return make


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.layers.0.", "model.language_model.layers.0."),
        ("model.layers.0.", "layers.0."),
        ("model.layers.0.", "model.layers.00."),
    ],
)
def test_two_copies_of_a_layer_are_an_error_that_names_both(change, old, new):
    def twice(tensors):
        return tensors | {name.replace(old, new): value for name, value in tensors.items() if name.startswith(old)}

    folder = change(twice)
    with pytest.raises(ValueError, match="both of number 0") as error:
        load_moe_layer(folder, 0)
    assert all(f"{prefix}*" in str(error.value) for prefix in (old, new))
    assert str(folder) in str(error.value)


def test_two_copies_of_an_expert_are_an_error_that_names_both(change):
    old, new = "model.layers.0.mlp.experts.1.", "model.layers.0.mlp.experts.01."
    folder = change(lambda t: t | {name.replace(old, new): t[name] for name in t if name.startswith(old)})
    with pytest.raises(ValueError, match=r"experts\.01\.\* and .*experts\.1\.\*, both of number 1"):
        load_moe_layer(folder, 0)


@pytest.mark.parametrize("place", ["layer", "expert"])
def test_a_number_of_thousands_of_digits_is_an_error_that_names_the_tensor(change, place):
    prefix = "model.layers.{}.mlp.experts.0." if place == "layer" else "model.layers.0.mlp.experts.{}."
    name = prefix.format("9" * 5000) + "up_proj.weight_packed"
    folder = change(lambda tensors: tensors | {name: np.zeros(1, np.int32)})
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* has a number of 5000 digits in its name"):
        load_moe_layer(folder, 0)


def test_two_spellings_of_a_layer_in_a_manifest_are_an_error_that_names_both(tmp_path):
    convert(DATA / W8, tmp_path / "packed")
    path = tmp_path / "packed" / MANIFEST
    values = json.loads(path.read_text())
    values["layers"]["00"] = values["layers"]["1"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{path}: layers has the keys '0' and '00'"):
        load_moe_layer(tmp_path / "packed", 0)


@pytest.mark.parametrize("number", ["9" * 5000, "\u0663", "-1", "1.0"])
def test_a_key_of_a_manifest_must_be_a_layer(tmp_path, number):
    convert(DATA / W8, tmp_path / "packed")
    path = tmp_path / "packed" / MANIFEST
    values = json.loads(path.read_text())
    values["layers"][number] = values["layers"]["1"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="it must be the number of a layer") as error:
        load_moe_layer(tmp_path / "packed", 0)
    assert str(path) in str(error.value)


def stacked(tensors):
    """Experts of layer 0 in two tensors, as transformers keeps them in memory."""
    kept = {name: value for name, value in tensors.items() if ".layers.0.mlp.experts." not in name}
    first = [
        np.concatenate([tensors[f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")])
        for e in range(4)
    ]
    down = [tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(4)]
    module = "model.layers.0.mlp.experts."
    return kept | {f"{module}gate_up_proj": np.stack(first), f"{module}down_proj": np.stack(down)}


LIMITED = """
import resource, sys
from jax_marlin_moe.checkpoint import load_moe_layer
for good, bad in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    load_moe_layer(good, 0, quantize="int8")
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        load_moe_layer(bad, 0, quantize="int8")
    except ValueError as error:
        assert "100000000" in str(error), error
    else:
        raise SystemExit(f"{bad} was loaded")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 50_000, (bad, before.ru_maxrss, after.ru_maxrss)
    assert after.ru_utime - before.ru_utime < 5, (bad, before.ru_utime, after.ru_utime)
"""


def test_a_huge_number_of_experts_is_refused_fast_and_in_little_memory(change, tmp_path):
    folders = []
    for form in (dict, stacked):  # numbered tensors, and a stack of all experts
        good, bad = tmp_path / f"good_{form.__name__}", tmp_path / f"bad_{form.__name__}"
        shutil.move(change(form, name="ck_q3"), good)
        shutil.copytree(good, bad)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(config | {"num_local_experts": 10**8}))
        folders += [str(good), str(bad)]
    done = subprocess.run([sys.executable, "-c", LIMITED, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stack_of_another_number_of_experts_is_an_error_that_names_the_tensor(change):
    folder = change(stacked, lambda config: config | {"num_local_experts": 3}, name="ck_q3")
    with pytest.raises(ValueError, match=r"gate_up_proj has shape \(4, 256, 128\); its first dimension must be the 3"):
        load_moe_layer(folder, 0, quantize="int8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_a_dense_shared_expert_with_values_that_are_not_finite_is_refused(change, value, part):
    block = "model.layers.0.mlp."

    def with_shared(tensors):
        shared = {f"{block}shared_expert.{name}.weight": np.ones((128, 128), np.float32) for name in NAMES}
        shared[f"{block}shared_expert.{part}.weight"][3, 5] = value
        return tensors | shared | {f"{block}shared_expert_gate.weight": np.ones((1, 128), np.float32)}

    folder = change(with_shared, lambda config: config | {"model_type": "qwen2_moe"})
    with pytest.raises(ValueError, match=rf"shared_expert\.{part}\.weight holds infinities or NaN"):
        load_moe_layer(folder, 0)


NAMES = ("gate_proj", "up_proj", "down_proj")


def test_the_id_of_a_repository_gets_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Qwen/Qwen3-30B-A3B is not a folder.*hf download Qwen/Qwen3-30B-A3B"):
        load_moe_layer("Qwen/Qwen3-30B-A3B", 0)
    with pytest.raises(FileNotFoundError, match="pass the folder of a checkpoint"):
        load_moe_layer("no/such/folder", 0)
    shutil.copytree(DATA / W8, tmp_path / "org" / "name")
    assert load_moe_layer("org/name", 0).gate_up.num_experts == 4


def test_the_first_bad_name_in_an_index_is_the_one_that_is_told(tmp_path):
    shutil.copyfile(DATA / W8 / "config.json", tmp_path / "config.json")
    names = {f"tensor{i}": f"../file{i}" for i in range(20)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match=r"names the file '\.\./file0'"):
        load_moe_layer(tmp_path, 0)
