"""A decoder in Flax NNX with a key-value cache, whose linears and experts are packed, or dense, or both.

What differs from one model to the next is its attention and the reading of its config: `qwen3_moe.py`, `gpt_oss.py` and
`deepseek_v3.py`. `examples.models.load` reads a checkpoint of any of them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

import jax_marlin_moe as jmm
from jax_marlin_moe.flax.nnx import MarlinMoE, QuantizedParam
from jax_marlin_moe.packing import dense_weights
from jax_marlin_moe.weights import concatenate_columns

Kept = tuple[Array, ...]  # what one layer remembers of each token: arrays [batch, heads, capacity, size]
ROOM = 64  # a capacity is a multiple of it: XLA would copy a cache of another size into a padded one at each product


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What every decoder needs of config.json; the model's own class adds what its attention needs."""

    layers: int
    hidden: int
    vocabulary: int
    epsilon: float
    tied: bool

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """What a layer remembers of one token: the heads and the size of each array."""
        raise NotImplementedError

    def attention(self, reader: "Reader", number: int) -> nnx.Module:
        """The attention of a layer: called with rows, `Kept`, positions; returns rows and `Kept`."""
        raise NotImplementedError


def check_config(config: Mapping[str, Any], model_type: str, **only: Any) -> None:
    """Raises ValueError where a config is of another model, or has a value that the decoder does not compute.

    Args:
        config: the contents of config.json.
        model_type: what it must be.
        **only: by key, the one value that the decoder computes, which is also what a missing key means.
    """
    if config.get("model_type") != model_type:
        raise ValueError(f"model_type is {config.get('model_type')!r}; this decoder is {model_type!r}")
    for name, value in only.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}; this decoder computes {value!r} alone")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the layers remember of the tokens so far, and how many of them count in each sequence."""

    layers: list[Kept]
    lengths: Int32[Array, " batch"]

    @classmethod
    def empty(cls, sizes: Sizes, batch: int, capacity: int, dtype: Any) -> "Cache":
        """Room for `capacity` tokens of each of `batch` sequences, and a few more."""
        capacity = -(-capacity // ROOM) * ROOM

        def room() -> Kept:
            return tuple(jnp.zeros((batch, heads, capacity, size), dtype) for heads, size in sizes.kept)

        return cls([room() for _ in range(sizes.layers)], jnp.zeros(batch, jnp.int32))


def written(kept: Kept, new: Kept, positions: Int32[Array, "batch tokens"]) -> Kept:
    """The cache of a layer with new tokens, [batch, tokens, heads, size], at their positions.

    Positions of a sequence follow each other. Those of tokens that count lie within the capacity; others need not.
    """
    if len(positions) == 1:  # as a slice: XLA reads, compares and writes in kernels of their own for what it may drop
        place = (0, 0, positions[0, 0], 0)
        return tuple(
            jax.lax.dynamic_update_slice(old, value.swapaxes(1, 2).astype(old.dtype), place)
            for old, value in zip(kept, new, strict=True)
        )
    rows = jnp.arange(len(positions))[:, None]
    return tuple(
        old.at[rows, :, positions].set(value.astype(old.dtype), mode="drop", unique_indices=True)
        for old, value in zip(kept, new, strict=True)
    )


class Linear(nnx.Module):
    """`x @ w`, packed or dense, and a bias where there is one."""

    def __init__(
        self, weight: jmm.MarlinWeights | Float[Array, "K N"], dtype: Any, bias: Float[Array, " N"] | None = None
    ) -> None:
        packed = isinstance(weight, jmm.MarlinWeights)
        self.weight = QuantizedParam(weight) if packed else nnx.Param(weight.astype(dtype))
        self.bias = None if bias is None else nnx.Param(bias.astype(dtype))

    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        weight = self.weight.get_value()
        y = jmm.linear(x, weight) if isinstance(weight, jmm.MarlinWeights) else x @ weight
        return y if self.bias is None else y + self.bias.get_value()


class Linears(nnx.Module):
    """Linears of the same rows, as one product where their columns can lie side by side.

    They cannot where the packed ones differ in their format or in the order of their rows.
    """

    def __init__(self, parts: Sequence[Linear]) -> None:
        weights = [part.weight.get_value() for part in parts]
        self.widths = tuple(
            weight.n if isinstance(weight, jmm.MarlinWeights) else weight.shape[1] for weight in weights
        )
        self.parts = nnx.List(parts)
        if all(isinstance(weight, jmm.MarlinWeights) for weight in weights):
            try:
                joined = concatenate_columns(weights)
            except (TypeError, ValueError):  # which say in what they differ
                return
            self.parts = nnx.List([Linear(joined, None)])
        elif not any(isinstance(weight, jmm.MarlinWeights) for weight in weights):
            biases = [part.bias for part in parts]
            bias = None if biases[0] is None else jnp.concatenate([bias.get_value() for bias in biases])
            self.parts = nnx.List([Linear(jnp.concatenate(weights, axis=1), weights[0].dtype, bias)])

    def __call__(self, x: Float[Array, "*batch K"]) -> list[Float[Array, "*batch N"]]:
        results = [part(x) for part in self.parts]
        if len(results) == len(self.widths):
            return results
        return jnp.split(results[0], np.cumsum(self.widths[:-1]), axis=-1)


class RMSNorm(nnx.Module):
    """In float32, as the models were trained."""

    def __init__(self, scale: Float[Array, " H"], epsilon: float) -> None:
        self.scale, self.epsilon = nnx.Param(scale.astype(jnp.float32)), epsilon

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale.get_value()).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Weights by name, of a checkpoint or random ones.

    Attributes:
        tensor: reads a tensor in the dtype that it has.
        linear: reads a linear by the name of its module.
        dtype: of the rows, and of dense weights: float16 or bfloat16.
        prefix: of all names.
    """

    tensor: Callable[[str], Array]
    linear: Callable[[str], jmm.MarlinWeights | Array]
    dtype: Any
    prefix: str = ""

    def inside(self, module: str) -> "Reader":
        """The same within a module."""
        return dataclasses.replace(self, prefix=f"{self.prefix}{module}.")

    def norm(self, name: str, epsilon: float) -> RMSNorm:
        """A norm."""
        return RMSNorm(self.tensor(f"{self.prefix}{name}.weight"), epsilon)

    def dense(self, name: str) -> Float[Array, "K N"]:
        """A linear whose weights are wanted as they are: quantised ones are dequantised."""
        weight = self.linear(self.prefix + name)
        return dense_weights(weight)[0] if isinstance(weight, jmm.MarlinWeights) else weight

    def module(self, name: str, *, bias: bool = False) -> Linear:
        """A linear; packed weights have their bias with them."""
        weight = self.linear(self.prefix + name)
        apart = bias and not isinstance(weight, jmm.MarlinWeights)
        return Linear(weight, self.dtype, self.tensor(f"{self.prefix}{name}.bias") if apart else None)

    def modules(self, names: Sequence[str], *, bias: bool = False) -> Linears:
        """Linears of the same rows."""
        return Linears([self.module(name, bias=bias) for name in names])


class GroupedAttention(nnx.Module):
    """Attention in which groups of heads share keys and values.

    Args:
        reader: within the module of the attention.
        head_dim: of queries, keys and values.
        rotary: the rotation by position.
        norm_epsilon: of norms of queries and keys, None where there are none.
        bias: whether the linears have biases.
        window: how many tokens a token sees, itself included; None for all before it.
        sinks: whether heads may attend to nothing, by a logit of their own.
    """

    def __init__(
        self,
        reader: Reader,
        head_dim: int,
        rotary: Callable[[Array, Array], Array],
        *,
        norm_epsilon: float | None = None,
        bias: bool = False,
        window: int | None = None,
        sinks: bool = False,
    ) -> None:
        self.qkv = reader.modules(("q_proj", "k_proj", "v_proj"), bias=bias)
        self.o = reader.module("o_proj", bias=bias)
        normed = norm_epsilon is not None
        self.q_norm = reader.norm("q_norm", norm_epsilon) if normed else None
        self.k_norm = reader.norm("k_norm", norm_epsilon) if normed else None
        self.sinks = nnx.Param(reader.tensor(f"{reader.prefix}sinks").astype(jnp.float32)) if sinks else None
        self.head_dim, self.rotary, self.window = head_dim, rotary, window

    def __call__(self, x: Array, kept: Kept, positions: Int32[Array, "batch tokens"]) -> tuple[Array, Kept]:
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in self.qkv(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        kept = written(kept, (self.rotary(k, positions), v), positions)
        sinks = None if self.sinks is None else self.sinks.get_value()
        seen = visible(positions, kept[0].shape[2], self.window)
        y = attend(self.rotary(q, positions), *kept, seen, sinks)
        return self.o(y.reshape(*x.shape[:2], -1)), kept


def visible(
    positions: Int32[Array, "batch tokens"], capacity: int, window: int | None = None
) -> Bool[Array, "batch tokens capacity"]:
    """What of the cache each token sees."""
    places, own = jnp.arange(capacity), positions[..., None]
    seen = places <= own
    return seen if window is None else seen & (places > own - window)


def attend(
    q: Float[Array, "batch tokens heads head_dim"],
    keys: Float[Array, "batch kv_heads capacity head_dim"],
    values: Float[Array, "batch kv_heads capacity head_dim"],
    seen: Bool[Array, "batch tokens capacity"],
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Softmax attention over what is `seen`, in float32; a sink takes its share of the mass and has no value."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    scores = products(grouped.reshape(batch, kv_heads, -1, head_dim), keys, (3, 3), jnp.float32)
    scores = scores.reshape(batch, heads, tokens, -1) * head_dim**-0.5
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = sinks[:, None, None]
        top = jnp.maximum(scores.max(axis=-1, keepdims=True), sink)
        mass = jnp.exp(scores - top)
        weights = mass / (mass.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
    y = products(weights.astype(q.dtype).reshape(batch, kv_heads, -1, scores.shape[-1]), values, (3, 2), q.dtype)
    return y.reshape(batch, heads, tokens, head_dim).transpose(0, 2, 1, 3)


def products(a: Array, b: Array, axes: tuple[int, int], dtype: Any) -> Array:
    """Sums over an axis of each, for each sequence and head."""
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((0, 1), (0, 1))), preferred_element_type=dtype)


class DenseMLP(nnx.Module):
    """A layer without experts, as the first ones of some models are."""

    def __init__(self, reader: Reader) -> None:
        self.gate_up, self.down = reader.modules(("gate_proj", "up_proj")), reader.module("down_proj")

    def __call__(self, x: Array) -> Array:
        gate, up = self.gate_up(x)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Attention, then experts, each behind a norm and beside a residual."""

    def __init__(self, reader: Reader, sizes: Sizes, number: int, experts: jmm.MoELayer | None) -> None:
        self.attention = sizes.attention(reader.inside("self_attn"), number)
        self.attention_norm, self.experts_norm = (
            reader.norm(name, sizes.epsilon) for name in ("input_layernorm", "post_attention_layernorm")
        )
        self.experts = DenseMLP(reader.inside("mlp")) if experts is None else MarlinMoE(experts)

    def __call__(self, x: Array, kept: Kept, positions: Array) -> tuple[Array, Kept]:
        with jax.named_scope("attention"):
            y, kept = self.attention(self.attention_norm(x), kept, positions)
        x = x + y
        with jax.named_scope("experts"):
            return x + self.experts(self.experts_norm(x)), kept


class Decoder(nnx.Module):
    """The whole model, from token ids to logits.

    Args:
        reader: its weights.
        experts: the layer of experts of a number, None where there is none.
        sizes: of the model.
    """

    def __init__(self, reader: Reader, experts: Callable[[int], jmm.MoELayer | None], sizes: Sizes) -> None:
        inside = reader.inside("model")
        self.embedding = nnx.Param(inside.tensor("model.embed_tokens.weight").astype(reader.dtype))
        self.blocks = nnx.List(
            [Block(inside.inside(f"layers.{number}"), sizes, number, experts(number)) for number in range(sizes.layers)]
        )
        self.norm = inside.norm("norm", sizes.epsilon)
        self.head = None if sizes.tied else reader.module("lm_head")
        self.sizes, self.dtype = sizes, reader.dtype

    def __call__(
        self,
        tokens: Int32[Array, "batch tokens"],
        cache: Cache,
        counts: Int32[Array, " batch"] | None = None,
        *,
        last_only: bool = True,
    ) -> tuple[Float[Array, "batch tokens vocabulary"], Cache]:
        """Logits behind the next tokens of each sequence, and the cache with them.

        Args:
            tokens: what follows in each sequence.
            cache: of the tokens before.
            counts: how many of `tokens` count in each sequence, where the rest is padding; all by default.
            last_only: whether the logits behind the last token that counts are wanted, or those behind all.
        """
        length = tokens.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(length)
        x, layers = self.embedding.get_value()[tokens], list(cache.layers)
        for number, block in enumerate(self.blocks):
            with jax.named_scope(f"layer_{number}"):
                x, layers[number] = block(x, layers[number], positions)
        if last_only:
            x = x[:, -1:] if counts is None else jnp.take_along_axis(x, counts[:, None, None] - 1, axis=1)
        x = self.norm(x)
        logits = x @ self.embedding.get_value().T if self.head is None else self.head(x)
        return logits.astype(jnp.float32), Cache(layers, cache.lengths + (length if counts is None else counts))
