"""DeepSeek-V3: latent attention, which remembers a short vector per token in place of the keys and values of heads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32

from examples import decoder
from examples.rotary import Rotary, mscale, rope_of

NORM_EPSILON = 1e-6  # of the norms inside the attention, whatever the config says of the others


@dataclasses.dataclass(frozen=True)
class Sizes(decoder.Sizes):
    """What the decoder needs of config.json."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int  # dimensions of a query and a key without a position
    rope: int
    value: int
    scale: float
    rotary: Rotary

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sizes":
        """Reads them.

        Raises:
            ValueError: the config is of another model, or has something that this decoder does not compute.
        """
        decoder.check_config(config, "deepseek_v3", attention_bias=False, hidden_act="silu")
        nope, size, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"], rope_of(config)
        scale = (nope + size) ** -0.5
        if rope["rope_type"] != "default" and rope.get("mscale_all_dim"):
            scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            heads=config["num_attention_heads"],
            q_rank=config.get("q_lora_rank"),
            kv_rank=config["kv_lora_rank"],
            nope=nope,
            rope=size,
            value=config["v_head_dim"],
            scale=scale,
            rotary=Rotary.of(config, size, theta=10000.0, interleaved=config.get("rope_interleave", True)),
        )

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """The latent of keys and values, and the rotated key, each of which all heads share."""
        return (1, self.kv_rank), (1, self.rope)

    def attention(self, reader: decoder.Reader, number: int) -> "LatentAttention":
        """That of all layers."""
        return LatentAttention(reader, self)


class LatentAttention(nnx.Module):
    """Attention among latents: queries go into their space, and the mean of latents comes out of it.

    The matrix that would make keys and values of a latent is multiplied into the queries and the result instead, as it
    is the same for all tokens; where a checkpoint has it quantised, it is dequantised for that.
    """

    def __init__(self, reader: decoder.Reader, sizes: Sizes) -> None:
        if sizes.q_rank is None:
            self.q_a = self.q_norm = None
            self.q = reader.module("q_proj")
        else:
            self.q_a, self.q_norm = reader.module("q_a_proj"), reader.norm("q_a_layernorm", NORM_EPSILON)
            self.q = reader.module("q_b_proj")
        self.kv_a, self.kv_norm = reader.module("kv_a_proj_with_mqa"), reader.norm("kv_a_layernorm", NORM_EPSILON)
        from_latent = reader.dense("kv_b_proj").astype(reader.dtype).reshape(sizes.kv_rank, sizes.heads, -1)
        keys, values = jnp.split(from_latent, [sizes.nope], axis=2)
        self.keys, self.values = nnx.Param(keys), nnx.Param(values)
        self.o, self.sizes = reader.module("o_proj"), sizes

    def __call__(
        self, x: Array, kept: decoder.Kept, positions: Int32[Array, "batch tokens"]
    ) -> tuple[Array, decoder.Kept]:
        sizes = self.sizes
        q = self.q(x if self.q_a is None else self.q_norm(self.q_a(x))).reshape(*x.shape[:2], sizes.heads, -1)
        nope, rope = jnp.split(q, [sizes.nope], axis=-1)
        latent, key = jnp.split(self.kv_a(x), [sizes.kv_rank], axis=-1)
        key = sizes.rotary(key[:, :, None], positions)
        kept = decoder.written(kept, (self.kv_norm(latent)[:, :, None], key), positions)
        latents, rotated = (array[:, 0] for array in kept)
        inside = jnp.einsum("bthd,rhd->bthr", nope, self.keys.get_value())
        scores = sizes.scale * (
            jnp.einsum("bthr,bsr->bhts", inside, latents, preferred_element_type=jnp.float32)
            + jnp.einsum("bthd,bsd->bhts", sizes.rotary(rope, positions), rotated, preferred_element_type=jnp.float32)
        )
        seen = decoder.visible(positions, latents.shape[1])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1).astype(x.dtype)
        mean = jnp.einsum("bhts,bsr->bthr", weights, latents)
        y = jnp.einsum("bthr,rhd->bthd", mean, self.values.get_value())
        return self.o(y.reshape(*x.shape[:2], -1)), kept
