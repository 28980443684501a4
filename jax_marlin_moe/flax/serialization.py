"""`flax.serialization` of packed weights and layers: importing this module registers them, as the layers do.

A state holds the arrays by their fields and, under "facts", what is not an array: format, group size, padding, routing,
activation. It is restored into a target that has the same facts, and arrays of the same shapes and dtypes.
"""

import dataclasses
import json
from typing import Any, TypeVar

import flax.serialization

from jax_marlin_moe.checkpoint import MoELayer, SharedExpert, StackedMoELayer
from jax_marlin_moe.checkpoint.facts import facts_of_rule, facts_of_weights
from jax_marlin_moe.checkpoint.with_facts import check_same
from jax_marlin_moe.layer import STATIC as LAYER_STATIC
from jax_marlin_moe.weights import STATIC as WEIGHTS_STATIC
from jax_marlin_moe.weights import MarlinWeights

Part = TypeVar("Part", MarlinWeights, SharedExpert, MoELayer, StackedMoELayer)

_FACTS: dict[type, Any] = {
    MarlinWeights: facts_of_weights,
    SharedExpert: lambda shared: {},
    MoELayer: facts_of_rule,
    StackedMoELayer: lambda stacked: {},
}
_STATIC = (*WEIGHTS_STATIC, *LAYER_STATIC)


def _to_state(part: Part) -> dict[str, Any]:
    facts = json.dumps(_FACTS[type(part)](part), sort_keys=True)
    values = {name: getattr(part, name) for name in _data_fields(part)}
    return {"facts": facts} | {
        name: flax.serialization.to_state_dict(value) for name, value in values.items() if value is not None
    }


def _from_state(target: Part, state: dict[str, Any]) -> Part:
    where = f"the target {type(target).__name__} at {flax.serialization.current_path()}"
    if not isinstance(state.get("facts"), str):
        raise ValueError(f"{where} must be restored from the state of one, with its facts; the state has {list(state)}")
    check_same(json.loads(state["facts"]), json.loads(json.dumps(_FACTS[type(target)](target))), where)
    fields = {name: getattr(target, name) for name in _data_fields(target)}
    present = {name for name, value in fields.items() if value is not None}
    check_same(sorted(state.keys() - {"facts"}), sorted(present), where, "the list of arrays")
    restored = {}
    for name in present:
        value = flax.serialization.from_state_dict(fields[name], state[name], name)
        if hasattr(fields[name], "dtype"):
            for fact in ("shape", "dtype"):
                check_same(getattr(value, fact), getattr(fields[name], fact), where, f"{name}.{fact}")
        restored[name] = value
    return dataclasses.replace(target, **restored)


def _data_fields(part: Part) -> list[str]:
    return [field.name for field in dataclasses.fields(part) if field.name not in _STATIC]


def register_states() -> None:
    """Registers the states; importing this module calls it."""
    for part in _FACTS:
        flax.serialization.register_serialization_state(part, _to_state, _from_state, override=True)


register_states()
