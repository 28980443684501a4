"""Facts beside the arrays, for savers that keep arrays alone and restore them into a template, such as Orbax.

A template of another format, group size, padding, routing rule or activation would give the arrays another meaning,
and nothing would tell. With the facts as one more array, it is refused.
"""

import json
from typing import Any

import jax
import numpy as np

from jax_marlin_moe.checkpoint.facts import facts_of_weights, leaves_and_facts
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.weights import MarlinWeights

# Facts of different lengths mostly have arrays of equal ones, so that what differs is found here and is named.
_STEP = 4096


def with_facts(tree: Any) -> dict[str, Any]:
    """A tree to save, or the template to restore it into: `{"tree": tree, "facts": uint8 array}`.

    Args:
        tree: any pytree with `MarlinWeights` or `MoELayer` in it; their leaves may be arrays or shapes.
    """
    text = json.dumps(_facts(tree), sort_keys=True).encode()
    return {"tree": tree, "facts": np.frombuffer(text.ljust(-(-len(text) // _STEP) * _STEP), np.uint8)}


def without_facts(restored: dict[str, Any]) -> Any:
    """The tree of what was restored into `with_facts(template)`, once its facts are those that were saved.

    Raises:
        ValueError: a fact of the template is not what was saved; names it and both values.
    """
    try:
        saved = json.loads(np.asarray(restored["facts"], np.uint8).tobytes())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"restored has no facts; it must have been saved as with_facts(tree): {error!r}") from None
    found = _facts(restored["tree"])
    for path in sorted(saved.keys() | found.keys()):
        if path not in found:
            raise ValueError(
                f"the saved tree has packed weights at {path or 'its root'}, and the template has none there"
            )
        if path not in saved:
            raise ValueError(
                f"the template has packed weights at {path or 'its root'}, and the saved tree has none there"
            )
    check_same(saved, found, "the template")
    return restored["tree"]


def check_same(saved: Any, found: Any, what: str, path: str = "") -> None:
    """Raises ValueError, with the path of the first difference, unless two values of JSON are equal.

    Args:
        saved: what was saved.
        found: what must be equal to it.
        what: says in the message where `found` is from.
        path: of both.
    """
    if isinstance(saved, dict) and isinstance(found, dict) and saved.keys() == found.keys():
        for key in saved:
            check_same(saved[key], found[key], what, f"{path}.{key}" if path else key)
    elif saved != found:
        raise ValueError(f"{path} is {found!r} in {what}; it must be {saved!r}, as it was saved")


def _facts(tree: Any) -> dict[str, Any]:
    """By path, the facts of all packed weights and layers."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, MarlinWeights | MoELayer))[
        0
    ]
    facts = {}
    for path, leaf in found:
        if isinstance(leaf, MoELayer):
            facts[jax.tree_util.keystr(path)] = leaves_and_facts(leaf)[1]
        elif isinstance(leaf, MarlinWeights):
            facts[jax.tree_util.keystr(path)] = facts_of_weights(leaf)
    return facts
