"""The table of whole layers in docs/benchmarks.md, from the file that benchmarks.layers writes.

python -m benchmarks.layers_table benchmarks/results/h200/layers.json docs/benchmarks.md

Prints the table; with a document, puts it in place of the one that is there, between two comments.
"""

import argparse
import itertools
import json
import pathlib

BEGIN, END = "<!-- table of layers -->", "<!-- end of the table of layers -->"

_NAMES = {
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
    "deepseek-v3": "DeepSeek-V3",
    "deepseek-v3-tp8": "DeepSeek-V3, one rank of 8",
    "kimi-k2": "Kimi-K2",
}
_HEAD = ("| | tokens | experts alone | in several calls | in one call |", "|---|---:|---:|---:|---:|")


def table(rows: list[dict]) -> str:
    """Microseconds of the experts alone, and what whole layers add to them, in the order of the rows.

    Args:
        rows: as benchmarks.layers writes them.
    """
    lines = list(_HEAD)
    for model, of_model in itertools.groupby(rows, key=lambda row: row["model"]):
        for number, row in enumerate(of_model):
            name = _NAMES[model] + ", shared expert" * row["shared"] if number == 0 else ""
            cells = [name, str(row["M"]), f"{row['block_us']:.1f}", _added(row, "composed_us"), _added(row, "layer_us")]
            lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


def with_table(document: str, rows: list[dict]) -> str:
    """The document with the table of these rows between the two comments.

    Raises:
        ValueError: the comments are not there, once and in their order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the document must have {BEGIN} and after it {END}, each once")
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


def _added(row: dict, form: str) -> str:
    return f"{row[form] - row['block_us']:+.1f}".replace("-", "−") if form in row else ""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("document", type=pathlib.Path, nargs="?")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["rows"]
    print(table(rows))
    if options.document is not None:
        options.document.write_text(with_table(options.document.read_text(), rows))


if __name__ == "__main__":
    main()
