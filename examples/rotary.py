"""Rotary positions, plain or stretched by YaRN."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of rotary positions, under the names that config.json has for them now."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta"))
    return rope


def mscale(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN sharpens the attention for a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates pairs of dimensions by their position.

    Attributes:
        frequencies: one per pair.
        factor: of the rotated values.
        interleaved: whether neighbours are a pair, rather than a dimension of the first half and one of the second.
            The result has the halves apart either way: the order within queries and keys is the same.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], size: int, *, theta: float, interleaved: bool = False) -> "Rotary":
        """The rotation that a config asks for.

        Args:
            config: the contents of config.json.
            size: how many dimensions are rotated.
            theta: the base where the config has none.
            interleaved: as the attribute.

        Raises:
            ValueError: the type is neither "default" nor "yarn".
        """
        rope = rope_of(config)
        base = rope["rope_theta"] or theta
        plain = base ** (-np.arange(0, size, 2) / size)
        if rope["rope_type"] == "default":
            return cls(tuple(plain.tolist()), 1.0, interleaved)
        if rope["rope_type"] != "yarn":
            raise ValueError(f"rope_type is {rope['rope_type']!r}; this decoder computes 'default' and 'yarn' alone")
        original = rope["original_max_position_embeddings"]
        stretch = rope.get("factor") or config["max_position_embeddings"] / original

        def pair_of(turns: float) -> float:
            """The pair, as a real number, that turns so often within the original context."""
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_of(rope.get("beta_fast") or 32), pair_of(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        slow = np.clip((np.arange(size // 2) - low) / ((high - low) or 1e-3), 0, 1)
        factor, weights = rope.get("attention_factor"), (rope.get("mscale"), rope.get("mscale_all_dim"))
        if factor is None:
            factor = mscale(stretch, weights[0]) / mscale(stretch, weights[1]) if all(weights) else mscale(stretch)
        return cls(tuple((plain * (slow / stretch + 1 - slow)).tolist()), factor, interleaved)

    def __call__(
        self, x: Float[Array, "batch tokens heads size"], positions: Int32[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens heads size"]:
        """The rotated rows, computed in float32."""
        angles = positions[..., None, None] * jnp.asarray(self.frequencies, jnp.float32)
        cos, sin = jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor
        wide = x.astype(jnp.float32)
        a, b = (wide[..., 0::2], wide[..., 1::2]) if self.interleaved else jnp.split(wide, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
