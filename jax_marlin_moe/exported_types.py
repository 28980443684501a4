"""How `jax.export` writes the static parts of our pytrees: as JSON objects, one entry per field.

With `register`, which the package calls when it is imported, a layer may be an argument or a result of an exported
function.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax

from jax_marlin_moe.activations import Activation, get_activation, make_activation
from jax_marlin_moe.formats import FORMATS, WeightFormat, get_format
from jax_marlin_moe.layer import MoELayer, SharedExpert
from jax_marlin_moe.ops.align import BlockAlignment
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class _Field:
    """The JSON form of one static field."""

    write: Callable[[Any], Any] = lambda value: value
    read: Callable[[Any], Any] = lambda value: value


def _write_format(row: WeightFormat) -> str:
    if FORMATS.get(row.name) != row:
        raise ValueError(f"format is {row}; to be exported it must be a row of jax_marlin_moe.FORMATS")
    return row.name


def _write_activation(activation: str | Activation) -> Any:
    if isinstance(activation, str):
        return activation
    made = get_activation(activation)
    return {"name": made.name, "parameters": [str(value) for value in made.parameters]}  # JSON has no infinity


def _read_activation(facts: Any) -> str | Activation:
    if isinstance(facts, str):
        return facts
    return make_activation(facts["name"], [float(value) for value in facts["parameters"]])


def _register_node(node: type, fields: dict[str, _Field]) -> None:
    """Registers `node`, whose static fields in the order of their registration as a pytree are `fields`."""
    name = f"jax_marlin_moe.{node.__name__}"

    def write(values: tuple) -> bytes:
        facts = {key: field.write(value) for (key, field), value in zip(fields.items(), values, strict=True)}
        return json.dumps(facts, allow_nan=False).encode()

    def read(data: bytes) -> tuple:
        facts = json.loads(data)
        if list(facts) != list(fields):
            raise ValueError(
                f"the exported {name} has the fields {list(facts)}; this version of jax_marlin_moe needs "
                f"{list(fields)}: export the function again"
            )
        return tuple(field.read(facts[key]) for key, field in fields.items())

    jax.export.register_pytree_node_serialization(
        node, serialized_name=name, serialize_auxdata=write, deserialize_auxdata=read
    )


_PLAIN = _Field()


def register() -> None:
    """Tells `jax.export` of every pytree of ours; once in a process."""
    _register_node(
        MarlinWeights,
        {
            "format": _Field(_write_format, get_format),
            "group_size": _PLAIN,
            "layout": _PLAIN,
            "row_padding": _PLAIN,
            "column_padding": _Field(read=tuple),
        },
    )
    _register_node(BlockAlignment, {"block_size": _PLAIN, "num_experts": _PLAIN})
    _register_node(SharedExpert, {})
    _register_node(
        MoELayer,
        {
            "routing": _Field(dataclasses.asdict, lambda facts: Routing(**facts)),
            "activation": _Field(_write_activation, _read_activation),
            "norm_epsilon": _PLAIN,
        },
    )
