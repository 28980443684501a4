"""Layers of every family beside transformers' own modules: what missing keys mean, routing, activation and layout.

Tiny random models are saved by transformers and loaded here as int8, which holds their experts exactly: what is left is
float16. Run with `-m parity` where the `parity` extra is installed; `--parity-table docs/families.md` writes the table.
"""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest
from checkpoint.parity_configs import CASES, SIZES, TEXT_MODELS, TRANSPOSED, VISION, WHOLE, E, H

from jax_marlin_moe.checkpoint import families, load_moe_layer
from jax_marlin_moe.checkpoint.family import get_family
from jax_marlin_moe.checkpoint.model_facts import read_facts

# What transformers and torch warn of is theirs.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ROWS = 40
LIMIT = 5e-4


@pytest.fixture(scope="module")
def table(request):
    """Rows of the table that is printed at the end, and written where the option names a file."""
    import transformers

    rows = []
    yield rows
    lines = ["| `model_type` | variant | error |", "|---|---|---:|"]
    lines += [f"| `{name}` | {variant} | {error:.1e} |" for name, variant, error in rows]
    write = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    for line in ["", *lines]:
        write(line)
    path = request.config.getoption("--parity-table")
    if path is not None:
        head = HEAD.format(version=transformers.__version__, limit=LIMIT)
        tail = ["| `model_type` | why |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in REFUSED.items())]
        apart = ", ".join(f"`{name}`" for name in sorted(WITHOUT_A_CLASS))
        text = [head, *lines, "", f"Without a class there, and so not in the table: {apart}.", "", REFUSED_HEAD, *tail]
        pathlib.Path(path).write_text("\n".join(text) + "\n", encoding="utf-8")


HEAD = """# Model families beside transformers

Written by `pytest -m parity --parity-table docs/families.md`: do not edit it by hand.

Each row is a tiny random model of transformers {version}, saved by it and loaded here as int8, which holds its experts
exactly. The error is that of a layer's results beside transformers' own module, relative to their norm: what is left is
routing, activation, layout, and float16, and at most {limit} is allowed. An empty variant is the configuration class
as it is.
"""
REFUSED_HEAD = """## Refused

Model types of transformers that have experts, and whose layers are not of the kind that is loaded here.
"""
# Every other class with keys of experts is in a row.
REFUSED = {
    "doge": "its experts are rows of two embeddings, found by product keys: there are no matrices of experts",
    "dots3_note_vision_encoder": "the experts of a vision tower, with routing by keys of its own",
    "evolla": "no layers of experts",
    "inkling2_loop": "files have experts in two quantisations of their own",
    "inkling2_loop_text": "likewise",
    "inkling_mm_model": "the weights of shared and routed experts come from one normalisation",
    "inkling_text": "likewise",
    "muse_spark": "a projection and norms stand between the layer's rows and its experts",
    "muse_spark_text": "likewise",
    "nllb-moe": "an encoder and a decoder whose experts have a capacity, beyond which tokens are dropped",
    "qwen3_omni_moe_talker_text": "of a whole model, the thinker's layers are loaded",
    "switch_transformers": "an encoder and a decoder whose experts have a capacity, beyond which tokens are dropped",
    "vitpose": "experts are chosen by data set, not by a router",
    "vitpose_backbone": "likewise",
    "zaya": "its router is a network that reads what the router of the layer before it has left",
}


def values_for(kind, special):
    """Values of a configuration class: sizes for the keys that it has, and special ones."""
    has = kind().to_dict()
    return {key: value for key, value in SIZES.items() if key in has} | special


def make_config(model_type, special):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**values_for(CONFIG_MAPPING[model_type], special))


def make_whole(model_type, text_type, special):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    given = kind().to_dict()
    vision = {key: value for key, value in VISION.items() if key in (given.get("vision_config") or {})}
    vision = {**vision, **({"model_type": given["vision_config"]["model_type"]} if vision else {})}
    text = {**values_for(CONFIG_MAPPING[text_type], special), "model_type": text_type}
    return kind(text_config=text, vision_config=vision or None)


def build(config):
    """A model with random weights whose experts int8 holds exactly."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = "text_config" not in config.to_dict()
    for auto in (AutoModelForCausalLM, AutoModel) if text else (AutoModelForImageTextToText, AutoModel):
        if type(config) in auto._model_mapping:
            model = auto.from_config(config, dtype=torch.float32).eval()
            break
    else:  # the text part of a model that has no class of its own for it
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        name = TEXT_MODELS.get(config.model_type, type(config).__name__.removesuffix("Config") + "Model")
        model = getattr(module, name)._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)

    def normal(shape):  # as in files: what bfloat16 holds, so that no weight is rounded on the way to float16
        return torch.randn(shape, generator=generator).bfloat16().float()

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not re.search(r"(layers|blocks)\.", name) or not value.dtype.is_floating_point:
                continue
            flat = re.search(r"\.experts\.mlp\.(w1|v1|w2)$", name)
            if flat or (value.ndim == 3 and re.search(r"\.experts\.|_linear\.weight", name)):
                axis = 1 if text_type(config) in TRANSPOSED else 2  # where inputs of a product lie
                axis = axis if flat is None else int(flat.group(1) != "w2")
                rows = value.shape[axis]
                codes = torch.randint(-127, 128, value.shape, generator=generator).float()
                codes.index_fill_(axis, torch.arange(0, rows, 32), 127.0)
                value.copy_(codes / 1024)
            elif value.ndim >= 2 or "norm" not in name:
                value.copy_(normal(value.shape) / 8)
        for name, value in model.named_buffers():
            if name.endswith("tid2eid"):
                value.copy_(torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(len(value))]))
    return model


def text_type(config):
    return config.get_text_config().model_type


def find_block(model):
    """The first module with experts and a router, the decoder layer that it is in, and its number."""
    for name, module in model.named_modules():
        numbers = re.search(r"(?:layers|blocks)\.([0-9]+)(?:\.|$)", name)
        if numbers and (
            hasattr(module, "text_moe")
            or (hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router")))
            or type(module).__name__ == "JetMoeMoE"
        ):
            return module, model.get_submodule(name.rpartition(".")[0]), int(numbers.group(1))
    raise AssertionError("the model has no block of experts")


def theirs(block, around, x, ids):
    """What transformers' module makes of rows, and the rows that its router reads where those are others."""
    import torch

    rows = torch.tensor(x)
    with torch.no_grad():
        if hasattr(block, "router") and hasattr(block.router, "per_expert_scale"):  # Gemma-4 has no module of its own
            _, weights, chosen = block.router(rows)
            return block.experts(rows, chosen, weights).numpy()
        out = block(rows[None], torch.tensor(ids)[None]) if getattr(block, "is_hash", False) else block(rows[None])
        out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        # Granite's shared expert is beside the block.
        return (out + around.shared_mlp(rows) if hasattr(around, "shared_mlp") else out).numpy()


def error_of(config, folder):
    import jax.numpy as jnp

    model = build(config)
    model.save_pretrained(folder)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, H)).astype(np.float16)
    ids = rng.integers(0, 64, ROWS)
    block, around, number = find_block(model)
    expected = theirs(block, around, x.astype(np.float32), ids)
    layer = load_moe_layer(folder, number, quantize="int8", group_size=32)
    token_ids = jnp.asarray(ids, jnp.int32) if layer.token_experts is not None else None
    y = np.asarray(layer(jnp.asarray(x), token_ids, implementation="xla"), np.float32)
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("model_type", "variant", "special"), CASES)
def test_a_layer_is_what_transformers_makes_of_it(tmp_path, table, model_type, variant, special):
    error = error_of(make_config(model_type, special), tmp_path)
    table.append((model_type, variant, error))
    assert error <= LIMIT


@pytest.mark.parametrize(("model_type", "inner", "special"), WHOLE)
def test_a_layer_of_a_whole_model_is_what_transformers_makes_of_it(tmp_path, table, model_type, inner, special):
    config = make_whole(model_type, inner, special)
    error = error_of(config, tmp_path)
    variant = ", ".join(["whole model", *(f"{key} {value}" for key, value in special.items() if "swiglu" in key)])
    table.append((model_type, variant, error))
    assert error <= LIMIT


def test_every_class_with_experts_is_in_a_row_or_refused_for_a_reason():
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = {name for row in families.FAMILIES for name in (*row.model_types, *row.wholes)}
    assert not known & REFUSED.keys()
    found = set()
    for name in CONFIG_MAPPING:
        try:
            values = CONFIG_MAPPING[name]().to_dict()
        except (StrictDataclassError, TypeError, ValueError):  # classes that need arguments
            continue
        parts = [values, *(part for part in values.values() if isinstance(part, dict))]
        if any(re.search("expert|moe", key) for part in parts for key in map(str, part)):
            found.add(name)
    assert sorted(found - known - REFUSED.keys()) == []
    for name in REFUSED:
        with pytest.raises(ValueError, match="model_type is"):
            get_family({"model_type": name}, "config.json", families.FAMILIES)


TYPES = [name for row in families.FAMILIES for name in row.model_types]
WITHOUT_A_CLASS = {"qwen3_6_moe", "qwen3_6_moe_text", "minimax_m3", "kimi_vl", "kimi_k2", "kimi_k3", "glm5_moe",
                   "gpt_oss_original", "bailing_moe", "bailing_moe_v2"}  # fmt: skip
# What a class leaves to the model.
NEEDED = {
    "num_experts": 64, "n_routed_experts": 64, "num_experts_per_tok": 4, "top_k_experts": 4,
    "moe_intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_missing_key_means_what_the_configuration_class_says(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert (model_type in CONFIG_MAPPING) == (model_type not in WITHOUT_A_CLASS)
    if model_type in WITHOUT_A_CLASS:
        return
    values = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    text = values.get("text_config") or values
    text.update({key: value for key, value in NEEDED.items() if key in text and text[key] is None})
    row, found, keys = get_family(values, "config.json", families.FAMILIES)
    whole = read_facts(row, found, keys)
    read = {*row.routing.keys, *row.activation.keys, "rms_norm_eps", row.correction_if}
    read |= set() if row.shared_activation is None else {*row.shared_activation.keys}
    names = {name for key in read for name in row.keys.get(key, (key,))} - {"num_shared_experts"}
    left = {key: value for key, value in keys.values.items() if key not in names}
    assert left.keys() != keys.values.keys()
    short = read_facts(row, found, type(keys)(left, "config.json", names=keys.names))
    assert short.routing == whole.routing
    assert (short.activation, short.shared_activation) == (whole.activation, whole.shared_activation)
    assert short.correction == whole.correction
    if row.input_scale is not None or row.output_norm is not None:
        assert short.norm_epsilon == whole.norm_epsilon
