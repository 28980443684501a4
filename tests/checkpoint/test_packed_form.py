"""The packed form on disk: what comes back, and what is refused."""

import dataclasses
import json
import os
import pathlib
import shutil

import checkpoint_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_experts
from saved_layers import full_layer

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import Checkpoint, MoELayer, convert, load_moe_layer, load_moe_layers, packed_form
from jax_marlin_moe.checkpoint.facts import layer_from, leaves_and_facts, read_facts
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.cli.main import main

DATA = pathlib.Path(__file__).parents[1] / "data"


def assert_same(a: MoELayer, b: MoELayer) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)  # formats, padding, routing and activation included
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "name", ["ck_awq", "ck_q3_gptq_True", "ck_llmc_W4A16", "ck_llmc_W8A16", "ck_llmc_MXFP4A16", "ck_modelopt"]
)
def test_what_was_converted_comes_back(name, tmp_path):
    convert(DATA / name, tmp_path / "packed")
    found = dict(load_moe_layers(tmp_path / "packed"))
    assert sorted(found) == [0, 1]
    for layer, loaded in found.items():
        assert_same(loaded, load_moe_layer(DATA / name, layer))


def test_plain_weights_are_quantised_once(tmp_path):
    convert(DATA / "ck_q3", tmp_path / "packed", quantize="nvfp4")
    assert_same(load_moe_layer(tmp_path / "packed", 1), load_moe_layer(DATA / "ck_q3", 1, quantize="nvfp4"))


def write(folder, number, layer):
    packed_form.write_manifest(
        folder / packed_form.MANIFEST, {number: packed_form.write_layer(folder, number, layer, None)}, "test", {}
    )


def test_every_field_comes_back(tmp_path):
    layer = full_layer()
    write(tmp_path, 7, layer)
    assert_same(load_moe_layer(tmp_path, 7), layer)
    assert load_moe_layer(tmp_path, 7).activation == layer.activation


def test_a_layer_is_shown_in_one_line(tmp_path):
    layer = full_layer()
    text = repr(layer)
    assert "\n" not in text
    assert len(text) < 2000
    for part in (
        "MoELayer(gate_up=MarlinWeights(format='int4_zp', packed=int32[4,3,256], scales=float16[4,1,128], ",
        "router=float16[40,6], routing=Routing(top_k=2, scoring='sigmoid'",
        "name='swiglu'",
        "shared=SharedExpert(gate_up=MarlinWeights(format='int4_zp'",
        "gate=float16[40,1]",
        f"{sum(leaf.nbytes for leaf in jax.tree.leaves(layer))} bytes)",
    ):
        assert part in text
    assert repr(layer.down).endswith(f"row_padding=8, column_padding=(24,), {layer.down.nbytes} bytes)")
    large = jax.ShapeDtypeStruct((128, 128, 4096), jnp.int32)
    assert repr(dataclasses.replace(layer.gate_up, packed=large)).endswith("268.4 MB)")
    # What takes the place of arrays under transformations is shown as well.
    assert "packed=P('x',)" in repr(jax.tree.map(lambda _: jax.sharding.PartitionSpec("x"), layer.gate_up))
    assert repr(jax.eval_shape(lambda parts: parts, layer)) == text
    (tokens,) = jax.export.symbolic_shape("t")
    assert "packed=int32[t,4]" in repr(
        dataclasses.replace(layer.down, packed=jax.ShapeDtypeStruct((tokens, 4), "int32"))
    )


def test_the_file_is_plain_safetensors(tmp_path):
    """Any reader of safetensors can open it; every leaf begins at a multiple of 64 bytes."""
    layer = full_layer()
    entry = packed_form.write_layer(tmp_path, 0, layer, None)
    tensors = files.read(tmp_path / entry["file"])
    np.testing.assert_array_equal(tensors["gate_up.packed"], layer.gate_up.packed)
    raw = (tmp_path / entry["file"]).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert header["__metadata__"].keys() == {"format", "version", "layer"}
    assert json.loads(header["__metadata__"]["layer"])["number"] == 0
    starts = [8 + size + e["data_offsets"][0] for n, e in header.items() if n[0] != "_" and not n.endswith(".gap")]
    assert all(start % 64 == 0 for start in starts)


@pytest.fixture
def folder(tmp_path):
    convert(DATA / "ck_llmc_W4A16", tmp_path / "packed")
    return tmp_path / "packed"


def edit(folder, change):
    path = folder / packed_form.MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_facts(folder, change, *, sign=True):
    """Changes what the file of layer 0 says of itself, and, to sign that, its digest in the manifest."""
    path = folder / packed_form.file_of(0)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    about = json.loads(header["__metadata__"]["layer"])
    change(about)
    header["__metadata__"]["layer"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    if sign:
        edit(folder, lambda v: v["layers"]["0"].update(sha256=packed_form.sha256(path)))


def test_a_wrong_checksum_is_refused(folder):
    path = folder / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    load_moe_layer(folder, 0)
    with pytest.raises(ValueError, match=r"layer-00001\.safetensors has SHA-256 .* the file is damaged"):
        load_moe_layer(folder, 1)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="the file is damaged"):
        load_moe_layer(folder, 1)


MANIFESTS = [
    (lambda v: v.update(version=3), "version is 3; this package reads up to 2: update it"),
    (lambda v: v.update(version="1"), "version is '1'; it must be an integer of at least 1"),
    (lambda v: v.update(version=True), "version is True"),
    (lambda v: v.update(version=1), r"layers\.0\.layer is missing"),
    (lambda v: v.pop("version"), "version is missing"),
    (lambda v: v.pop("layers"), "layers is missing; it must be an object"),
    (lambda v: v["layers"]["0"].pop("sha256"), r"layers\.0\.sha256 is missing"),
    (lambda v: v["layers"]["0"].update(sha256="0"), r"layers\.0\.sha256 is '0'; it must be 64 hexadecimal digits"),
    (lambda v: v["layers"]["0"].update(file="../layer-00000.safetensors"), "must be a plain file name"),
    (lambda v: v["layers"]["0"].update(file="/etc/passwd"), "must be a plain file name"),
    (lambda v: v["layers"]["0"].update(file=3), "must be a plain file name"),
    (lambda v: v["layers"]["0"].pop("file"), "must be a plain file name"),
    (
        lambda v: v["layers"].update({"0": v["layers"]["1"]}),
        r"file is 'layer-00001\.safetensors'; it must be layer-00000",
    ),
    (lambda v: v["layers"].update({"0": 8}), r"layers\.0 is 8; it must be an object"),
    (lambda v: v["layers"].update(first=v["layers"]["0"]), "layers has the key 'first'; it must be the number"),
    (lambda v: v["layers"].update({"00": v["layers"]["0"]}), "layers has the keys '0' and '00'; each layer"),
    (lambda v: v["layers"].update({"02": v["layers"]["0"]}), "layers has the key '02'; it must be the number"),
    (lambda v: v["layers"].update({"1" * 5000: v["layers"]["0"]}), "layers has the key '111.*must be the number"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_wrong_manifests_are_refused(folder, capsys, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=rf"jax_marlin_moe\.json.*{message}"):
        load_moe_layer(folder, 0)
    assert main(["inspect", str(folder)]) == 1
    assert "cannot inspect: " in capsys.readouterr().err


def routing(**values):
    return lambda facts: facts["routing"].update(values)


def down(**values):
    return lambda facts: facts["matrices"]["down"].update(values)


WRONG_FACTS = [
    (routing(renormalize={"a": {}}), r"routing\.renormalize is \{'a': \{\}\}; it must be true or false"),
    (routing(renormalize="false"), r"routing\.renormalize is 'false'; it must be true or false"),
    (routing(softmax_after_topk=float("-inf")), r"routing\.softmax_after_topk is -inf; it must be true or false"),
    (routing(apply_on_input=0), r"routing\.apply_on_input is 0; it must be true or false"),
    (routing(top_k=True), r"routing\.top_k is True; it must be an integer"),
    (routing(top_k=2.0), r"routing\.top_k is 2\.0; it must be an integer"),
    (routing(num_groups=0), r"routing\.num_groups is 0; it must be an integer of at least 1"),
    (routing(scale="4"), r"routing\.scale is '4'; it must be a finite number"),
    (routing(scale=float("nan")), r"routing\.scale is nan; it must be a finite number"),
    (routing(scale=10**400), r"routing\.scale is 1.*; it must be a finite number"),
    (routing(scale=1e39), r"routing\.scale is 1e\+39; it must be a finite number from"),
    (routing(identity_experts=-1), r"routing\.identity_experts is -1; it must be an integer of at least 1"),
    (lambda f: f.update(shared_activation="silu"), r"shared_activation is 'silu'; it must be an object"),
    (routing(logits_soft_cap=0), r"routing\.logits_soft_cap is 0; it must be a finite number greater than 0"),
    (routing(scoring=["softmax"]), r"routing\.scoring is \['softmax'\]; it must be a string"),
    (routing(surprise=1), r"routing\.surprise is 1; it must be omitted"),
    (lambda f: f["routing"].pop("renormalize"), r"routing\.renormalize is missing"),
    (lambda f: f.pop("routing"), "routing is missing; it must be an object"),
    (lambda f: f.update(norm_epsilon=True), "norm_epsilon is True; it must be a finite number"),
    (lambda f: f.update(norm_epsilon=-1), "norm_epsilon is -1; it must be a finite number from 0"),
    (lambda f: f.update(surprise=1), "surprise is 1; it must be omitted"),
    (lambda f: f.update(activation="silu"), "activation is 'silu'; it must be an object"),
    (lambda f: f.update(activation={"name": "?", "parameters": []}), r"activation\.name is '\?'; it must be one of"),
    (lambda f: f["activation"].update(parameters=["1"]), r"activation\.parameters is \['1'\]; it must be 0 numbers"),
    (lambda f: f.update(activation={"name": "swiglu", "parameters": ["7"]}), "it must be 3 numbers as strings"),
    (lambda f: f.update(activation={"name": "swiglu", "parameters": ["x", "1", "0"]}), "it must be 3 numbers"),
    (lambda f: f.update(activation={"name": "swiglu", "parameters": ["nan", "1", "0"]}), "limit is nan"),
    (lambda f: f.update(matrices=[]), r"matrices is \[\]; it must be an object"),
    (lambda f: f["matrices"].update(down=8), r"matrices\.down is 8; it must be an object"),
    (lambda f: f["matrices"].update(up={}), r"matrices\.up is \{\}; it must be omitted"),
    (down(format="int3"), r"matrices\.down\.format is 'int3'; it must be one of"),
    (down(format=["int4"]), r"matrices\.down\.format is \['int4'\]; it must be one of"),
    (down(layout="a8"), r"matrices\.down\.layout is 'a8'; it must be 'a16'"),
    (down(row_padding="16"), r"matrices\.down\.row_padding is '16'; it must be an integer"),
    (down(column_padding=[True]), r"matrices\.down\.column_padding is \[True\]; it must be a list"),
    (down(column_padding=4), r"matrices\.down\.column_padding is 4; it must be a list"),
    (down(surprise=1), r"matrices\.down\.surprise is 1; it must be omitted"),
]
MISFITS = [
    (lambda f: f.update(matrices={}), r"nothing is said of down\.packed"),
    (lambda f: f["matrices"].pop("gate_up"), r"nothing is said of gate_up\.packed"),
    (lambda f: f["matrices"].update({"shared.down": f["matrices"]["down"]}), r"there is no shared\.gate_up"),
    (down(row_padding=16), "group_size|does not fit together: gate_up has N = 256 columns and down K = 112"),
    (routing(top_k=99), "does not fit together: top_k is 99"),
    (routing(scoring="?"), "does not fit together: scoring is"),
    (down(format="int8"), r"down\.scales|down is packed|down has"),
]


@pytest.mark.parametrize("version", [1, 2])
def test_wrong_facts_are_refused(folder, capsys, version):
    """Also where the digest is right: of version 1 it does not cover the facts."""
    cases = [*((*case, True) for case in WRONG_FACTS), *((*case, False) for case in MISFITS)]
    if version == 2:
        cases += [
            (down(group_size=0), r"matrices\.down\.group_size is 0; it must be an integer", True),
            (lambda f: f["matrices"]["down"].pop("group_size"), r"down\.group_size is missing", True),
            (down(group_size=64), "group_size|groups", False),
        ]
    else:
        as_version_1(folder)
    for number, (change, message, seen_by_inspect) in enumerate(cases):
        case = shutil.copytree(folder, folder.parent / str(number))
        if version == 1:
            edit(case, lambda v, change=change: change(v["layers"]["0"]["layer"]))
        else:
            edit_facts(case, lambda about, change=change: change(about["facts"]))
        file = packed_form.MANIFEST if version == 1 and seen_by_inspect else packed_form.file_of(0)
        with pytest.raises(ValueError, match=rf"(?s){case / file}.*(?:{message})"):
            load_moe_layer(case, 0)
        assert main(["inspect", str(case)]) == int(seen_by_inspect)
        assert ("cannot inspect: " in capsys.readouterr().err) == seen_by_inspect
        shutil.rmtree(case)


def as_version_1(folder):
    """Layer 0 as version 1 had it: facts in the manifest, without group sizes, and none in the file."""
    facts = {}
    edit_facts(folder, lambda about: facts.update(about.pop("facts")))
    for about in facts["matrices"].values():
        del about["group_size"]
    edit(folder, lambda v: v.update(version=1, layers={"0": v["layers"]["0"] | {"layer": facts}}))


@pytest.mark.parametrize(
    "change", [routing(renormalize=False), routing(scale=2.75), lambda f: f.update(norm_epsilon=1.0)]
)
def test_the_digest_covers_the_facts(folder, change):
    """Facts that are as good as others, but not those that were written."""
    edit_facts(folder, lambda about: change(about["facts"]), sign=False)
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors has SHA-256 .* the file is damaged"):
        load_moe_layer(folder, 0)


def test_a_file_of_another_layer_is_refused(folder):
    (folder / packed_form.file_of(1)).replace(folder / packed_form.file_of(0))
    edit(folder, lambda v: v["layers"]["0"].update(sha256=v["layers"]["1"]["sha256"]))
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors is of layer 1; .* names it for layer 0"):
        load_moe_layer(folder, 0)


def test_what_rows_are_quantised_to_is_asked_of_folders_that_say_it(folder):
    assert Checkpoint(folder).activation_dtype(1) is None
    edit_facts(folder, lambda about: about.update(activation_dtype="int4"))
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors: metadata\.layer: activation_dtype is .int4."):
        Checkpoint(folder).activation_dtype(0)
    edit_facts(folder, lambda about: about.pop("activation_dtype"))
    for old, layer in ((folder, 0), (DATA / "packed_version_1", 7)):
        with pytest.raises(ValueError, match=r"written before layers said what .*; ask the folder that"):
            Checkpoint(old).activation_dtype(layer)
    load_moe_layer(folder, 0)


@pytest.mark.parametrize("about", ["", "{", "[" * 100000, "[]", "{}"])
def test_files_without_facts_are_refused(folder, about):
    path = folder / packed_form.file_of(0)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["layer"] = about
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    edit(folder, lambda v: v["layers"]["0"].update(sha256=packed_form.sha256(path)))
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors: metadata"):
        load_moe_layer(folder, 0)


def test_version_1_loads():
    """A folder that was written when the form had no digest of its facts, and layers fewer fields."""
    assert_same(load_moe_layer(DATA / "packed_version_1", 7), full_layer(of_version_1=True))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipes_are_not_opened(folder, capsys):
    path = folder / packed_form.file_of(0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors is not a regular file"):
        load_moe_layer(folder, 0)
    assert main(["inspect", str(folder)]) == 1
    assert "is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("k", "size", "name", "fits"),
    [(128, 64, "int4", True), (96, 64, "int4", False), (96, 128, "int4", True), (40, 32, "mxfp4", True)],
)
def test_without_a_group_size_facts_are_enough_where_the_shapes_determine_it(k, size, name, fits):
    """Files of version 1: groups that divide K, one group, and formats of one group size; others are refused."""
    rng = np.random.default_rng(3)
    gate_up = random_experts(rng, 2, k, 128, weight_format=name, group_size=size).packed()
    down = random_experts(rng, 2, 64, k, weight_format="int4", group_size=32).packed()
    layer = MoELayer(gate_up, down, jnp.zeros((k, 2)), jmm.Routing(1, "softmax"))
    leaves, values = leaves_and_facts(layer)
    assert values["matrices"]["gate_up"].pop("group_size") == gate_up.group_size
    facts = read_facts(Keys(values, "manifest"), states_group_size=False)
    if fits:
        assert_same(layer_from(leaves, facts), layer)
    else:
        with pytest.raises(ValueError, match="gate_up states no group_size: group_size is 48; format int4 takes"):
            layer_from(leaves, facts)


def test_what_is_missing(folder):
    (folder / "layer-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"layer-00000\.safetensors is missing"):
        load_moe_layer(folder, 0)
    with pytest.raises(ValueError, match="layer 2 has no experts; layers with experts: 0 to 1"):
        load_moe_layer(folder, 2)


def test_what_is_packed_is_not_packed_again(folder, tmp_path):
    with pytest.raises(ValueError, match="is packed already"):
        convert(folder, tmp_path / "again")
    with pytest.raises(ValueError, match="is packed already; quantize='int4' is for plain weights"):
        load_moe_layer(folder, 0, quantize="int4")


def test_commands(tmp_path, capsys):
    target = str(tmp_path / "packed")
    assert main(["convert", str(DATA / "ck_q3"), target, "--quantize", "int8", "--group-size", "64"]) == 0
    assert "layer    1" in capsys.readouterr().out
    assert load_moe_layer(target, 0).gate_up.group_size == 64
    assert main(["inspect", target]) == 0
    output = capsys.readouterr().out
    assert "packed form, version 2, 2 layers" in output
    assert "gate_up int8, down int8; softmax top 2" in output
    assert main(["inspect", str(DATA / "ck_modelopt")]) == 0
    output = capsys.readouterr().out
    assert "qwen3_moe, quant_method modelopt (config.json)" in output
    assert "4 x mlp.experts.*.gate_proj.weight_scale  F8_E4M3 [128, 8]" in output
    assert main(["inspect", str(tmp_path)]) == 1
    assert "cannot inspect" in capsys.readouterr().err
    assert main(["convert", str(DATA / "ck_q3"), str(tmp_path / "other")]) == 1
    assert "pass quantize=" in capsys.readouterr().err
