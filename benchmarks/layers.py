"""Times whole layers on this machine's GPU, beside their expert blocks alone, and writes one JSON file.

    python -m benchmarks.layers --models qwen3-30b-a3b deepseek-v3-tp8 --tokens 1 16 64 --out layers.json
    python -m benchmarks.layers --add layers.json --out layers.json
    python -m benchmarks.layers --models --add half.json layers.json --out layers.json

Each time is that of a layer in a jitted chain of 3 to 12, each fed by the one before, called again and again:
`block_us` the routed experts alone, of the ids and weights that the layers choose; `composed_us` the layer of `route`,
`fused_moe` and the shared expert by itself; `layer_us` the layer in one call. Rows are brought back to unit length
after every third layer, in all of them alike.

Each model has a process of its own. All make their weights and compile at the same time; when the last one is ready,
they time one after the other, and nobody compiles meanwhile. The file is written after each row, so that a run that is
cut short keeps what it has; `--add` begins with the rows of earlier files, and times what they lack.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import queue
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from benchmarks.chain import compile_chain, ends_a_norm, time_chain, unit_rows
from benchmarks.record import recorded_run, with_rows
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.measure.models import LAYERS, MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers
from jax_marlin_moe.ops.layer_composition import composition

# The first call of a sample waits for the host, the others do not: there are many of them where a call is short.
_SAMPLE_MICROSECONDS = 20_000
_MOST_CALLS = 60


def make_layers(shape: ModelShape, weight_format: str, dtype) -> list[jmm.MoELayer]:
    """Layers with random weights, their experts with silu and without biases, as in `random_layers`."""
    model = LAYERS[shape.name]
    layers = []
    for number, (gate_up, down) in enumerate(random_layers(shape, weight_format, dtype)):
        keys = jax.random.split(jax.random.key(100 + number), 3)
        first = partial(jax.tree.map, lambda leaf: leaf[:1] + 0)
        vector = (shape.num_experts,)
        layers.append(
            jmm.MoELayer(
                gate_up,
                down,
                jax.random.normal(keys[0], (shape.hidden, shape.num_experts), dtype) * shape.hidden**-0.5,
                model.routing,
                router_bias=jax.random.normal(keys[2], vector, dtype) / 8 if model.router_bias else None,
                correction_bias=jax.random.normal(keys[1], vector, jnp.float32) / 8 if model.correction_bias else None,
                shared=jmm.SharedExpert(first(gate_up), first(down)) if model.shared else None,
            )
        )
    return layers


def block(x, layer, weights, ids):
    """The experts alone."""
    return jmm.fused_moe(x, layer.gate_up, layer.down, weights, ids, implementation="cuda")


def composed(x, layer, weights, ids):
    """The layer of several calls."""
    silu = get_activation("silu")
    parts = (x, layer.router, layer.gate_up, layer.down, layer.shared, layer.router_bias, layer.correction_bias)
    static = {"routing": layer.routing, "activation": silu, "shared_activation": silu, "norm_epsilon": 1e-6}
    return composition(*parts, *[None] * 5, **static, implementation="cuda")[0]


def whole(x, layer, weights, ids):
    """The layer in one call."""
    return layer(x, implementation="cuda")


# The composition is last: it takes longest to compile, with all the products that XLA tries for the router.
FORMS = {"block_us": block, "layer_us": whole, "composed_us": composed}


def repeats(tokens: int) -> int:
    """Layers of the chain: what takes long is repeated less."""
    return 12 if tokens <= 16 else 6 if tokens <= 256 else 3


def chosen(x: jax.Array, layers: list[jmm.MoELayer], count: int) -> tuple[list[jax.Array], np.ndarray]:
    """Weights and ids of so many layers in a row."""

    @jax.jit
    def call(x: jax.Array, layer: jmm.MoELayer) -> tuple[jax.Array, ...]:
        given = {name: getattr(layer, name) for name in ("routing", "shared", "router_bias", "correction_bias")}
        experts = layer.gate_up, layer.down
        return jmm.moe_layer(x, layer.router, *experts, **given, return_routing=True, implementation="cuda")

    weights, ids, norm = [], [], jax.jit(unit_rows)
    for number in range(count):
        x, w, i = call(x, layers[number % len(layers)])
        weights.append(w)
        ids.append(i)
        x = norm(x) if ends_a_norm(number, count) else x
    return weights, np.stack(ids)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed at one number of tokens: inputs, and the compiled chains by form."""

    x: jax.Array
    layers: list[jmm.MoELayer]
    weights: list[jax.Array]
    ids: np.ndarray
    chains: dict[str, Callable[..., jax.Array]] = dataclasses.field(default_factory=dict)

    def row(self, name: str, options: argparse.Namespace) -> dict:
        """Times all forms, in turns: what slows the card for a while slows all of them."""
        inputs = self.x, self.layers, self.weights, self.ids
        samples: dict[str, list[float]] = {form: [] for form in FORMS if form in self.chains}
        calls = {}
        for form in samples:
            (about,) = time_chain(self.chains[form], *inputs, 1, 0.0, 2)
            calls[form] = min(max(math.ceil(_SAMPLE_MICROSECONDS / (about * len(self.ids))), 2), _MOST_CALLS)
        for _ in range(options.samples):
            for form, of_form in samples.items():
                of_form += time_chain(self.chains[form], *inputs, 1, options.pause, calls[form])
        times = {form: round(statistics.median(of_form), 2) for form, of_form in samples.items()}
        shared = self.layers[0].shared is not None
        return {"model": name, "M": self.x.shape[0], "format": options.format, "shared": shared, **times}


def prepare(name: str, all_tokens: list[int], options: argparse.Namespace) -> list[Case]:
    """What is timed of a model; a number of tokens that fails or takes too long is a line in the log."""
    shape, dtype, begin = MODELS[name], jnp.dtype(options.dtype), time.perf_counter()
    layers = jax.block_until_ready(make_layers(shape, options.format, dtype))
    made = time.perf_counter() - begin

    cases: dict[int, Case] = {}
    spent: dict[str, float] = dict.fromkeys(("inputs", *options.forms), 0.0)  # seconds of threads
    late = threading.Event()

    def begin_case(tokens: int) -> None:
        x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), dtype)
        jnp.isfinite((x + 0).astype(jnp.float32)).all()  # small programs of `time_chain`
        cases[tokens] = Case(x, layers, *chosen(x, layers, repeats(tokens)))

    def compile_forms(tokens: int, forms: list[str], before: concurrent.futures.Future | None = None) -> None:
        try:
            start = time.perf_counter()
            if before is None:
                begin_case(tokens)
                spent["inputs"] += time.perf_counter() - start
            else:
                before.result()
            for form in forms:
                if tokens in cases and not late.is_set():
                    case, start = cases[tokens], time.perf_counter()
                    case.chains[form] = compile_chain(FORMS[form], case.x, layers, case.weights, case.ids)
                    spent[form] += time.perf_counter() - start
        except Exception as error:
            print(f"{name} M={tokens} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)

    # What is compared at every number of tokens, before what takes longest.
    pool = concurrent.futures.ThreadPoolExecutor(options.threads)
    first, rest = options.forms[:2], options.forms[2:]
    futures = {tokens: pool.submit(compile_forms, tokens, first) for tokens in all_tokens}
    behind = [pool.submit(compile_forms, tokens, rest, future) for tokens, future in futures.items() if rest]
    patience = None if options.patience is None else max(0.0, options.patience - made)
    concurrent.futures.wait([*futures.values(), *behind], patience)
    late.set()
    pool.shutdown(cancel_futures=True)  # waits for what has begun: nothing compiles while something is timed
    seconds = time.perf_counter() - begin
    ready = [case for _, case in sorted(cases.items()) if len(case.chains) >= min(2, len(options.forms))]
    compiled = ", ".join(f"{what.removesuffix('_us')} {t:.0f}" for what, t in spent.items())
    print(
        f"{name}: weights after {made:.1f} s; {len(ready)} of {len(futures)} ready after {seconds:.1f}; {compiled}",
        flush=True,
    )
    return ready


def run_model(
    name: str, tokens: list[int], options: argparse.Namespace, prepared: Any, turn: Any, next_turn: Any, results: Any
) -> None:
    """One model's process: prepares, waits until all have, and times in its turn."""
    cases: list[Case] = []
    try:
        cases = prepare(name, tokens, options)
    finally:
        prepared.wait()
        turn.wait()
        try:
            for case in cases:
                results.put(case.row(name, options))
        finally:
            next_turn.set()


def print_row(row: dict) -> None:
    """One line: the first form, and what the others take more."""
    times = {key: value for key, value in row.items() if key.endswith("_us")}
    first, *others = times
    more = ", ".join(f"{form.removesuffix('_us')} {times[form] - times[first]:+7.1f}" for form in others)
    print(f"{row['model']:16s} M={row['M']:<5d} {first.removesuffix('_us')} {times[first]:8.1f} us, {more}", flush=True)


def layer_of(row: dict) -> tuple[int, str, int]:
    """What a row has timed, in the order of models and tokens."""
    return list(LAYERS).index(row["model"]), row["format"], row["M"]


def missing(rows: list[dict], options: argparse.Namespace) -> dict[str, list[int]]:
    """The numbers of tokens by model that the rows do not have with all the forms."""
    found = {layer_of(row) for row in rows if all(form in row for form in options.forms)}
    wanted = {
        name: [m for m in options.tokens if layer_of({"model": name, "format": options.format, "M": m}) not in found]
        for name in options.models
    }
    return {name: tokens for name, tokens in wanted.items() if tokens}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--format", default="int4")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds of rest before each sample")
    parser.add_argument("--threads", type=int, default=4, help="that compile for a model")
    parser.add_argument("--patience", type=float, help="seconds; what is not compiled by then is not timed")
    parser.add_argument("--add", nargs="*", type=pathlib.Path, default=[], metavar="FILE", help="whose rows stay")
    parser.add_argument("--commit", help="of the code, where the machine has no checkout")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    earlier = [json.loads(path.read_text()) for path in options.add]
    rows: list[dict] = []
    for document in earlier:
        rows = with_rows(rows, document["rows"], layer_of)
    wanted = missing(rows, options)
    if not wanted and not earlier:
        parser.error("--models names none, and there is no --add")
    if not wanted:
        options.out.write_text(json.dumps({**earlier[-1], "rows": rows}, indent=1) + "\n")
        return
    spawn = multiprocessing.get_context("spawn")
    prepared, results = spawn.Barrier(len(wanted)), spawn.Queue()
    turns = [spawn.Event() for _ in range(len(wanted) + 1)]
    turns[0].set()
    processes = [
        spawn.Process(target=run_model, args=(name, tokens, options, prepared, *turns[i : i + 2], results))
        for i, (name, tokens) in enumerate(wanted.items())
    ]
    for process in processes:
        process.start()
    record = recorded_run("benchmarks.layers", options.commit) | {"xla_flags": os.environ.get("XLA_FLAGS", "")}
    timed = 0
    while any(process.is_alive() for process in processes) or not results.empty():
        try:
            row = results.get(timeout=1)
        except queue.Empty:
            continue
        timed += 1
        print_row(row)
        rows = with_rows(rows, [{**row, "commit": record["commit"]}], layer_of)
        options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    if timed < sum(map(len, wanted.values())):
        raise SystemExit("not everything was timed")


if __name__ == "__main__":
    main()
