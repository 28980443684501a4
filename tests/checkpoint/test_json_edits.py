"""One value of one JSON file of a checkpoint set to something odd: it loads as it was or by the rule that the value
says, or an error names the file. Never another exception, never other weights.
"""

import copy
import dataclasses
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jax_marlin_moe.checkpoint import load_moe_layer

DATA = pathlib.Path(__file__).parents[1] / "data"
FOLDERS = sorted(path.name for path in DATA.glob("ck_*"))

ODD = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 64.5, 4.0, 1e30, float("nan"), float("inf"), 10**30,
    "", "x", "false", "4", "\ud800", [], [0], ["x"], {}, {"a": {}},
)  # fmt: skip

# Keys that the files do not have, added with odd values.
ADDED = (
    "n_group", "topk_group", "topk_method", "swiglu_limit", "swiglu_alpha", "hidden_activation", "mlp_hidden_act",
    "scoring_func", "routed_scaling_factor", "text_config", "compression_config", "n_shared_experts",
    "num_shared_experts", "shared_expert_intermediate_size", "moe_latent_size", "num_experts", "n_routed_experts",
    "experts_per_token", "moe_top_k", "num_experts_per_token", "router_logit_softcapping", "zero_expert_num",
)  # fmt: skip
ADDED_TO_QUANTIZATION = (
    "dynamic", "extra_config", "packing_format", "weight_block_size", "quantization", "quant_algo", "bits", "w_bit",
    "q_group_size", "version", "zero_point", "desc_act", "checkpoint_format", "pack_dtype", "format", "quant_config",
    "config_groups", "transform_config",
)  # fmt: skip
# Keys that decide what a layer is get more of the odd values.
DECIDING = {
    "model_type", "hidden_size", "moe_intermediate_size", "num_local_experts", "num_experts_per_tok", "norm_topk_prob",
    "hidden_act", "rms_norm_eps", "num_hidden_layers", "n_group", "routed_scaling_factor", "text_config",
    "quantization_config", "bits", "group_size", "num_bits", "quant_method",
}  # fmt: skip


def paths(value, path=()):
    """Where every value inside an object is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def edits(values, turn):
    """Edits of one file: every place, each with its share of the odd values; `turn` lets folders share them out."""
    places = list(paths(values))
    if "model_type" in values:
        places += [(key,) for key in ADDED if key not in values]
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict):
        places += [("quantization_config", key) for key in ADDED_TO_QUANTIZATION if key not in quantization]
    for number, place in enumerate(places):
        share = 5 if place[-1] in DECIDING else 1
        for i in range(share):
            yield place, ODD[(number * 7 + turn * 3 + i * 5) % len(ODD)]


def edited(values, place, value):
    values = copy.deepcopy(values)
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = copy.deepcopy(value)
    return values


def load(folder):
    options = {"quantize": "int4", "group_size": 128} if folder.name == "ck_q3" else {}
    return load_moe_layer(folder, 0, **options)


def check_facts(layer):
    """Facts of a layer that cannot be wrong by type."""
    kinds = {int: (int,), bool: (bool,), str: (str,), float: (float,), float | None: (float, type(None))}
    for field in dataclasses.fields(layer.routing):
        value = getattr(layer.routing, field.name)
        assert type(value) in kinds[field.type], (field.name, value)
    assert math.isfinite(layer.routing.scale)
    assert layer.routing.scale > 0
    assert type(layer.norm_epsilon) is float
    assert math.isfinite(layer.norm_epsilon)
    assert layer.norm_epsilon >= 0


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", FOLDERS)
def test_an_odd_value_is_refused_by_name_or_changes_no_weight(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    good = jax.tree.leaves(load(folder))
    good = [np.asarray(leaf) for leaf in good]
    faults, tried = [], 0
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        for place, value in edits(json.loads(text), FOLDERS.index(name)):
            path.write_text(json.dumps(edited(json.loads(text), place, value)))
            what, tried = f"{path.name}: {'.'.join(map(str, place))} = {value!r}", tried + 1
            try:
                layer = load(folder)
            except (ValueError, OSError) as error:
                if str(folder) not in str(error):
                    faults.append(f"{what}: no file is named: {error}")
                continue
            except Exception as error:
                faults.append(f"{what}: {error!r}")
                continue
            leaves = jax.tree.leaves(layer)
            check_facts(layer)
            if len(leaves) != len(good) or not all(
                a.shape == b.shape and a.tobytes() == np.asarray(b).tobytes() for a, b in zip(good, leaves, strict=True)
            ):
                faults.append(f"{what}: loads other weights")
        path.write_text(text)
    assert tried > 50
    assert not faults, "\n".join(faults)
