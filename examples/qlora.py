"""Trains low-rank adapters of a Qwen3-MoE checkpoint whose experts stay packed.

python -m examples.qlora path/to/Qwen3-30B-A3B-AWQ --steps 20
python -m examples.qlora tests/data/ck_q3_gptq_True --dtype float16 --rank 4 --batch 2 --tokens 16

Linears of attention and both matrices of every expert get adapters `x @ A @ B`; the rest is frozen. Rows are sorted by
expert once: `jax_marlin_moe.ragged_dot` multiplies them by the packed matrices, `jax.lax.ragged_dot` by the adapters.
No dense expert exists at any time, in either pass.
"""

import argparse
import pathlib
import resource
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

import jax_marlin_moe as jmm
from examples.decoder import Cache, Decoder, Linear, Linears
from examples.models import load_for
from examples.qwen3_moe import Sizes
from jax_marlin_moe.flax.nnx import MarlinMoE


class Lora(nnx.Variable):
    """What is trained, in float32."""


class Adapter(nnx.Module):
    """`x @ A @ B`, which is zero at first."""

    def __init__(self, k: int, n: int, rank: int, rngs: nnx.Rngs) -> None:
        self.a = Lora(jax.random.normal(rngs.params(), (k, rank)) * k**-0.5)
        self.b = Lora(jnp.zeros((rank, n)))

    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        return x @ self.a.get_value().astype(x.dtype) @ self.b.get_value().astype(x.dtype)


class AdaptedLinear(nnx.Module):
    """A frozen linear and an adapter."""

    def __init__(self, frozen: Linear, adapter: Adapter) -> None:
        self.frozen, self.adapter = frozen, adapter

    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        return self.frozen(x) + self.adapter(x)


class AdaptedLinears(nnx.Module):
    """Frozen linears of the same rows and an adapter for each of them."""

    def __init__(self, frozen: Linears, adapters: Sequence[Adapter]) -> None:
        self.frozen, self.adapters = frozen, nnx.List(adapters)

    def __call__(self, x: Float[Array, "*batch K"]) -> list[Float[Array, "*batch N"]]:
        return [y + adapter(x) for y, adapter in zip(self.frozen(x), self.adapters, strict=True)]


class AdaptedExperts(nnx.Module):
    """A frozen layer of experts and two adapters for each of them."""

    def __init__(self, frozen: MarlinMoE, rank: int, rngs: nnx.Rngs) -> None:
        layer = frozen.layer
        self.frozen = frozen
        for name, matrix in (("gate_up", layer.gate_up), ("down", layer.down)):
            shape = (matrix.num_experts, matrix.k, rank)
            setattr(self, f"{name}_a", Lora(jax.random.normal(rngs.params(), shape) * matrix.k**-0.5))
            setattr(self, f"{name}_b", Lora(jnp.zeros((matrix.num_experts, rank, matrix.n))))

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        layer = self.frozen.layer
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = layer.route(rows)
        order = jnp.argsort(ids.reshape(-1), stable=True)
        sizes = jnp.bincount(ids.reshape(-1), length=layer.gate_up.num_experts).astype(jnp.int32)
        h = self._product("gate_up", layer.expert_input(rows)[order // ids.shape[1]], layer.gate_up, sizes)
        gate, up = jnp.split(h, 2, axis=1)
        y = self._product("down", (jax.nn.silu(gate) * up).astype(x.dtype), layer.down, sizes)
        slots = jnp.zeros_like(y).at[order].set(y).reshape(*ids.shape, -1)
        return (slots * weights[..., None]).sum(1).astype(x.dtype).reshape(x.shape)

    def _product(self, name: str, rows: Array, matrix: jmm.MarlinWeights, sizes: Array) -> Float[Array, "slots N"]:
        a, b = (getattr(self, f"{name}_{part}").get_value().astype(rows.dtype) for part in "ab")
        low = jax.lax.ragged_dot(rows, a, sizes)
        adapted = jax.lax.ragged_dot(low, b, sizes, preferred_element_type=jnp.float32)
        return jmm.ragged_dot(rows, matrix, sizes, preferred_element_type=jnp.float32) + adapted


def adapt(model: Decoder, rank: int, seed: int = 0) -> Decoder:
    """The decoder with adapters in the place of its linears and experts.

    Raises:
        ValueError: it is not a Qwen3-MoE; the experts of other models have biases, activations or shared experts that
            `AdaptedExperts` does not compute.
    """
    if not isinstance(model.sizes, Sizes):
        raise ValueError(f"model is of {type(model.sizes).__module__}; adapters are for examples.qwen3_moe alone")
    rngs, sizes = nnx.Rngs(seed), model.sizes
    for block in model.blocks:
        attention = block.attention
        adapters = [Adapter(sizes.hidden, width, rank, rngs) for width in attention.qkv.widths]
        attention.qkv = AdaptedLinears(attention.qkv, adapters)
        attention.o = AdaptedLinear(attention.o, Adapter(sizes.heads * sizes.head_dim, sizes.hidden, rank, rngs))
        if isinstance(block.experts, MarlinMoE):
            block.experts = AdaptedExperts(block.experts, rank, rngs)
    return model


@partial(nnx.jit, graph=False)
def train_step(model: Decoder, optimizer: nnx.Optimizer, tokens: Int32[Array, "batch tokens"]) -> Float[Array, ""]:
    """One step on sequences; the loss before it."""

    def loss(model: Decoder) -> Float[Array, ""]:
        cache = Cache.empty(model.sizes, tokens.shape[0], tokens.shape[1] - 1, model.dtype)
        logits, _ = model(tokens[:, :-1], cache, last_only=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, Lora))(model)
    optimizer.update(model, gradients)
    return value


def peak_megabytes() -> float:
    """Of the device's memory where it says so, else of this process."""
    statistics = jax.devices()[0].memory_stats() or {}
    found = statistics.get("peak_bytes_in_use")
    return found / 1e6 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def train(model: Decoder, tokens: Int32[Array, "batch tokens"], steps: int, learning_rate: float) -> list[float]:
    """The loss before each step and after the last but one; prints them and tokens per second."""
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=Lora)
    losses, seconds = [], []
    for number in range(steps):
        start = time.perf_counter()
        losses.append(float(train_step(model, optimizer, tokens)))
        seconds.append(time.perf_counter() - start)
        print(f"step {number}: loss {losses[-1]:.4f}")
    rate = tokens.size / min(seconds)
    print(f"{rate:.0f} tokens per second; peak memory {peak_megabytes():.0f} MB")
    return losses


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    model = adapt(load_for(parser, args.checkpoint, dtype=args.dtype), args.rank)
    shape = (args.batch, args.tokens + 1)
    # Sequences that count upwards: something to learn that needs no file.
    starts = np.random.default_rng(0).integers(0, model.sizes.vocabulary, shape[0])
    tokens = jnp.asarray((starts[:, None] + np.arange(shape[1])) % model.sizes.vocabulary, jnp.int32)
    return train(model, tokens, args.steps, args.learning_rate)


if __name__ == "__main__":
    main()
