"""Qwen3-MoE: grouped-query attention with normalised queries and keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples import decoder
from examples.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class Sizes(decoder.Sizes):
    """What the decoder needs of config.json."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sizes":
        """Reads them.

        Raises:
            ValueError: the config is of another model, or has something that this decoder does not compute.
        """
        decoder.check_config(config, "qwen3_moe", use_sliding_window=False, attention_bias=False, hidden_act="silu")
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            rotary=Rotary.of(config, head_dim, theta=10000.0),
        )

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """Keys and values."""
        return ((self.kv_heads, self.head_dim),) * 2

    def attention(self, reader: decoder.Reader, number: int) -> decoder.GroupedAttention:
        """That of all layers."""
        return decoder.GroupedAttention(reader, self.head_dim, self.rotary, norm_epsilon=self.epsilon)
