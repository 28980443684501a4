"""Draws the error of each format, and the memory that its weights take.

    python -m benchmarks.plot_formats errors benchmarks/results/*/errors.json --out errors.svg
    python -m benchmarks.plot_formats memory --dark --out memory_dark.svg

Errors are those of result files of `benchmarks.errors`; memory follows from the shapes of packed weights. Needs
matplotlib.
"""

import argparse
import json
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from benchmarks.plot import figure_file, save
from jax_marlin_moe.formats import FORMATS
from jax_marlin_moe.random_experts import random_experts

# Experts of Qwen3-30B-A3B: layers, E, H, I.
MODEL = "Qwen3-30B-A3B", 48, 128, 2048, 768
PARTS = {"packed": "codes", "scales": "scales", "zeros": "zero points", "global_scales": "scales of matrices"}


def read_errors(paths: list[pathlib.Path]) -> list[dict]:
    """The rows of whole blocks, each with its device.

    Raises:
        ValueError: a file is not a result of `benchmarks.errors`.
    """
    rows = []
    for path in paths:
        result = json.loads(path.read_text())
        for row in result.get("rows", []):
            missing = {"op", "format", "dtype", "path", "rel_l2"} - row.keys()
            if missing or "device" not in result:
                raise ValueError(f"{path} lacks {', '.join(missing or ['device'])}; it must be of benchmarks.errors")
            if row["op"] == "fused_moe":
                rows.append(row | {"device": result["device"]})
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))} have no rows of fused_moe; they must be of benchmarks.errors")
    return rows


def draw_errors(rows: list[dict]) -> Figure:
    """A dot per case: formats below each other, row types as markers, what computed it as colours."""
    formats = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    paths = list(dict.fromkeys((row["path"], row["device"]) for row in rows))
    dtypes = sorted({row["dtype"] for row in rows})
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for number, (path, device) in enumerate(paths):
        for marker, dtype in zip("os^", dtypes, strict=False):
            own = [row for row in rows if (row["path"], row["device"], row["dtype"]) == (path, device, dtype)]
            lane = (number * len(dtypes) + dtypes.index(dtype) + 0.5) / (len(paths) * len(dtypes)) - 0.5
            heights = [formats.index(row["format"]) + 0.8 * lane for row in own]
            label = f"{path} on {'a CPU' if device == 'cpu' else device}, {dtype} rows"
            axes.scatter(
                [row["rel_l2"] for row in own], heights, s=14, color=f"C{number}", marker=marker, alpha=0.8, label=label
            )
    axes.set_xscale("log")
    axes.set_yticks(range(len(formats)), formats)
    axes.invert_yaxis()
    axes.set_xlabel("norm(found - exact) / norm(exact): lower is better")
    axes.grid(linewidth=0.3)
    figure.legend(fontsize="x-small", loc="outside lower center", ncols=2)
    figure.suptitle(
        "Error of a whole block of experts beside float64 with the same quantised weights.\n"
        "A dot is a case: type of scales, group size, 33 or 1024 tokens. What is left is the rounding of rows between\n"
        "the two products, and on CUDA at 1024 tokens that of scaled weights (the dots apart).",
        fontsize="medium",
    )
    return figure


def sizes_of(weight_format: str) -> dict[str, float]:
    """Bits per weight by part, in a gate-up stack of the model."""
    _, _, experts, hidden, intermediate = MODEL
    draw = partial(
        random_experts,
        num_experts=experts, k=hidden, n=2 * intermediate, weight_format=weight_format, group_size="customary",
        scale_dtype=jnp.bfloat16,
    )  # fmt: skip
    weights = jax.eval_shape(draw, jax.random.key(0))
    count = experts * hidden * 2 * intermediate
    parts = {name: getattr(weights, name) for name in PARTS}
    return {
        PARTS[name]: 8 * leaf.size * leaf.dtype.itemsize / count for name, leaf in parts.items() if leaf is not None
    }


def draw_memory() -> Figure:
    """A bar per format: bits per weight, by part."""
    bits = {name: sizes_of(name) for name in FORMATS}
    name, layers, experts, hidden, intermediate = MODEL
    weights = layers * experts * 3 * hidden * intermediate
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bits)
    for number, part in enumerate(PARTS.values()):
        widths = [parts.get(part, 0.0) for parts in bits.values()]
        if any(widths):
            axes.barh(range(len(bits)), widths, left=left, color=f"C{number}", label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for height, total in enumerate(left):
        axes.annotate(
            f"{total:.2f} bits, {total * weights / 8e9:.1f} GB", (total, height), (4, 0), textcoords="offset points",
            va="center", fontsize="small",
        )  # fmt: skip
    groups = (FORMATS[name].customary_group_size for name in bits)
    axes.set_yticks(range(len(bits)), [f"{n}, group {g or 'K'}" for n, g in zip(bits, groups, strict=True)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel("bits per weight: lower is better")
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize="small", loc="upper right")
    figure.suptitle(
        f"Memory of packed experts, with bfloat16 scales where a format leaves a choice.\nGB are those of all experts "
        f"of {name} ({layers} layers of {experts}, {weights / 1e9:.0f} billion weights).",
        fontsize="medium",
    )
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Writes a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("show", choices=["errors", "memory"])
    parser.add_argument("results", nargs="*", type=pathlib.Path, help="of errors: JSON files of benchmarks.errors")
    parser.add_argument("--out", type=figure_file, required=True, help="a name that ends in .svg or .png")
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    args = parser.parse_args(arguments)
    try:
        if args.show == "memory":
            if args.results:
                raise ValueError("memory takes no results; it follows from the shapes of packed weights")
            save(draw_memory, args.out, dark=args.dark)
        else:
            rows = read_errors(args.results)
            save(lambda: draw_errors(rows), args.out, dark=args.dark)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
