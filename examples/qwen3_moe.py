"""Qwen3-MoE in Flax NNX: a decoder with a key-value cache whose linears and experts are packed, or dense, or both.

`load(path)` reads a whole checkpoint in any of the package's schemes, or a folder that `convert` wrote.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import Checkpoint
from jax_marlin_moe.flax.nnx import MarlinMoE, QuantizedParam


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the decoder needs of config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    rope_theta: float
    tied: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Sizes":
        """Reads them.

        Raises:
            ValueError: the config is of another model, or has something that this decoder does not compute.
        """
        if config.get("model_type") != "qwen3_moe":
            raise ValueError(f"model_type is {config.get('model_type')!r}; this decoder is 'qwen3_moe'")
        rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for name, value, only in (
            ("rope_type", kind, "default"),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
            ("attention_bias", config.get("attention_bias", False), False),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ):
            if value != only:
                raise ValueError(f"{name} is {value!r}; this decoder computes {only!r} alone")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            tied=config.get("tie_word_embeddings", False),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far: per layer [batch, capacity, kv_heads, head_dim]; `length` of them count."""

    keys: list[Float[Array, "batch capacity kv_heads head_dim"]]
    values: list[Float[Array, "batch capacity kv_heads head_dim"]]
    length: Int32[Array, ""]

    @classmethod
    def empty(cls, sizes: Sizes, batch: int, capacity: int, dtype: Any) -> "Cache":
        """Room for `capacity` tokens of `batch` sequences."""
        shape = (batch, capacity, sizes.kv_heads, sizes.head_dim)
        keys, values = ([jnp.zeros(shape, dtype) for _ in range(sizes.layers)] for _ in range(2))
        return cls(keys, values, jnp.zeros((), jnp.int32))


class Linear(nnx.Module):
    """`x @ w`, packed or dense."""

    def __init__(self, weight: jmm.MarlinWeights | Float[Array, "K N"], dtype: Any) -> None:
        packed = isinstance(weight, jmm.MarlinWeights)
        self.weight = QuantizedParam(weight) if packed else nnx.Param(weight.astype(dtype))

    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        weight = self.weight.get_value()
        return jmm.linear(x, weight) if isinstance(weight, jmm.MarlinWeights) else x @ weight


class RMSNorm(nnx.Module):
    """In float32, as the model was trained."""

    def __init__(self, scale: Float[Array, " H"], epsilon: float) -> None:
        self.scale, self.epsilon = nnx.Param(scale.astype(jnp.float32)), epsilon

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.get_value()).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, linear: Callable[[str], Linear], norm: Callable[[str], RMSNorm], sizes: Sizes) -> None:
        self.q, self.k, self.v, self.o = (linear(f"self_attn.{name}_proj") for name in "qkvo")
        self.q_norm, self.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self.sizes = sizes

    def __call__(self, x: Array, keys: Array, values: Array, length: Array) -> tuple[Array, Array, Array]:
        batch, tokens = x.shape[:2]
        positions = length + jnp.arange(tokens)
        q, k, v = (linear(x).reshape(batch, tokens, -1, self.sizes.head_dim) for linear in (self.q, self.k, self.v))
        q, k = (rotate(y, positions, self.sizes.rope_theta) for y in (self.q_norm(q), self.k_norm(k)))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), length, axis=1)
            for cache, new in ((keys, k), (values, v))
        )
        seen = jnp.arange(keys.shape[1])[None] <= positions[:, None]
        return self.o(attend(q, keys, values, seen).reshape(batch, tokens, -1)), keys, values


def attend(
    q: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch capacity kv_heads head_dim"],
    values: Float[Array, "batch capacity kv_heads head_dim"],
    seen: Bool[Array, "tokens capacity"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Softmax attention over what is `seen`, in float32; heads share the keys and values of their group."""
    batch, tokens, heads, size = q.shape
    grouped = q.reshape(batch, tokens, keys.shape[2], -1, size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return y.reshape(batch, tokens, heads, size).astype(q.dtype)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], positions: Int32[Array, " tokens"], theta: float
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotary positions, first half against second half."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class DenseMLP(nnx.Module):
    """The layer without experts that some configurations have."""

    def __init__(self, linear: Callable[[str], Linear]) -> None:
        self.gate, self.up, self.down = (linear(f"mlp.{name}_proj") for name in ("gate", "up", "down"))

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention, then experts, each behind a norm and beside a residual."""

    def __init__(
        self,
        linear: Callable[[str], Linear],
        norm: Callable[[str], RMSNorm],
        sizes: Sizes,
        experts: jmm.MoELayer | None,
    ) -> None:
        self.attention = Attention(linear, norm, sizes)
        self.attention_norm, self.experts_norm = norm("input_layernorm"), norm("post_attention_layernorm")
        self.experts = DenseMLP(linear) if experts is None else MarlinMoE(experts)

    def __call__(self, x: Array, keys: Array, values: Array, length: Array) -> tuple[Array, Array, Array]:
        y, keys, values = self.attention(self.attention_norm(x), keys, values, length)
        x = x + y
        return x + self.experts(self.experts_norm(x)), keys, values


class Decoder(nnx.Module):
    """The whole model, from token ids to logits.

    Args:
        tensor: reads a tensor by its name in the checkpoint, in the dtype that it has there.
        linear: reads a linear by the name of its module.
        experts: the layer of experts of a number, None where there is none.
        sizes: of the model.
        dtype: of the rows, and of dense weights: float16 or bfloat16.
    """

    def __init__(
        self,
        tensor: Callable[[str], Array],
        linear: Callable[[str], jmm.MarlinWeights | Array],
        experts: Callable[[int], jmm.MoELayer | None],
        sizes: Sizes,
        dtype: Any,
    ) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(tensor(f"{name}.weight"), sizes.epsilon)

        def block(number: int) -> Block:
            inside = f"model.layers.{number}."
            return Block(
                lambda name: Linear(linear(inside + name), dtype),
                lambda name: norm(inside + name),
                sizes,
                experts(number),
            )

        self.embedding = nnx.Param(tensor("model.embed_tokens.weight").astype(dtype))
        self.blocks = nnx.List([block(number) for number in range(sizes.layers)])
        self.norm = norm("model.norm")
        self.head = None if sizes.tied else Linear(linear("lm_head"), dtype)
        self.sizes, self.dtype = sizes, dtype

    def __call__(
        self, tokens: Int32[Array, "batch tokens"], cache: Cache, *, last_only: bool = True
    ) -> tuple[Float[Array, "batch tokens vocabulary"], Cache]:
        """Logits behind the next tokens of each sequence, of the last of them or of all, and the cache with them."""
        x = self.embedding.get_value()[tokens]
        keys, values = list(cache.keys), list(cache.values)
        for number, block in enumerate(self.blocks):
            with jax.named_scope(f"layer_{number}"):
                x, keys[number], values[number] = block(x, keys[number], values[number], cache.length)
        x = self.norm(x[:, -1:] if last_only else x)
        logits = x @ self.embedding.get_value().T if self.head is None else self.head(x)
        return logits.astype(jnp.float32), Cache(keys, values, cache.length + tokens.shape[1])


def load(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16, **options: Any) -> Decoder:
    """A decoder with the weights of a checkpoint.

    Args:
        path: as for `jax_marlin_moe.checkpoint.Checkpoint`.
        dtype: of the rows, and of dense weights: float16 or bfloat16.
        **options: `quantize` and its companions, for plain experts.
    """
    checkpoint = Checkpoint(path, **options)
    sizes = Sizes.from_config(checkpoint.config)
    return Decoder(
        checkpoint.tensor,
        checkpoint.linear,
        lambda number: checkpoint.load(number) if number in checkpoint.layers else None,
        sizes,
        dtype,
    )
