"""Draws block time and limit, or the share of the limit, over the number of tokens, one panel per model.

    python -m benchmarks.plot benchmarks/results/h200/decode_with_peers.json --out decode.svg
    python -m benchmarks.plot benchmarks/results/h200/decode_with_peers.json --dark --out decode_dark.svg
    python -m benchmarks.plot benchmarks/results/h200/decode_with_peers.json --show share --out share.svg
    python -m benchmarks.plot scan.json --out scan.svg

Lines are medians, bands reach from the 10th to the 90th percentile of the samples. Takes any number of result files of
`benchmarks.blocks` and `benchmarks.scan`. A line is an implementation; where a model was timed in several formats,
group sizes, dtypes or routings, each has lines of its own. Needs matplotlib.
"""

import argparse
import json
import math
import pathlib
import textwrap
from collections import defaultdict
from collections.abc import Callable

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

# The same numbers give the same file; text stays text.
_SVG = {"svg.hashsalt": "jax_marlin_moe", "svg.fonttype": "none"}
_VARIANT = ("format", "group_size", "dtype", "routing")
_PANEL_INCHES = 4.2, 3.4
_MOST_DECODED = 64  # tokens, beyond which products may take longer than their bytes
_MOST_COLUMNS = 2  # what a page's column leaves legible
_CAPTION_LETTERS = 56  # per column
_MOST_MARKERS = 20  # of a line
_MOST_TICKS = 9  # that have room under a panel


def read_rows(paths: list[pathlib.Path]) -> list[dict]:
    """The rows of all files; a later row of the same configuration and implementation replaces an earlier one.

    Raises:
        ValueError: a file is not a result of `benchmarks.blocks`.
    """
    rows = {}
    for path in paths:
        for row in json.loads(path.read_text()).get("rows", []):
            try:
                key = tuple(row[name] for name in ("model", "M", "implementation", *_VARIANT))
                _ = row["block_us"], row["limit_us"]
            except KeyError as missing:
                raise ValueError(f"{path} has a row without {missing}; it must be of benchmarks.blocks") from None
            rows[key] = row
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))} have no rows; they must be of benchmarks.blocks")
    return list(rows.values())


def read_caption(paths: list[pathlib.Path], show: str = "time") -> str:
    """What a reader must know who sees the figure alone: the cards, what is timed, and what the limit is."""
    results = [json.loads(path.read_text()) for path in paths]
    cards = ", ".join(dict.fromkeys(result.get("card", "a card that is not stated") for result in results))
    rows = [row for result in results for row in result.get("rows", [])]
    kinds = ", ".join(
        dict.fromkeys(f"{row['format']} in groups of {row['group_size']}, {row['dtype']}" for row in rows)
    )
    speeds = sorted(result["read_tb_s"] for result in results if "read_tb_s" in result)
    measured = f" ({speeds[0]:.2f} TB/s here)" if speeds else ""
    limit = f"bytes of the experts that are hit, over the read bandwidth measured in the same run{measured}"
    if any(row["M"] > _MOST_DECODED for row in rows):
        ceiling = max((result["bf16_tflop_s"] for result in results if "bf16_tflop_s" in result), default=None)
        rate = "" if ceiling is None else f" ({ceiling:.0f} TFLOP/s here)"
        limit += f", or the products at the rate of the best dense product of a library{rate}, whichever takes longer"
    what = "Device time of one block of experts with cold L2: lower is better."
    if show == "share":
        what = "Limit over the device time of one block of experts with cold L2: higher is better, 100 % is the limit."
    return f"{cards}; {kinds}. {what}\nLimit: {limit}. Bands: 10th to 90th percentile."


def draw(rows: list[dict], caption: str = "", show: str = "time") -> Figure:
    """The figure, of "time" or the "share" of the limit; colours and markers mean the same in every panel."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    columns = min(_MOST_COLUMNS, len(models))
    grid = math.ceil(len(models) / columns), columns
    size = columns * _PANEL_INCHES[0], grid[0] * _PANEL_INCHES[1]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*grid, squeeze=False)
    for panel, model in zip(axes.flat, models, strict=False):
        _draw_panel(panel, model, [row for row in rows if row["model"] == model], names, show)
    for panel in axes.flat[len(models) :]:
        panel.set_axis_off()
    if caption:
        lines = (textwrap.fill(line, _CAPTION_LETTERS * columns) for line in caption.splitlines())
        figure.suptitle("\n".join(lines), fontsize="medium")
    return figure


def _draw_panel(axes: Axes, model: str, rows: list[dict], names: list[str], show: str) -> None:
    def value(row: dict, name: str) -> float:
        return row[name] if show == "time" else 100 * row["limit_us"] / row[name]

    varying = [name for name in _VARIANT if len({row[name] for row in rows}) > 1]
    lines, limits, bands = defaultdict(list), defaultdict(dict), defaultdict(list)
    for row in rows:
        variant = tuple(str(row[name]) for name in varying)
        lines[row["implementation"], variant].append((row["M"], value(row, "block_us")))
        if "block_p10_us" in row:
            bands[row["implementation"]].append(
                (row["M"], value(row, "block_p10_us"), value(row, "block_p90_us"), variant)
            )
        limits[variant][row["M"]] = value(row, "limit_us")
    variants = list(limits)
    for (name, variant), points in lines.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=f"C{names.index(name)}",
            marker="os^Dv"[names.index(name) % 5] if len(points) <= _MOST_MARKERS else None,
            markersize=4,
            linestyle=("-", "--", "-.", ":")[variants.index(variant) % 4],
            label=" ".join([name, *variant]),
        )
    for name, spread in bands.items():
        for variant in variants:
            points = sorted(point[:3] for point in spread if point[3] == variant)
            if points:
                axes.fill_between(*zip(*points, strict=True), color=f"C{names.index(name)}", alpha=0.25, linewidth=0)
    for variant, points in (limits if show == "time" else dict(list(limits.items())[:1])).items():
        label = " ".join(["limit", *variant])
        axes.plot(*zip(*sorted(points.items()), strict=True), color="0.5", linewidth=1.5, linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    counts = sorted({row["M"] for row in rows})
    if len(counts) > _MOST_TICKS:
        counts = [4**i for i in range(10) if counts[0] <= 4**i <= counts[-1]]
    axes.set_xticks(counts)
    if show == "time":
        axes.set_yscale("log")
        # Panels span one or two decades: powers of ten alone would leave some without a label.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(0, 105)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_title(model)
    axes.set_xlabel("tokens")
    axes.set_ylabel("block, µs" if show == "time" else "share of the limit, %")
    axes.grid(linewidth=0.3)
    axes.legend(fontsize="x-small")


def figure_file(text: str) -> pathlib.Path:
    """The value of `--out`."""
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"{text} must end in .svg or .png")
    return pathlib.Path(text)


def save(drawn: Callable[[], Figure], out: pathlib.Path, *, dark: bool) -> None:
    """Draws and writes a figure for a light or a dark page, whose ground shows; the same numbers give the same file."""
    # No date in the file: it would change with every drawing of the same numbers.
    metadata = {"Date": None} if out.suffix == ".svg" else None
    with matplotlib.style.context("dark_background" if dark else "default"), matplotlib.rc_context(_SVG):
        drawn().savefig(out, dpi=150, metadata=metadata, transparent=True)


def main(arguments: list[str] | None = None) -> None:
    """Writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=pathlib.Path, help="JSON files of benchmarks.blocks")
    parser.add_argument("--show", choices=["time", "share"], default="time", help="block time, or the limit over it")
    parser.add_argument("--out", type=figure_file, required=True, help="a name that ends in .svg or .png")
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    args = parser.parse_args(arguments)
    try:
        rows, caption = read_rows(args.results), read_caption(args.results, args.show)
        save(lambda: draw(rows, caption, args.show), args.out, dark=args.dark)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
