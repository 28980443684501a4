"""Checkpoints that are wrong: each is refused with the file, the tensor, what was found and what must be."""

import json
import pathlib
import shutil
import subprocess
import sys

import checkpoint_files as files
import ml_dtypes
import numpy as np
import pytest

from jax_marlin_moe.checkpoint import load_moe_layer

DATA = pathlib.Path(__file__).parents[1] / "data"
PREFIX = "model.layers.0.mlp.experts"
LINEAR = f"{PREFIX}.2.up_proj"
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture
def spoil(tmp_path):
    """A copy of a folder with tensors replaced (None removes) and entries of its quantisation config replaced."""

    def make(name, tensors=(), quantization=(), config=()):
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        values = json.loads((folder / "config.json").read_text()) | dict(config)
        values.get("quantization_config", {}).update(quantization)
        (folder / "config.json").write_text(json.dumps(values))
        contents = files.read(folder / "model.safetensors")
        for key, change in dict(tensors).items():
            if change is None:
                del contents[key]
            else:
                contents[key] = change(contents[key].copy()) if callable(change) else change
        files.write(folder / "model.safetensors", contents)
        return folder

    return make


def put(value):
    """Puts a bit pattern into one element."""

    def change(tensor):
        tensor.reshape(-1).view(np.uint8)[5] = value
        return tensor

    return change


def first(value):
    def change(tensor):
        tensor.reshape(-1)[0] = value
        return tensor

    return change


NV, MO, MX = "ck_llmc_NVFP4A16", "ck_modelopt", "ck_llmc_MXFP4A16"
W4, W8, ASYM = "ck_llmc_W4A16", "ck_llmc_W8A16", "ck_llmc_W4A16_ASYM"
TENSORS = [
    (NV, "weight_scale", put(0x7F), r"weight_scale holds NaN"),
    (NV, "weight_scale", put(0xFF), r"weight_scale holds NaN"),
    (NV, "weight_scale", put(0x88), r"weight_scale holds negative values"),
    (MO, "weight_scale", put(0x7F), r"weight_scale holds NaN"),
    (MO, "weight_scale", put(0x81), r"weight_scale holds negative values"),
    (MX, "weight_scale", put(255), r"weight_scale holds NaN \(e8m0 255\)"),
    (NV, "weight_global_scale", None, r"has no tensor .*weight_global_scale"),
    (MO, "weight_scale_2", None, r"has no tensor .*weight_scale_2"),
    (NV, "weight_global_scale", first(0), r"weight_global_scale is 0\.0; a global scale must be positive"),
    (NV, "weight_global_scale", first(1e-39), r"weight_global_scale is 1.*e-39; .* and so must its inverse"),
    (NV, "weight_global_scale", first(np.nan), r"weight_global_scale is nan"),
    (NV, "weight_global_scale", np.ones(2, np.float32), r"weight_global_scale has shape \(2,\); it must be"),
    (MO, "weight_scale_2", np.float16(1), r"weight_scale_2 has dtype F16; it must be F32"),
    (NV, "weight_scale", None, r"has no tensor .*weight_scale"),
    (MO, "weight", None, rf"has no tensor {LINEAR}|stored in no way"),
    (MO, "weight", np.zeros((128, 32), np.uint8), r"up_proj\.weight has shape \(128, 32\); it must be \(128, 64\)"),
    (MX, "weight_packed", np.zeros((128, 64), np.float32), r"stored in no way that the loader knows.*F32"),
    (W4, "weight_scale", first(np.nan), r"weight_scale holds infinities or NaN"),
    (W4, "weight_scale", first(np.inf), r"weight_scale holds infinities or NaN"),
    (W4, "weight_scale", None, r"has no tensor .*weight_scale"),
    (W4, "weight_scale", np.ones((128, 2), np.float32), r"weight_scale has shape \(128, 2\); it must be \(128, 1\)"),
    (
        W4,
        "weight_packed",
        np.zeros((128, 15), np.int32),
        r"weight_packed has shape \(128, 15\); it must be \(128, 16\)",
    ),
    (W4, "weight_shape", np.asarray([128, 64]), r"weight_shape says \[128, 64\]; it must be \[128, 128\]"),
    (ASYM, "weight_zero_point", None, r"has no tensor .*weight_zero_point"),
    (W4, "weight_zero_point", np.zeros((16, 1), np.int32), r"weight_zero_point is not known"),
    (W8, "bias", np.ones(128, np.float32), r"bias is not zero; experts of this model have no bias"),
    (W8, "something", np.ones(1, np.float32), r"up_proj\.something is not known; the layer would be loaded without it"),
]


@pytest.mark.parametrize(("name", "suffix", "change", "message"), TENSORS)
def test_wrong_tensors_are_named(spoil, name, suffix, change, message):
    with pytest.raises(ValueError, match=message):
        load_moe_layer(spoil(name, {f"{LINEAR}.{suffix}": change}), 0)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.0.extra", "model.layers.0.mlp.gate.other"])
def test_unknown_tensors_of_the_layer(spoil, name):
    with pytest.raises(ValueError, match="is not known"):
        load_moe_layer(spoil(W8, {name: np.ones(1, np.float32)}), 0)


def test_tensors_of_other_layers_do_not_matter(spoil):
    load_moe_layer(spoil(W8, {"model.layers.1.mlp.gate.other": np.ones(1, np.float32)}), 0)


def test_a_missing_router(spoil):
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.0\.mlp\.gate\.weight"):
        load_moe_layer(spoil(W8, {"model.layers.0.mlp.gate.weight": None}), 0)


def test_nan_in_the_router(spoil):
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight holds infinities or NaN"):
        load_moe_layer(spoil(W8, {"model.layers.0.mlp.gate.weight": first(np.nan)}), 0)


@pytest.mark.parametrize("suffix", ["packed", "scale", "shape"])
def test_fused_names_of_a_broken_writer(spoil, suffix):
    name = f"{PREFIX}.gate_up_proj_{suffix}"
    with pytest.raises(ValueError, match=r"is of llm-compressor 0\.12\.0.*requantise"):
        load_moe_layer(spoil(W4, {name: np.ones(1, np.float32)}), 0)


def fp8_experts(change):
    """ck_q3 as FP8 with one scale a channel, and a change of one linear."""
    plain = files.read(DATA / "ck_q3" / "model.safetensors")
    tensors = {}
    for name, value in plain.items():
        if ".layers.0.mlp.experts." in name:
            tensors[name] = value.astype(E4M3)
            tensors[f"{name}_scale"] = np.ones((value.shape[0], 1), np.float32)
    return tensors | change


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight", np.full((128, 128), np.nan, E4M3), r"up_proj\.weight holds NaN"),
        ("weight_scale", np.full((128, 1), np.nan, np.float32), r"weight_scale holds infinities or NaN"),
        ("weight_scale", np.full((128, 1), -1, np.float32), r"weight_scale holds negative values"),
        ("weight_scale", np.ones((3, 1), np.float32), r"weight_scale has shape \(3, 1\); it must be \(\) \(tensor\)"),
        ("weight_scale", np.ones((128, 2), np.float32), r"is stored as Fp8Storage\(.*groups=2\).* must share one way"),
        ("weight_scale", np.full((128, 1), 255, np.uint8), r"weight_scale holds NaN \(e8m0 255\)"),
        ("weight_scale", np.ones((128, 1), np.int32), r"weight_scale has dtype I32; it must be"),
    ],
)
def test_wrong_fp8(spoil, suffix, value, message):
    folder = spoil("ck_q3", fp8_experts({f"{LINEAR}.{suffix}": value}))
    with pytest.raises(ValueError, match=message):
        load_moe_layer(folder, 0)


def test_fp8_without_scales(spoil):
    folder = spoil("ck_q3", fp8_experts({}))
    contents = files.read(folder / "model.safetensors")
    files.write(folder / "model.safetensors", {k: v for k, v in contents.items() if not k.endswith("_scale")})
    with pytest.raises(ValueError, match="has no scales"):
        load_moe_layer(folder, 0)


QUANTIZATION = [
    ("ck_awq", {"version": "gemv"}, "version is 'gemv'"),
    ("ck_awq", {"version": "gemv_fast"}, "version is 'gemv_fast'"),
    ("ck_awq", {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; the loader knows awq, gptq"),
    ("ck_awq", {"quant_method": "marlin"}, "quant_method is 'marlin'"),
    ("ck_awq", {"quant_method": "gguf"}, "quant_method is 'gguf'"),
    ("ck_q3_gptq_False", {"checkpoint_format": "gptq_p"}, r"checkpoint_format is 'gptq_p'.*planar"),
    ("ck_q3_gptq_False", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ("ck_q3_gptq_False", {"bits": 5}, "bits is 5; it must be 4 or 8 for"),
    ("ck_q3_gptq_False", {"pack_dtype": "int8"}, "pack_dtype is 'int8'"),
    ("ck_q3_gptq_False", {"quant_method": "auto-round", "packing_format": "auto_round:exllama"}, "packing_format is"),
    (MO, {"quant_algo": "NVFP4_SVD"}, "quant_algo is 'NVFP4_SVD'; the loader knows NVFP4"),
    (W4, {"config_groups": {}}, r"no config group has .*down_proj among its targets"),
    (
        W4,
        {"config_groups": {"a": {"targets": ["Linear"]}}},
        r"config_groups\.a\.weights is missing; it must be an object",
    ),
    (
        W4,
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 3}}}},
        r"weights\.num_bits is 3; it must be 4 or 8",
    ),
    (
        W4,
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "block"}}}},
        r"weights\.strategy is 'block'; it must be one of 'group', 'channel'",
    ),
    (
        W4,
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 0}}}},
        "group_size is 0",
    ),
    (W4, {"quant_method": "gptq"}, r"config_groups is .*; it must be omitted"),
    (
        W4,
        {"format": "marlin-24"},
        "format is 'marlin-24'; it must be one of 'pack-quantized', 'mixed-precision'",
    ),
    (W4, {"config_groups": ["a"]}, r"config\.json: config_groups is \['a'\]; it must be an object"),
    (
        W4,
        {"config_groups": {"a": {"targets": [3], "weights": {"num_bits": 4}}}},
        r"config_groups\.a\.targets is \[3\]; it must be a list of strings",
    ),
    (
        W4,
        {"config_groups": {"a": {"targets": ["re:("], "weights": {}}}},
        r"config\.json: the pattern '\(' cannot be matched: it is not a regular expression",
    ),
    ("ck_q3_gptq_False", {"dynamic": ["x"]}, r"dynamic is \['x'\]; it must be an object"),
    (
        "ck_q3_gptq_False",
        {"dynamic": {"+:(": {"bits": 8}}},
        r"config\.json: the pattern '\(' cannot be matched: it is not a regular expression",
    ),
]


@pytest.mark.parametrize(("name", "quantization", "message"), QUANTIZATION)
def test_unsupported_quantisation_is_named(spoil, name, quantization, message):
    with pytest.raises(ValueError, match=message):
        load_moe_layer(spoil(name, quantization=quantization), 0)


def test_a_v1_zero_point_of_16(spoil):
    folder = spoil("ck_q3_gptq_False", {f"{LINEAR}.qzeros": first(0x7777777F)})
    with pytest.raises(ValueError, match=r"up_proj\.qzeros cannot be used: qzeros holds 15, a v1 zero point of 16"):
        load_moe_layer(folder, 0)


def test_symmetric_awq_with_other_zero_points(spoil):
    with pytest.raises(ValueError, match=r"\.qzeros holds zero points other than 8; zero_point is false"):
        load_moe_layer(spoil("ck_awq", quantization={"zero_point": False}), 0)


def test_marlin_files(spoil):
    contents = {f"{PREFIX}.{e}.{p}_proj.qweight": None for e in range(4) for p in ("gate", "up", "down")}
    contents |= {name.replace("qweight", "B"): np.zeros((8, 256), np.int32) for name in contents}
    with pytest.raises(ValueError, match="Marlin-format files"):
        load_moe_layer(spoil("ck_q3_gptq_False", contents), 0)


@pytest.mark.parametrize("name", ["gate_up_proj_packed", "down_proj_shape"])
def test_fused_experts_of_a_version_that_wrote_them_wrongly(spoil, name):
    folder = spoil(W4, {f"{PREFIX}.{name}": np.zeros((2,), np.int64)})
    with pytest.raises(ValueError, match=rf"experts\.{name} is of llm-compressor 0\.12\.0, which wrote fused experts"):
        load_moe_layer(folder, 0)


def test_an_empty_path():
    with pytest.raises(ValueError, match="path is empty; pass the folder of a checkpoint"):
        load_moe_layer("", 0)


def test_pickles(tmp_path):
    shutil.copyfile(DATA / "ck_awq" / "config.json", tmp_path / "config.json")
    (tmp_path / "qmodel.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"holds pickles \(qmodel\.pt\) and no safetensors file"):
        load_moe_layer(tmp_path, 0)


def test_hqq_along_the_other_axis(spoil):
    tensors = {}
    for name in files.read(DATA / "ck_q3" / "model.safetensors"):
        if ".layers.0.mlp.experts." in name:
            module = name.removesuffix(".weight")
            tensors |= {name: None, f"{module}.W_q": np.zeros((64, 128), np.uint8), f"{module}.axis": np.asarray(0)}
    quantization = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
    folder = spoil("ck_q3", tensors, config={"quantization_config": quantization})
    with pytest.raises(ValueError, match="HQQ axis 0; it must be 1: only axis 1 has groups along K"):
        load_moe_layer(folder, 0)


@pytest.mark.parametrize("keep", [100, -1000])
def test_truncated_files(spoil, keep):
    path = spoil(NV) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_moe_layer(path.parent, 0)


def test_a_missing_shard(spoil):
    folder = spoil(W4)
    index = {"weight_map": dict.fromkeys(files.read(folder / "model.safetensors"), "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"part\.safetensors is missing"):
        load_moe_layer(folder, 0)


def test_an_index_that_promises_too_much(spoil):
    folder = spoil(W4)
    names = [*files.read(folder / "model.safetensors"), f"{LINEAR}.bias"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the file has no tensor .*bias, although the index says so"):
        load_moe_layer(folder, 0)


def test_without_safetensors_the_package_imports_and_checkpoints_are_refused():
    # As on free-threaded Pythons, which have no wheel of it.
    program = (
        "import sys; sys.modules['safetensors'] = None; from jax_marlin_moe.checkpoint import load_moe_layer; "
        f"load_moe_layer({str(DATA / 'ck_awq')!r}, layer=0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith(
        f"ImportError: {DATA / 'ck_awq' / 'model.safetensors'} cannot be read: the package safetensors is missing"
    )
    assert "free-threaded Pythons" in run.stderr
