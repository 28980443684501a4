"""The facts of a layer: all that is not an array, as JSON; and a layer from its facts and its arrays."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jax_marlin_moe.activations import PARAMETERS, Activation, get_activation, make_activation
from jax_marlin_moe.arguments import check_weights
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.formats import FORMATS, WeightFormat, get_format
from jax_marlin_moe.layer import STATIC as LAYER_STATIC
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.layout import TILE_K
from jax_marlin_moe.packing import resolve_group_size
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import LEAVES, STATIC, MarlinWeights

_MATRICES = ("gate_up", "down", "shared.gate_up", "shared.down")
_LAYER_LEAVES = tuple(
    field.name
    for field in dataclasses.fields(MoELayer)
    if field.name not in (*LAYER_STATIC, "gate_up", "down", "shared")
)
_LARGEST = float(np.finfo(np.float32).max)
_READERS: dict[Any, Any] = {
    bool: Keys.boolean,
    int: lambda keys, name, *default: keys.integer(name, *default, low=1),
    float: lambda keys, name, *default: keys.number(name, *default, low=-_LARGEST, high=_LARGEST),
    str: Keys.text,
    float | None: lambda keys, name, *default: keys.number(name, *default, above=0, high=_LARGEST),
}
# What a routing rule has said since version 1. A later field is written where it is not its default, and read so: what
# was saved before there was such a field still says the same.
_FIRST_ROUTING = (
    "top_k", "scoring", "renormalize", "softmax_after_topk", "num_groups", "top_groups", "group_score", "scale",
    "apply_on_input",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a layer is beside its arrays.

    Attributes:
        routing: the rule.
        activation: as in `MoELayer`.
        norm_epsilon: likewise.
        shared_activation: likewise.
        matrices: of each packed matrix, by its path, the static fields of `MarlinWeights`; `group_size` is None where
            the facts do not state it.
    """

    routing: Routing
    activation: str | Activation
    norm_epsilon: float
    shared_activation: str | Activation | None
    matrices: Mapping[str, Mapping[str, Any]]


def leaves_and_facts(layer: MoELayer) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays by path, and everything else as JSON."""
    leaves: dict[str, jax.Array] = {}
    facts: dict[str, Any] = facts_of_rule(layer) | {"matrices": {}}

    def add(path: str, value: Any) -> None:
        if isinstance(value, MarlinWeights):
            for name in LEAVES:
                if getattr(value, name) is not None:
                    leaves[f"{path}.{name}"] = getattr(value, name)
            facts["matrices"][path] = facts_of_weights(value)
        elif value is not None:
            leaves[path] = value

    add("gate_up", layer.gate_up)
    add("down", layer.down)
    for name in _LAYER_LEAVES:
        add(name, getattr(layer, name))
    if layer.shared is not None:
        for name in ("gate_up", "down", "gate"):
            add(f"shared.{name}", getattr(layer.shared, name))
    return leaves, facts


def facts_of_rule(layer: MoELayer) -> dict[str, Any]:
    """The facts of a layer without those of its matrices."""
    return write_rule(*(getattr(layer, name) for name in LAYER_STATIC))


def facts_of_weights(weights: MarlinWeights) -> dict[str, Any]:
    """The facts of packed weights."""
    return write_matrix(*(getattr(weights, name) for name in STATIC))


def write_rule(
    routing: Routing, activation: str | Activation, norm_epsilon: float, shared_activation: str | Activation | None
) -> dict[str, Any]:
    """The static fields of a `MoELayer`, in their order, as JSON; the last one only where there is one."""
    rule = {
        "routing": {
            field.name: getattr(routing, field.name)
            for field in dataclasses.fields(routing)
            if field.name in _FIRST_ROUTING or getattr(routing, field.name) != field.default
        },
        "activation": write_activation(activation),
        "norm_epsilon": norm_epsilon,
    }
    return rule if shared_activation is None else rule | {"shared_activation": write_activation(shared_activation)}


def write_matrix(
    row: WeightFormat, group_size: int, layout: str, row_padding: int, column_padding: tuple[int, ...]
) -> dict[str, Any]:
    """The static fields of `MarlinWeights`, in their order, as JSON.

    Raises:
        ValueError: the format is not in the registry, so its name does not say what it is.
    """
    if FORMATS.get(row.name) != row:
        raise ValueError(f"format is {row}; to be written it must be a row of jax_marlin_moe.FORMATS")
    return {
        "format": row.name,
        "layout": layout,
        "group_size": group_size,
        "row_padding": row_padding,
        "column_padding": list(column_padding),
    }


def read_facts(keys: Keys, *, states_group_size: bool) -> Facts:
    """Facts from JSON.

    Args:
        keys: what `leaves_and_facts` made.
        states_group_size: whether matrices must state it.

    Raises:
        ValueError: a fact is missing, not known, or is not what it must be; names file, key and value.
    """
    refuse_unknown(keys, (*LAYER_STATIC, "matrices"))
    routing, activation, norm_epsilon, shared_activation = read_rule(keys)
    matrices = keys.object("matrices")
    refuse_unknown(matrices, _MATRICES)
    return Facts(
        routing=routing,
        activation=activation,
        norm_epsilon=norm_epsilon,
        shared_activation=shared_activation,
        matrices={path: read_matrix(matrices.object(path), states_group_size) for path in matrices.values},
    )


def read_rule(keys: Keys) -> tuple[Routing, str | Activation, float, str | Activation | None]:
    """The inverse of `write_rule`; errors as for `read_facts`."""
    routing = keys.object("routing")
    fields = dataclasses.fields(Routing)
    refuse_unknown(routing, [field.name for field in fields])
    rule = {
        field.name: _READERS[field.type](
            routing, field.name, *([] if field.name in _FIRST_ROUTING else [field.default])
        )
        for field in fields
    }
    norm_epsilon = keys.number("norm_epsilon", low=0, high=_LARGEST)
    shared = keys.object("shared_activation", None)
    activation = read_activation(keys.object("activation"))
    return Routing(**rule), activation, norm_epsilon, None if shared is None else read_activation(shared)


def read_matrix(keys: Keys, states_group_size: bool = True) -> dict[str, Any]:
    """The inverse of `write_matrix`, by field; errors as for `read_facts`."""
    refuse_unknown(keys, STATIC)
    padding = keys.values.get("column_padding")
    if not isinstance(padding, list) or not all(
        isinstance(columns, int) and not isinstance(columns, bool) and columns >= 0 for columns in padding
    ):
        raise ValueError(f"{keys.source}: {keys.path}column_padding is {padding!r}; it must be a list of columns")
    layout = keys.text("layout")
    if not re.fullmatch("a16(/[1-9][0-9]{0,8})?", layout):
        raise keys.fault("layout", "'a16', or 'a16/' and the columns of a rank")
    return {
        "format": get_format(keys.choice("format", sorted(FORMATS))),
        "layout": layout,
        "group_size": keys.integer("group_size", low=1) if states_group_size else None,
        "row_padding": keys.integer("row_padding", low=0),
        "column_padding": tuple(padding),
    }


def layer_from(leaves: Mapping[str, jax.Array], facts: Facts) -> MoELayer:
    """The inverse of `leaves_and_facts`.

    Raises:
        TypeError: an array has a dtype that the facts do not allow.
        ValueError: arrays and facts do not fit each other.
    """
    known = {f"{path}.{name}" for path in facts.matrices for name in LEAVES}
    known |= {*_LAYER_LEAVES, "shared.gate_up", "shared.down", "shared.gate"}
    unknown = sorted(leaves.keys() - known)
    if unknown:
        raise ValueError(f"nothing is said of {unknown[0]}; the layer would be loaded without it")

    def matrix(path: str) -> Any:
        if path not in facts.matrices:
            return leaves.get(path)
        if f"{path}.packed" not in leaves or f"{path}.scales" not in leaves:
            raise ValueError(f"there is no {path}.packed with its {path}.scales")
        arrays: dict[str, Any] = {name: leaves.get(f"{path}.{name}") for name in LEAVES}
        about = dict(facts.matrices[path])
        if about["group_size"] is None:
            about["group_size"] = _group_size(path, about, arrays["packed"], arrays["scales"])
        weights = MarlinWeights(**arrays, **about)
        check_weights(path, weights)
        return weights

    def needed(path: str) -> Any:
        value = matrix(path)
        if value is None:
            raise ValueError(f"there is no {path}")
        return value

    shared = None
    if any(path.startswith("shared.") for path in (*leaves, *facts.matrices)):
        shared = SharedExpert(needed("shared.gate_up"), needed("shared.down"), leaves.get("shared.gate"))
    return MoELayer(
        gate_up=needed("gate_up"),
        down=needed("down"),
        routing=facts.routing,
        activation=facts.activation,
        shared=shared,
        norm_epsilon=facts.norm_epsilon,
        shared_activation=facts.shared_activation,
        **{name: needed(name) if name == "router" else leaves.get(name) for name in _LAYER_LEAVES},  # type: ignore[arg-type]
    )


def refuse_unknown(keys: Keys, known: Collection[str]) -> None:
    """Raises ValueError where an object has a key that is not known."""
    for key in keys.values:
        if key not in known:
            raise keys.fault(key, "omitted: this package does not know it")


def write_activation(activation: str | Activation) -> dict[str, Any]:
    """The JSON object of an activation."""
    made = get_activation(activation)
    # JSON has no infinity.
    return {"name": made.name, "parameters": [str(value) for value in made.parameters]}


def read_activation(keys: Keys) -> str | Activation:
    """What `write_activation` wrote, as a name where it has no parameters; raises ValueError for anything else."""
    refuse_unknown(keys, ("name", "parameters"))
    name = keys.choice("name", sorted(PARAMETERS))
    texts = keys.texts("parameters")
    wanted = PARAMETERS[name]
    try:
        values = [float(text) for text in texts]
        if len(values) != wanted:
            raise ValueError(f"{name} has {wanted} parameters")
        activation = make_activation(name, values)
    except ValueError as error:
        raise keys.fault("parameters", f"{wanted} numbers as strings, as {name} takes them", f" ({error})") from None
    return activation if activation.parameters else activation.name


def _group_size(path: str, about: Mapping[str, Any], packed: jax.Array, scales: jax.Array) -> int:
    """The group size of a matrix whose facts do not state it, as the shapes determine it.

    Raises:
        ValueError: they do not.
    """
    if packed.ndim != 3 or scales.ndim != 3:
        raise ValueError(f"{path}.packed and {path}.scales must have 3 dimensions")
    k = packed.shape[1] * TILE_K - about["row_padding"]
    try:
        return resolve_group_size(None, k, scales.shape[1], about["format"])
    except ValueError as error:
        raise ValueError(f"{path} states no group_size: {error}; convert the source again") from None
