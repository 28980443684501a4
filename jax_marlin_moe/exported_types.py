"""How `jax.export` writes the static parts of our pytrees: as the JSON objects of the packed form.

With `register`, which the package calls when it is imported, a layer may be an argument or a result of an exported
function.
"""

import json
from collections.abc import Callable
from typing import Any

import jax

from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.checkpoint.facts import (
    read_activation,
    read_matrix,
    read_rule,
    refuse_unknown,
    write_activation,
    write_matrix,
    write_rule,
)
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.intermediate import KINDS, IntermediateQuantizer
from jax_marlin_moe.layer import STATIC as LAYER_STATIC
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.layer_slice import LayerSlice
from jax_marlin_moe.ops.align import BlockAlignment
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.stacked_layer import StackedMoELayer
from jax_marlin_moe.tensorrt_moe import TensorRTMoE
from jax_marlin_moe.weights import STATIC as WEIGHTS_STATIC
from jax_marlin_moe.weights import MarlinWeights


def _register_node(
    node: type, fields: tuple[str, ...], write: Callable[..., dict[str, Any]], read: Callable[[Keys], dict[str, Any]]
) -> None:
    """Registers `node`, whose static fields in the order of their registration as a pytree are `fields`.

    Args:
        node: the class.
        fields: names of its static fields.
        write: their values, in that order, to JSON.
        read: JSON to values by name.
    """
    name = f"jax_marlin_moe.{node.__name__}"

    def serialize(values: tuple) -> bytes:
        return json.dumps(write(*values), allow_nan=False).encode()

    def deserialize(data: bytes) -> tuple:
        try:
            values = read(Keys(json.loads(data), f"the exported {name}"))
            return tuple(values[field] for field in fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{error}: the function was exported by another version of jax_marlin_moe; export it again"
            ) from None

    jax.export.register_pytree_node_serialization(
        node, serialized_name=name, serialize_auxdata=serialize, deserialize_auxdata=deserialize
    )


def _write_layer(*values: Any) -> dict[str, Any]:
    """As in the packed form; and which activations are their names, since trees that differ in that do too."""
    named = [field for field, value in zip(LAYER_STATIC, values, strict=True) if isinstance(value, str)]
    return write_rule(*values) | {"by_name": named}


def _read_layer(keys: Keys) -> dict[str, Any]:
    refuse_unknown(keys, (*LAYER_STATIC, "by_name"))
    named = keys.texts("by_name")
    return {
        field: get_activation(value) if isinstance(value, str) and field not in named else value
        for field, value in zip(LAYER_STATIC, read_rule(keys), strict=True)
    }


def _write_alignment(block_size: int, num_experts: int) -> dict[str, int]:
    return {"block_size": block_size, "num_experts": num_experts}


def _read_alignment(keys: Keys) -> dict[str, int]:
    return {name: keys.integer(name, low=1) for name in ("block_size", "num_experts")}


def _write_slice(group: int | None) -> dict[str, int]:
    return {} if group is None else {"group": group}


def _read_slice(keys: Keys) -> dict[str, Any]:
    return {"group": keys.integer("group", low=0) if "group" in keys.values else None}


def register() -> None:
    """Tells `jax.export` of every pytree of ours; once in a process."""
    _register_node(MarlinWeights, WEIGHTS_STATIC, write_matrix, read_matrix)
    _register_node(BlockAlignment, ("block_size", "num_experts"), _write_alignment, _read_alignment)
    _register_node(SharedExpert, (), dict, lambda keys: {})
    _register_node(MoELayer, LAYER_STATIC, _write_layer, _read_layer)
    _register_node(StackedMoELayer, (), dict, lambda keys: {})
    _register_node(LayerSlice, ("group",), _write_slice, _read_slice)
    _register_node(
        IntermediateQuantizer,
        ("kind",),
        lambda kind: {"kind": kind},
        lambda keys: {"kind": keys.choice("kind", [*KINDS])},
    )
    _register_node(
        TensorRTMoE,
        ("activation",),
        write_activation,
        lambda keys: {"activation": get_activation(read_activation(keys))},
    )
