"""`load_moe_layer`: the experts and the router of one layer of a checkpoint."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.checkpoint.families import Family, get_family
from jax_marlin_moe.checkpoint.schemes import find_scheme
from jax_marlin_moe.checkpoint.tensors import TensorFolder, read_json
from jax_marlin_moe.quantize import fold_input_order
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class MoELayer:
    """The experts of one layer and how tokens are routed to them. A pytree: arrays are leaves, the rest is static.

    Attributes:
        gate_up: E matrices (H, 2 I), columns [gate | up].
        down: E matrices (I, H).
        router: kernel of the router, input dimension first, in the checkpoint's dtype: `logits = x @ router`.
        top_k: experts per token.
        renormalize: whether the chosen router weights are divided by their sum, for `jax_marlin_moe.route`.
        scoring: likewise.
        activation: for `jax_marlin_moe.fused_moe`.
    """

    gate_up: MarlinWeights
    down: MarlinWeights
    router: Float[Array, "H E"]
    top_k: int
    renormalize: bool
    scoring: str = "softmax"
    activation: str = "silu"


jax.tree_util.register_dataclass(
    MoELayer,
    data_fields=["gate_up", "down", "router"],
    meta_fields=["top_k", "renormalize", "scoring", "activation"],
)


def load_moe_layer(path: str | os.PathLike, layer: int) -> MoELayer:
    """Loads one mixture-of-experts layer of a quantised checkpoint, bit for bit.

    Formats: AutoAWQ "gemm" and GPTQ v1 and v2 (act-order included), 4 bit. Names: Qwen3-MoE and Mixtral. Scales keep
    the dtype that they have on disk; x may be float16 or bfloat16 all the same. Only this layer's tensors are read.
    An act-order of the down matrices is folded into the columns of gate and up.

    Args:
        path: the folder with config.json and safetensors files.
        layer: its number, from 0.

    Returns:
        The packed experts, on JAX's default device, and the facts that routing needs.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: the model, its quantisation or the layer is not supported, or a tensor is missing or does not fit
            the config. Messages name the file, the tensor, what was expected and what was found.
    """
    folder = pathlib.Path(path)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; pass the folder of a checkpoint")
    config = read_json(config_path)
    family = get_family(config.get("model_type"), config_path)
    scheme, parameters = find_scheme(folder, config)

    hidden = _integer(config, ("hidden_size",), config_path)
    intermediate = _integer(config, (family.intermediate_key,), config_path)
    num_experts = _integer(config, family.num_experts_keys, config_path)
    top_k = _integer(config, ("num_experts_per_tok",), config_path)
    if top_k > num_experts:
        raise ValueError(f"{config_path}: num_experts_per_tok is {top_k}, more than the {num_experts} experts")
    activation = config.get("hidden_act", "silu")
    try:
        get_activation(activation)
    except ValueError as error:
        raise ValueError(f"{config_path}: hidden_act: {error}") from None
    renormalize = family.renormalize
    if isinstance(renormalize, str):
        renormalize = bool(config.get(renormalize, False))

    with TensorFolder(folder) as files:
        _check_experts(files, family, layer, num_experts)

        def linears(*names: str) -> list[tuple[str, ...]]:
            return [tuple(family.expert(layer, e, name) for name in names) for e in range(num_experts)]

        gate_up = scheme.read_matrix(files, linears(family.gate, family.up), hidden, intermediate, parameters)
        down = scheme.read_matrix(files, linears(family.down), intermediate, hidden, parameters)
        router = files.read(
            f"{family.block.format(layer=layer)}.{family.router}",
            (num_experts, hidden),
            ("F16", "BF16", "F32"),
        )
    gate_up, down = fold_input_order(gate_up, down)
    return MoELayer(
        gate_up=gate_up,
        down=down,
        router=jnp.asarray(router.T),
        top_k=top_k,
        renormalize=renormalize,
        activation=activation,
    )


def _integer(config: Mapping[str, Any], keys: Sequence[str], source: pathlib.Path) -> int:
    for key in keys:
        if key in config:
            if not isinstance(config[key], int) or config[key] < 1:
                raise ValueError(f"{source}: {key} is {config[key]!r}; it must be a positive integer")
            return config[key]
    raise ValueError(f"{source}: {' or '.join(keys)} is missing")


def _check_experts(files: TensorFolder, family: Family, layer: int, num_experts: int) -> None:
    """The tensors that exist decide: which layers have experts, and how many."""
    before, after = family.block.split("{layer}")
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}\.experts\.(\d+)\.")
    found: dict[int, set[int]] = {}
    for match in filter(None, map(pattern.match, files.names)):
        found.setdefault(int(match.group(1)), set()).add(int(match.group(2)))
    if layer not in found:
        layers = f"{min(found)} to {max(found)}" if found else "none"
        raise ValueError(f"{files.folder}: layer {layer} has no experts; layers with experts: {layers}")
    if found[layer] != set(range(num_experts)):
        raise ValueError(
            f"{files.folder}: layer {layer} has tensors of {len(found[layer])} experts; config.json says {num_experts}"
        )
