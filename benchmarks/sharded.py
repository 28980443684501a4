"""Times expert blocks over two cards or more against one, and writes one JSON file.

    python -m benchmarks.sharded --seconds 600 --out sharded.json

`us` is the time of a block in a jitted chain of blocks, each with its own routing, fed by the one before: what a user
sees. Recipes: "ep", "tp" and, from four cards on, "ep-tp": experts, the intermediate dimension or both over the
cards, where all cards have all tokens and results are summed; with "-gather" the tokens are over the cards, their rows
are gathered and the sums scattered; with "-ragged" rows are sent to the cards of their experts and back; with "-bf16"
shares are rounded to bfloat16 before they are summed (`kernels_us` is that of float32 shares); with "-peer", of two
cards, XLA copies shares by the cards' copy engines (`--xla_gpu_collective_permute_mode=peer`). `efficiency`
is the time of one card over that of all cards together. `kernels_us` is the chain of what the first card computes of
it, by itself; what `us` has beyond it, `outside_us`, is what goes between cards and waiting for the busiest, whose
experts have `imbalance` times the mean's choices. `between_us` is the chain of collectives alone. With `--profile`,
`device_us` is what kernels on the first card take of a block, by kind: "products", "alignment", "sums of slots" and
"sums over cards" are ours, "collectives" NCCL's with the waiting for the others, "xla" the rest, "idle" what no kernel
covers.
`rel_l2` is the deviation from the rows of one card at the chain's end. Weights are random codes, the same in all
recipes. `kernels_efficiency` is the time of one card over `kernels_us` of all, as if nothing were between them.

With `--ranks` greater than the number of cards, one card is timed and what the first of so many ranks computes, by
itself; `room_us` is what may be outside of it where the efficiency shall be 85 %.

The programs of a number of tokens are timed in turns; `us`, `one_card_us` and so on are medians. Rows are written as
they are timed, models, formats and tokens in the order of the command line, until `--seconds` are over. A file that is
there already keeps its rows but those that are timed again, so that subsets add up; `run` is the number of the entry of
`runs`, with its commit and command.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.chain import seconds_of_calls
from benchmarks.record import recorded_run
from benchmarks.sharded_case import Case, Recipe, blocks_of, recipes
from benchmarks.sharded_profile import block_microseconds
from jax_marlin_moe.measure.models import MODELS

KEY = ("model", "format", "M", "recipe", "cards")
SAMPLES = 5


def wanted_recipes(case: Case, tokens: int, names: list[str] | None) -> list[Recipe]:
    """Those that are named; else all for many tokens and, for few, whose shares are small, those that sum them."""
    every = [one for one in recipes(case.ranks) if case.together_runs or not one.exchange]
    return [
        one for one in every if (one.name in names if names else tokens >= 1024 or not (one.exchange or one.copies))
    ]


def microseconds(program: tuple[Any, tuple], tokens: int) -> float:
    """Of one block of a compiled chain, once."""
    compiled, arguments = program
    calls = 10 if tokens <= 1024 else 3

    def call() -> jax.Array:
        return compiled(*arguments)

    seconds_of_calls(call, 1, 0)
    return seconds_of_calls(call, calls, 0.01) / blocks_of(tokens) * 1e6


class Programs:
    """Compiled chains of a case for a number of tokens, and what they took."""

    def __init__(self, case: Case, tokens: int, recipes: list[Recipe], pool: concurrent.futures.Executor) -> None:
        self.case, self.tokens, self._recipes = case, tokens, recipes
        submit = pool.submit
        # By the order of need: a deadline leaves whole rows out.
        self._futures = {"one": submit(case.one, tokens)}
        for recipe in recipes:
            if f"{recipe.kind} alone" not in self._futures:
                self._futures[f"{recipe.kind} alone"] = submit(case.alone, recipe, tokens)
            if case.together_runs:
                self._futures[recipe.name] = submit(case.together, recipe, tokens)
                if recipe.between not in self._futures:
                    self._futures[recipe.between] = submit(case.between, recipe, tokens)
        self._times: dict[str, list[float]] = {}

    def wait(self) -> None:
        """Until all are compiled, so that compilers do not disturb what is timed."""
        concurrent.futures.wait(self._futures.values())

    def rows(self, end: float, profile: bool) -> Iterator[dict]:
        """One row for each recipe that could be timed."""
        try:
            compiled, arguments = self._futures["one"].result()
            of_one = np.asarray(compiled(*arguments), np.float32)
        except Exception as error:
            self._report("one", error)
            return
        if time.monotonic() > end:
            return
        self._time_in_turns(end)
        for recipe in self._recipes:
            try:
                yield self._row(recipe, of_one)
            except Exception as error:  # one recipe that fails must not cost the others
                self._report(recipe.name, error)
        # Profiles last, and in rows of their own: the profiler slows the host down, and may fail.
        if profile and time.monotonic() < end:
            yield from self._profiled()

    def _row(self, recipe: Recipe, of_one: np.ndarray) -> dict:
        ranks, one, kernels = self.case.ranks, self._time("one"), self._time(f"{recipe.kind} alone")
        row = {
            **self._key(recipe),
            "one_card_us": one,
            "kernels_us": kernels,
            "kernels_efficiency": one / kernels / ranks,
            "room_us": one / ranks / 0.85 - kernels,
            "imbalance": self.case.imbalance(recipe, self.tokens),
        }
        if self.case.together_runs:
            compiled, arguments = self._futures[recipe.name].result()
            of_all = np.asarray(compiled(*arguments), np.float32)
            us = self._time(recipe.name)
            row |= {
                "us": us,
                "efficiency": one / us / ranks,
                "outside_us": us - kernels,
                "between_us": self._time(recipe.between),
                "rel_l2": float(np.linalg.norm(of_all - of_one) / np.linalg.norm(of_one)),
            }
        return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}

    def _profiled(self) -> Iterator[dict]:
        folder = tempfile.mkdtemp()
        programs = {one: one.name if self.case.together_runs else f"{one.kind} alone" for one in self._recipes}
        try:
            with jax.profiler.trace(folder):
                for program in ("one", *programs.values()):
                    compiled, arguments = self._futures[program].result()
                    jax.block_until_ready(compiled(*arguments))
            found = block_microseconds(folder, ["one", *programs.values()], blocks_of(self.tokens))
            for recipe, program in programs.items():
                if program in found:
                    yield {**self._key(recipe), "device_us": found[program], "one_card_device_us": found["one"]}
        except Exception as error:
            self._report("profile", error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _key(self, recipe: Recipe) -> dict:
        values = self.case.shape.name, self.case.weight_format, self.tokens, recipe.name, self.case.ranks
        return dict(zip(KEY, values, strict=True))

    def _time_in_turns(self, end: float) -> None:
        """All programs, one after the other, `SAMPLES` times or until the end: what clocks do is in all of them."""
        names = list(self._futures)
        for _ in range(SAMPLES):
            for name in list(names):
                try:
                    self._times.setdefault(name, []).append(microseconds(self._futures[name].result(), self.tokens))
                except Exception as error:
                    self._report(name, error)
                    names.remove(name)
            if time.monotonic() > end:
                return

    def _time(self, name: str) -> float:
        return statistics.median(self._times[name])

    def _report(self, name: str, error: Exception) -> None:
        case = self.case
        print(f"{case.shape.name} {case.weight_format} M={self.tokens} {name}: {type(error).__name__} {error}"[:600])


class Results:
    """The file: what it had, and what is timed."""

    def __init__(self, path: pathlib.Path, run: dict) -> None:
        found = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        self._path, self._runs = path, [*found["runs"], run]
        self._rows = {tuple(row[name] for name in KEY): row for row in found["rows"]}

    def add(self, row: dict) -> None:
        """Writes a row in the place of one with the same key; to one of the same run its values are added."""
        key, run = tuple(row[name] for name in KEY), len(self._runs) - 1
        before = self._rows.get(key, {})
        self._rows[key] = (before if before.get("run") == run else {}) | row | {"run": run}
        used = sorted({row["run"] for row in self._rows.values()})
        rows = [row | {"run": used.index(row["run"])} for _, row in sorted(self._rows.items())]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        runs = json.dumps([self._runs[number] for number in used], indent=1)
        self._path.write_text(f'{{"runs": {runs},\n "rows": [\n{lines}\n ]}}\n')


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen3-235b-a22b", "deepseek-v3"])
    parser.add_argument("--formats", nargs="+", default=["int4", "nvfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 16384, 4096, 64, 16])
    parser.add_argument("--recipes", nargs="+", help="names; by default all that make sense for a number of tokens")
    parser.add_argument("--cards", type=int, help="of those that are there, all by default")
    parser.add_argument("--ranks", type=int, help="as many as cards by default")
    parser.add_argument("--seconds", type=float, default=600, help="no round of programs begins later")
    parser.add_argument("--profile", action="store_true", help="device time by kind of kernel")
    parser.add_argument("--commit", help="recorded instead of git's HEAD")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    start = time.monotonic()
    devices = jax.devices()[: args.cards]
    ranks = args.ranks or len(devices)
    if ranks < len(devices):
        parser.error(f"--ranks is {ranks}; it must be at least the number of cards, {len(devices)}")
    results = Results(args.out, recorded_run("benchmarks.sharded", args.commit))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for weight_format, name in itertools.product(args.formats, args.models):
            if time.monotonic() > start + args.seconds:
                break
            began = time.monotonic()
            case = Case(MODELS[name], weight_format, devices, ranks)
            # All programs of the case at once: compilers of kernels run beside each other, and not beside the timing.
            programs = [
                Programs(case, tokens, wanted_recipes(case, tokens, args.recipes), pool) for tokens in args.tokens
            ]
            for each in programs:
                each.wait()
            print(f"{name} {weight_format}: compiled in {time.monotonic() - began:.1f} s", flush=True)
            for each in programs:
                for row in each.rows(start + args.seconds, args.profile):
                    results.add(row)
                    print(*row.values(), flush=True)
            del case, programs, each
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
