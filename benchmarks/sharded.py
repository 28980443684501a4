"""Times expert blocks over two cards or more against one, and writes one JSON file.

    python -m benchmarks.sharded --out sharded.json

`us` is the time of a block in a jitted chain of blocks, each with its own routing, fed by the one before: what a user
sees. Recipes: "one" card; "ep" and "tp", experts and intermediate dimension over the cards, where all cards have all
tokens and an all-reduce sums; with " gather" the tokens are over the cards, their rows are gathered and the sums
scattered; with " ragged" rows are sent to the cards of their experts and back. `efficiency` is the time of one card
over that of all cards together. `kernels_us` is the chain of what one card computes of it, without the others; what
`us` has beyond it, `outside_us`, is collectives, the other end of the exchange, and waiting for the slower card.
`rel_l2` is the deviation from the rows of one card at the chain's end. Weights are random codes, the same in all
recipes. Configurations are timed in the order of the file until `--seconds` are over.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from benchmarks.chain import seconds_of_calls
from benchmarks.record import recorded_run
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_routings
from jax_marlin_moe.sharding import parallel_experts
from jax_marlin_moe.sharding.specs import matrix_specs

AXIS = "cards"
FEW, MANY = ("one", "ep", "tp"), ("one", "ep gather", "ep ragged", "tp gather", "ep", "tp")
SAMPLES = 3


def blocks_of(tokens: int) -> int:
    """Blocks of a chain: a call lasts some milliseconds."""
    return 8 if tokens <= 1024 else 4 if tokens <= 4096 else 2


def hashed(*extents: int, last: Any = None) -> jax.Array:
    """Random words that depend on their place alone; `last` has the places along the last axis."""
    last = jnp.arange(extents[-1], dtype=jnp.uint32) if last is None else last
    words = last.reshape((1,) * (len(extents) - 1) + (-1,))
    for axis in range(len(extents) - 1):
        place = jax.lax.broadcasted_iota(jnp.uint32, extents, axis)
        words = (words ^ (place + jnp.uint32(1013904223 * (axis + 1) % 2**32))) * jnp.uint32(2654435761)
        words = words ^ (words >> 15)
    return jax.lax.bitcast_convert_type(words * jnp.uint32(2246822519), jnp.int32)


def matrix(shape: ModelShape, weight_format: str, k: int, n: int, shares: int = 0) -> jmm.MarlinWeights:
    """All experts of a matrix (k, n); `shares` is for how many cards gate and up are laid out."""
    row = get_format(weight_format)
    experts, per_column = shape.num_experts, 16 // row.codes_per_word
    place = jnp.arange(per_column * n, dtype=jnp.uint32)
    if shares:  # gate and up of each share, where they are in [gate | up]
        share = per_column * n // (2 * shares)
        rank, half, rest = place // (2 * share), place // share % 2, place % share
        place = half * (shares * share) + rank * share + rest
    packed = hashed(experts, k // 16, per_column * n, last=place)
    group = shape.grouped(row).group_size
    kind, value, factors = (jnp.bfloat16, 0.25 / k**0.5, None)
    if row.has_global_scales:
        kind, value, factors = jnp.uint8, 0x38, jnp.full((experts, n // 64), 0.4 / k**0.5, jnp.float32)
    scales = jnp.full((experts, k // group, n), value, kind)
    layout = f"a16/{n // shares}" if shares else "a16"
    return jmm.MarlinWeights(packed, scales, None, None, None, row, group, layout, factors)


def block_of(shape: ModelShape, weight_format: str, shares: int) -> tuple[jmm.MarlinWeights, jmm.MarlinWeights]:
    """Both matrices of a block."""
    hidden, inner = shape.hidden, shape.intermediate
    return matrix(shape, weight_format, hidden, 2 * inner, shares), matrix(shape, weight_format, inner, hidden)


def specs_of(recipe: str, block: Any) -> Any:
    """Partition specs of the weights."""
    gate_up, down = block
    if recipe.startswith("ep"):
        return matrix_specs(gate_up, (AXIS,)), matrix_specs(down, (AXIS,))
    return matrix_specs(gate_up, (), (AXIS,)), matrix_specs(down, (), (), (AXIS,))


def normed(x: jax.Array) -> jax.Array:
    """Rows of unit length: blocks in a row would overflow."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
    return (x * scale).astype(x.dtype)


def chained(block: Any, x: jax.Array, matrices: Any, weights: jax.Array, ids: jax.Array) -> jax.Array:
    """Blocks one after another."""
    return jax.lax.scan(lambda h, slots: (normed(block(h, *matrices, *slots)), None), x, (weights, ids))[0]


def program(recipe: str, mesh: jax.sharding.Mesh, block: Any) -> Any:
    """The chain of a recipe, jitted."""
    if recipe == "one":
        return jax.jit(partial(chained, jmm.fused_moe))
    kind, _, exchange = recipe.partition(" ")
    tokens = (AXIS,) if exchange else ()
    run = partial(
        parallel_experts,
        expert=(AXIS,) if kind == "ep" else (),
        tensor=(AXIS,) if kind == "tp" else (),
        tokens=tokens,
        exchange=exchange if kind == "ep" and exchange else "gather",
    )
    rows, slots = P(*tokens), P(None, *tokens)
    body = jax.shard_map(
        partial(chained, run), mesh=mesh, in_specs=(rows, specs_of(recipe, block), slots, slots), out_specs=rows
    )
    return jax.jit(body)


def alone(kind: str, experts: int, x: jax.Array, matrices: Any, weights: jax.Array, ids: jax.Array) -> jax.Array:
    """The chain of what the first card computes, fed by itself."""

    def share(x, gate_up, down, weights, ids):
        gate_up = dataclasses.replace(gate_up, layout="a16")
        every = jnp.arange(experts, dtype=jnp.int32)
        options = {"expert_map": jnp.where(every < gate_up.num_experts, every, -1)} if kind == "ep" else {}
        y = jmm.fused_moe(
            x,
            gate_up,
            down,
            weights,
            ids,
            preferred_element_type=jnp.float32,
            implementation="cuda" if jax.default_backend() == "gpu" else "cpu",
            **options,
        )
        return y.astype(x.dtype)

    return chained(share, x, matrices, weights, ids)


@functools.cache
def routings(shape: ModelShape, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Router weights and ids, [count, tokens, top_k]."""
    ids = random_routings(shape.num_experts, shape.top_k, tokens, count)
    weights = np.random.default_rng(7).uniform(0.5, 1.5, ids.shape).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True), ids


@dataclasses.dataclass
class Case:
    """One model and format: weights by recipe, and compiled programs by tokens and recipe."""

    shape: ModelShape
    weight_format: str
    mesh: jax.sharding.Mesh

    def __post_init__(self) -> None:
        cards = self.mesh.size
        first = self.mesh.devices.reshape(-1)[0]
        self.weights: dict[str, Any] = {}
        for kind, shares in (("one", 0), ("ep", 0), ("tp", cards)):
            make = partial(block_of, self.shape, self.weight_format, shares)
            placed: Any = jax.sharding.SingleDeviceSharding(first)
            if kind != "one":
                specs = specs_of(kind, jax.eval_shape(make))
                is_spec = lambda node: isinstance(node, P)  # noqa: E731
                placed = jax.tree.map(lambda one: NamedSharding(self.mesh, one), specs, is_leaf=is_spec)
            self.weights[kind] = jax.jit(make, out_shardings=placed)()
            if kind != "one":
                self.weights[f"{kind} alone"] = jax.tree.map(
                    lambda leaf: next(s.data for s in leaf.addressable_shards if s.device == first), self.weights[kind]
                )

    def arguments(self, recipe: str, tokens: int) -> tuple:
        """Rows, weights of experts, and slots, where the recipe has them."""
        shape, count = self.shape, blocks_of(tokens)
        x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), jnp.bfloat16)
        weights, ids = routings(shape, tokens, count)
        over = P(AXIS) if " g" in recipe or " r" in recipe else P()
        place: Any = self.mesh.devices.reshape(-1)[0]
        slots = place
        if recipe != "one" and not recipe.endswith("alone"):
            place, slots = NamedSharding(self.mesh, over), NamedSharding(self.mesh, P(None, *over))
        kind = recipe if recipe.endswith("alone") else recipe.split(" ")[0]
        return jax.device_put(x, place), self.weights[kind], *(jax.device_put(a, slots) for a in (weights, ids))

    def compiled(self, recipe: str, tokens: int) -> tuple[Any, tuple]:
        """The program and its arguments."""
        arguments = self.arguments(recipe, tokens)
        if recipe.endswith("alone"):
            function = jax.jit(partial(alone, recipe.split(" ")[0], self.shape.num_experts))
        else:
            function = program(recipe, self.mesh, arguments[1])
        return function.lower(*arguments).compile(), arguments


def microseconds(compiled: Any, arguments: tuple, tokens: int) -> float:
    """Of one block."""
    calls = 10 if tokens <= 1024 else 3

    def call() -> jax.Array:
        return compiled(*arguments)

    seconds_of_calls(call, 2, 0)
    found = [seconds_of_calls(call, calls, 0.01) for _ in range(SAMPLES)]
    return statistics.median(found) / blocks_of(tokens) * 1e6


def recipes_of(tokens: int) -> tuple[str, ...]:
    """For a number of tokens."""
    return FEW if tokens < 1024 else MANY


def rows_of(case: Case, tokens: int, programs: dict[str, Any], end: float) -> list[dict]:
    """All recipes for a number of tokens."""
    recipes = recipes_of(tokens)
    times, results = {}, {}
    for recipe in ("one", "ep alone", "tp alone", *recipes[1:]):
        if time.monotonic() > end:
            break
        try:
            compiled, arguments = programs[recipe].result()
            results[recipe] = np.asarray(compiled(*arguments), np.float32)
            times[recipe] = microseconds(compiled, arguments, tokens)
        except Exception as error:  # one recipe that fails must not cost the others
            print(f"{case.shape.name} {case.weight_format} M={tokens} {recipe}: {type(error).__name__} {error}"[:600])
    found = []
    for recipe in recipes[1:]:
        kernels = times.get(f"{recipe.split(' ')[0]} alone")
        if recipe not in times or "one" not in times or kernels is None:
            continue
        deviation = np.linalg.norm(results[recipe] - results["one"]) / np.linalg.norm(results["one"])
        row = {
            "model": case.shape.name,
            "format": case.weight_format,
            "M": tokens,
            "recipe": recipe,
            "cards": case.mesh.size,
            "us": times[recipe],
            "one_card_us": times["one"],
            "efficiency": times["one"] / times[recipe] / case.mesh.size,
            "kernels_us": kernels,
            "outside_us": times[recipe] - kernels,
            "rel_l2": float(deviation),
        }
        found.append(row)
        print(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-235b-a22b", "deepseek-v3"])
    parser.add_argument("--formats", nargs="+", default=["int4", "nvfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 1024, 4096, 16384, 16])
    parser.add_argument("--seconds", type=float, default=600, help="no configuration begins later")
    parser.add_argument("--commit", help="recorded instead of git's HEAD")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    mesh = jax.make_mesh((len(jax.devices()),), (AXIS,), axis_types=(AxisType.Auto,))
    result: dict[str, Any] = recorded_run("benchmarks.sharded", args.commit) | {"cards": mesh.size, "rows": []}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for weight_format, name in itertools.product(args.formats, args.models):
            if time.monotonic() > end:
                break
            start = time.monotonic()
            case = Case(MODELS[name], weight_format, mesh)
            # All programs of the case at once: compilers of kernels run beside each other, and not beside the timing.
            programs = {
                tokens: {
                    recipe: pool.submit(case.compiled, recipe, tokens)
                    for recipe in (*recipes_of(tokens), "ep alone", "tp alone")
                }
                for tokens in args.tokens
            }
            concurrent.futures.wait([one for each in programs.values() for one in each.values()])
            print(f"{name} {weight_format}: compiled in {time.monotonic() - start:.1f} s", flush=True)
            for tokens in args.tokens:
                result["rows"] += rows_of(case, tokens, programs[tokens], end)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
            del case, programs
    print(f"{len(result['rows'])} rows in {time.monotonic() - end + args.seconds:.0f} s")


if __name__ == "__main__":
    main()
