"""Times one block at rest, under load and with pauses, beside the clock and the power of the card.

    python -m benchmarks.sustained --model mixtral-8x7b --tokens 16 --layers 2 8 --out sustained.json

A replay is a CUDA graph of `--routings` blocks. "rest": replays one after the other, from a card that did nothing for
two seconds. "load": the same for `--seconds`; what is reported is the last half of it. "pauses": 50 ms of nothing
before each replay. `sm_mhz` is measured right behind the last replay, the rest is NVML's word during the phase.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax.numpy as jnp

from benchmarks.blocks import make_case
from benchmarks.card import MultiprocessorClock, logged_card
from benchmarks.record import recorded_run
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS, ModelShape
from jax_marlin_moe.measure.random_layers import random_layers
from jax_marlin_moe.measure.replay import replayed_block

_REST_SECONDS, _PAUSE_SECONDS = 2.0, 0.05
_REPLAYS = 40


def _in_a_row(replay: Callable[[], float], seconds: float) -> list[float]:
    return [replay() for _ in range(_REPLAYS)]


def _under_load(replay: Callable[[], float], seconds: float) -> list[float]:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(replay())
    return times[len(times) // 2 :]


def _with_pauses(replay: Callable[[], float], seconds: float) -> list[float]:
    times = []
    for _ in range(_REPLAYS):
        time.sleep(_PAUSE_SECONDS)
        times.append(replay())
    return times


PHASES = {"rest": _in_a_row, "load": _under_load, "pauses": _with_pauses}


def measure_phase(phase: str, replay: Callable[[], float], clock: MultiprocessorClock, seconds: float) -> dict:
    """Block time of one phase with the card's state; `first_us` are its first replays in their order."""
    if phase == "rest":
        time.sleep(_REST_SECONDS)
    with logged_card() as log:
        times = PHASES[phase](replay, seconds)
    mhz = clock.mhz()
    ordered = sorted(times)
    return {
        "phase": phase,
        "block_us": statistics.median(times),
        "block_p10_us": ordered[len(times) // 10],
        "block_p90_us": ordered[-1 - len(times) // 10],
        "first_us": times[:5],
        "sm_mhz": mhz,
        **log.summary(),
    }


def measure(shape: ModelShape, tokens: int, layers: int, args: argparse.Namespace) -> list[dict]:
    """A row for every phase."""
    dtype = jnp.dtype(args.dtype)
    case = make_case(shape, random_layers(shape, args.format, dtype, layers), tokens, args.routings, "uniform", dtype)
    kernels = replayed_block(case.x, case.layers, case.weights, case.ids)
    clock = MultiprocessorClock()
    with kernels.captured() as replay:
        replay()
        rows = [measure_phase(phase, replay, clock, args.seconds) for phase in PHASES]
    kernels.close()
    return [{"model": shape.name, "M": tokens, "format": args.format, "layers": layers, **row} for row in rows]


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mixtral-8x7b", choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[16])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 8], help="layers to cycle through")
    parser.add_argument("--routings", type=int, default=24, help="blocks in a replay")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the load")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    rows = []
    for tokens in args.tokens:
        for layers in args.layers:
            for row in measure(MODELS[args.model].grouped(get_format(args.format)), tokens, layers, args):
                rows.append(row)
                print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    document = recorded_run("benchmarks.sustained", args.commit) | {"rows": rows}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
