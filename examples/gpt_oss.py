"""gpt-oss: grouped-query attention with biases and sinks, in every other layer over a sliding window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from examples import decoder
from examples.rotary import Rotary

KINDS = ("sliding_attention", "full_attention")


@dataclasses.dataclass(frozen=True)
class Sizes(decoder.Sizes):
    """What the decoder needs of config.json."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    windows: tuple[int | None, ...]
    rotary: Rotary

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sizes":
        """Reads them.

        Raises:
            ValueError: the config is of another model, or has something that this decoder does not compute.
        """
        decoder.check_config(config, "gpt_oss", hidden_act="silu")
        layers = config["num_hidden_layers"]
        kinds = config.get("layer_types") or [KINDS[number % 2] for number in range(layers)]
        if len(kinds) != layers or not set(kinds) <= set(KINDS):
            raise ValueError(
                f"layer_types is {kinds}; it must have one of {', '.join(KINDS)} for each of {layers} layers"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            layers=layers,
            hidden=config["hidden_size"],
            vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", 1e-5),
            tied=config.get("tie_word_embeddings", False),
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            bias=config.get("attention_bias", True),
            windows=tuple(config.get("sliding_window", 128) if kind == KINDS[0] else None for kind in kinds),
            rotary=Rotary.of(config, head_dim, theta=150000.0),
        )

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """Keys and values; layers with a window have room for all tokens too."""
        return ((self.kv_heads, self.head_dim),) * 2

    def attention(self, reader: decoder.Reader, number: int) -> decoder.GroupedAttention:
        """That of a layer: over a window, or over all tokens."""
        return decoder.GroupedAttention(
            reader, self.head_dim, self.rotary, bias=self.bias, window=self.windows[number], sinks=True
        )
