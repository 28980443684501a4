"""The plot of committed results: a panel a model, a line an implementation and the limit."""

import importlib.util
import json
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "h200"


@pytest.fixture(scope="module")
def plot():
    """By its file: the source tree is not on the path of the tests."""
    spec = importlib.util.spec_from_file_location("plot", BENCHMARKS / "plot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_and_panels(plot):
    figure = plot.draw(plot.read_rows([RESULTS / "decode_with_peers.json"]))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    rows = json.loads((RESULTS / "decode_with_peers.json").read_text())["rows"]
    assert panels.keys() == {row["model"] for row in rows}
    assert {"mixtral-8x7b", "qwen3-30b-a3b"} <= panels.keys()
    drawn = 0
    for model, axes in panels.items():
        assert axes.get_xscale() == axes.get_yscale() == "log"
        lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        of_model = [row for row in rows if row["model"] == model]
        assert lines.keys() == {"limit"} | {row["implementation"] for row in of_model}
        assert len(lines) > 2  # ours, and a peer
        for row in of_model:
            assert lines[row["implementation"]][row["M"]] == row["block_us"]
            assert lines["limit"][row["M"]] == row["limit_us"]
        drawn += sum(len(points) for name, points in lines.items() if name != "limit")
    assert drawn == len(rows)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_files(plot, tmp_path, suffix):
    out = tmp_path / f"plot.{suffix}"
    arguments = ["--out", str(out)]
    for name in ("decode_with_peers.json", "decode_zipf.json"):
        results = json.loads((RESULTS / name).read_text())
        # A panel: of all models, drawing takes seconds.
        results["rows"] = [row for row in results["rows"] if row["model"] == "qwen3-30b-a3b"]
        (tmp_path / name).write_text(json.dumps(results))
        arguments.append(str(tmp_path / name))
    plot.main(arguments)
    assert out.stat().st_size > 10_000
    if suffix == "svg":
        text = out.read_text()
        assert "zipf" in text  # routings that differ are told apart
        plot.main(arguments)
        assert out.read_text() == text


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        ('{"rows": [{"model": "mixtral-8x7b"}]}', "plot.svg", "has a row without 'M'"),
        ("{}", "plot.svg", "have no rows"),
        ("{}", "plot.pdf", "must end in .svg or .png"),
    ],
)
def test_refusals(plot, tmp_path, capsys, content, name, complaint):
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(file), "--out", str(tmp_path / name)])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_shares_are_of_the_limit_and_the_caption_says_what_a_reader_must_know(plot):
    paths = [RESULTS / "decode_with_peers.json"]
    rows, caption = plot.read_rows(paths), plot.read_caption(paths, "share")
    assert caption.startswith("NVIDIA H200; int4 in groups of 128, bfloat16. Limit over the device time")
    assert "higher is better" in caption
    figure = plot.draw(rows, caption, "share")
    panel = next(axes for axes in figure.axes if axes.get_title() == "mixtral-8x7b")
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in panel.get_lines()}
    assert set(lines["limit"].values()) == {100}
    for row in rows:
        if row["model"] == "mixtral-8x7b":
            assert lines[row["implementation"]][row["M"]] == pytest.approx(100 * row["limit_us"] / row["block_us"])


@pytest.fixture(scope="module")
def formats_plot():
    sys.path.append(str(BENCHMARKS.parent))  # at the end: the package itself is the one that is installed
    return importlib.import_module("benchmarks.plot_formats")


def test_memory_of_formats_is_that_of_their_codes_and_scales(formats_plot, tmp_path):
    assert formats_plot.sizes_of("int4") == {"codes": 4, "scales": 16 / 128}
    assert formats_plot.sizes_of("int4_zp") == {"codes": 4, "scales": 16 / 128, "zero points": 4 / 128}
    assert formats_plot.sizes_of("mxfp8") == {"codes": 8, "scales": 8 / 32}
    formats_plot.main(["memory", "--dark", "--out", str(tmp_path / "memory.svg")])
    text = (tmp_path / "memory.svg").read_text()
    assert "4.12 bits, 14.9 GB" in text
    assert "lower is better" in text


def test_every_case_of_a_format_is_a_dot(formats_plot):
    paths = [RESULTS / "errors.json", RESULTS.parent / "cpu" / "errors.json"]
    rows = formats_plot.read_errors(paths)
    axes = formats_plot.draw_errors(rows).axes[0]
    dots = [offset for dots in axes.collections for offset in dots.get_offsets()]
    assert sorted(x for x, _ in dots) == sorted(row["rel_l2"] for row in rows)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names[round(y)] for _, y in dots) == sorted(row["format"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["memory", "x.json", "--out", "m.svg"], "memory takes no results"),
        (["errors", str(RESULTS / "prefill.json"), "--out", "e.svg"], "lacks"),
        (["errors", "--out", "e.svg"], "have no rows of fused_moe"),
    ],
)
def test_results_of_another_kind_are_refused(formats_plot, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        formats_plot.main(arguments)
    assert complaint in capsys.readouterr().err
