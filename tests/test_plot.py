"""The plot of committed results: a panel a model, a line an implementation and the limit."""

import importlib.util
import json
import pathlib

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
    plot.main([str(RESULTS / "decode_with_peers.json"), str(RESULTS / "decode_zipf.json"), "--out", str(out)])
    assert out.stat().st_size > 10_000
    if suffix == "svg":
        text = out.read_text()
        assert "zipf" in text  # routings that differ are told apart
        plot.main([str(RESULTS / "decode_with_peers.json"), str(RESULTS / "decode_zipf.json"), "--out", str(out)])
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
