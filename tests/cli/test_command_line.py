"""Commands as they are called: arguments, sizes, caches, outputs that close, names."""

import argparse
import ast
import contextlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import jax
import pytest

import jax_marlin_moe
from jax_marlin_moe import native
from jax_marlin_moe.checkpoint import packed_form
from jax_marlin_moe.cli import bench, demo, precompile, shape_options, tune
from jax_marlin_moe.cli.console import measured_table
from jax_marlin_moe.cli.main import main
from jax_marlin_moe.cuda import cache, compiler

ROOT = pathlib.Path(__file__).parents[2]


CHECKPOINT = ROOT / "tests" / "data" / "ck_llmc_W4A16"


@pytest.fixture(params=["other users write", "unknown home", "no home"])
def refused_cache(request, monkeypatch, tmp_path):
    """No cache, although nobody asked for none; the reason."""
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE, raising=False)
    if request.param == "unknown home":
        monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "~no_such_user/kernels")
        return "JAX_MARLIN_MOE_CACHE_DIR is '~no_such_user/kernels', whose home is not known"
    if request.param == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        return "there is no home directory to keep kernels in; set JAX_MARLIN_MOE_CACHE_DIR to a folder"
    folder = tmp_path / "jax_marlin_moe"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return f"the kernel cache {folder} can be written by others (mode 0777; chmod go-w): it is not used, since"


def test_commands_say_why_there_is_no_cache(capsys, monkeypatch, refused_cache):
    """A warning alone would pass unseen, and "off" would look like what was asked for."""
    assert main(["doctor"]) == 0
    assert f"kernel cache    off: {refused_cache}" in capsys.readouterr().out
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    assert main(["precompile", "--arch", "sm_80", "--models", "qwen3-30b-a3b", "--tokens", "1"]) == 1
    assert f"cannot keep kernels: the kernel cache is off: {refused_cache}" in capsys.readouterr().err
    monkeypatch.setattr(tune, "shapes_to_measure", lambda *_: ([], 0))
    assert main(["tune", *_SIZES]) == 1
    assert f"cannot tune: the kernel cache is off: {refused_cache}" in capsys.readouterr().err


@pytest.mark.long
def test_a_source_tree_that_shadows_the_package(tmp_path):
    """Run from a checkout after a plain installation: nothing is computed by the reference in silence."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder in (checkout, site):
        shutil.copytree(
            ROOT / "jax_marlin_moe", folder / "jax_marlin_moe", ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    information = site / "jax_marlin_moe-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-marlin-moe\nVersion: 0.1.0\n")
    # Ahead of an editable installation's own loader, which would find the tests' package.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'scikit' not in type(f).__name__.lower()]; "
        f"sys.path[:0] = [{str(checkout)!r}, {str(site)!r}]; from jax_marlin_moe.__main__ import main; "
        "print(main(['demo', '--small'])); main(['doctor'])"
    )
    environment = os.environ | {native.CPU_ISA_VARIABLE: "sse9"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "\n1\n" in done.stdout
    assert (
        f"the source tree {checkout}, which has no native module, shadows the package that is installed in {site}; run "
        "from another folder" in done.stderr
    )
    assert f"SHADOWS the package that is installed in {site}" in done.stdout
    assert "UserWarning: JAX_MARLIN_MOE_CPU_ISA is 'sse9'; it must be one of portable" in done.stderr


def test_what_measures_an_implementation_names_it():
    """A call without a name falls back to the reference, whose times and errors then pass for the kernels'."""
    ops = {
        "fused_moe",
        "moe_gemm",
        "moe_align_block_size",
        "expert_block",
        "expert_gemm",
        "linear",
        "moe_layer",
    }
    calls = 0
    files = [*(ROOT / "benchmarks").glob("*.py"), *(pathlib.Path(m.__file__) for m in (bench, demo, precompile, tune))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ops:
                calls += 1
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "implementation" in named, f"{path}:{node.lineno}"
                assert ast.unparse(named["implementation"]) != "None", f"{path}:{node.lineno}"
    assert calls >= 8


def test_a_command_is_needed():
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


_SIZES = ["--experts", "8", "--top-k", "2", "--hidden", "256", "--intermediate", "128"]


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--experts, --top-k, --hidden, --intermediate missing; give --models, or all four sizes"),
        (["--experts", "8", "--hidden", "256"], "--top-k, --intermediate missing"),
        (["--models", "mixtral-8x7b", "--experts", "8"], "--models names whole blocks"),
        ([*_SIZES, "--top-k", "9"], "--top-k is 9; it must not exceed --experts, 8"),
        ([*_SIZES, "--hidden", "0"], "hidden is 0; it must be positive"),
        ([*_SIZES, "--tokens", "4", "-1"], "tokens is -1; it must be positive"),
        (["--models", "mixtral-8x7b", "--group-size", "0"], "group_size is 0; it must be positive"),
    ],
)
def test_unusable_sizes(capsys, command, arguments, complaint):
    assert main([command, *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize("arguments", [["--models", "no-such-model"], ["--format", "int3"], ["--dtype", "float32"]])
def test_unknown_names(capsys, command, arguments):
    with pytest.raises(SystemExit) as stopped:
        main([command, *_SIZES, *arguments])
    assert stopped.value.code == 2
    assert f"invalid choice: '{arguments[1]}'" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a card")
@pytest.mark.parametrize("command", ["tune", "bench"])
def test_measuring_needs_a_card(capsys, command):
    assert main([command, *_SIZES]) == 1
    assert "it measures on an NVIDIA GPU, and JAX finds only cpu" in capsys.readouterr().err


def test_chosen_shapes():
    parser = argparse.ArgumentParser()
    shape_options.add_shape_options(parser, tokens=[1])
    named = shape_options.chosen_shapes(
        parser.parse_args(["--models", "mixtral-8x7b", "kimi-k2", "--group-size", "64"])
    )
    assert [(shape.name, shape.num_experts, shape.group_size) for shape in named] == [
        ("mixtral-8x7b", 8, 64),
        ("kimi-k2", 384, 64),
    ]
    (block,) = shape_options.chosen_shapes(parser.parse_args(_SIZES))
    assert (block.num_experts, block.top_k, block.hidden, block.intermediate, block.group_size) == (8, 2, 256, 128, 128)


@pytest.mark.gpu
def test_bench_and_tune_on_a_card(capsys, kernels):
    block = [*_SIZES, "--tokens", "4"]
    assert main(["bench", *block, "--samples", "5"]) == 0
    assert re.search(r"^model +tokens +experts hit +us ", capsys.readouterr().out, re.MULTILINE)
    assert main(["tune", *block, "--candidates", "2"]) == 0
    assert "stored in" in capsys.readouterr().out
    (table,) = kernels.glob("tuned-*.json")
    assert "E8 k2 H256 I128" in table.read_text()


@pytest.mark.gpu
def test_tune_without_a_cache(capsys, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert main(["tune", *_SIZES]) == 1
    assert "the kernel cache is off" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jax_marlin_moe {jax_marlin_moe.__version__}\n"


def test_the_version_is_stated_once():
    """In the package: the build reads it there, and so agrees what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    source = ROOT / project["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert source.samefile(jax_marlin_moe.__file__)
    assert re.findall(r"^__version__ *= *['\"](.+?)['\"]", source.read_text(), re.MULTILINE) == [
        jax_marlin_moe.__version__
    ]
    assert importlib.metadata.version("jax-marlin-moe") == jax_marlin_moe.__version__


def test_both_ways_to_the_commands_name_themselves(capsys, tmp_path):
    """The console script is the same function; each shows in its usage how it was started."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["jax-marlin-moe"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: jax-marlin-moe ")
    done = subprocess.run(
        [sys.executable, "-m", "jax_marlin_moe", "--help"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.startswith("usage: python -m jax_marlin_moe ")


@contextlib.contextmanager
def output_to(stream):
    """Not as a fixture: pytest's capture takes the output back when a test begins."""
    with stream, contextlib.redirect_stdout(stream):
        yield


def closed_pipe():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("arguments", [["inspect", str(CHECKPOINT)], ["doctor"], ["--help"], ["--version"]])
def test_a_closed_pipe_ends_quietly(capfd, arguments):
    with output_to(closed_pipe()):
        assert main(arguments) == 141
    assert capfd.readouterr().err == ""


def test_a_closed_pipe_does_not_stop_a_conversion(capfd, tmp_path):
    with output_to(closed_pipe()):
        assert main(["convert", str(CHECKPOINT), str(tmp_path / "packed")]) == 0
    assert capfd.readouterr().err == ""
    assert packed_form.read_manifest(tmp_path / "packed").layers == [0, 1]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_output(capfd, tmp_path):
    with output_to(open("/dev/full", "w")):
        assert main(["inspect", str(CHECKPOINT)]) == 1
    assert capfd.readouterr().err == "cannot write the output: No space left on device\n"
    with output_to(open("/dev/full", "w")):
        assert main(["convert", str(CHECKPOINT), str(tmp_path / "packed")]) == 0
    assert capfd.readouterr().err == ""
    assert packed_form.read_manifest(tmp_path / "packed").layers == [0, 1]


def test_a_table_has_what_was_measured_before_an_error(capsys):
    def measure():
        with measured_table("rows", 2, "name", "us") as add_row:
            add_row("first", "1.50")
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        measure()
    assert capsys.readouterr().out.splitlines() == ["name    us", "------  ----", "first   1.50"]


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jax, "devices", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_process_ends_quietly(tmp_path):
    """The whole way, the interpreter's end included."""
    command = [sys.executable, "-m", "jax_marlin_moe", "inspect", str(CHECKPOINT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_inspect_of_no_folder(capsys, tmp_path):
    for path in ("", str(tmp_path / "nowhere")):
        assert main(["inspect", path]) == 1
        assert re.search(rf"cannot inspect: .*{path}", capsys.readouterr().err)
    assert main(["inspect", ""]) == 1
    assert "path is ''; it must be a folder" in capsys.readouterr().err
    assert main(["convert", str(CHECKPOINT), ""]) == 1
    assert "destination is ''; it must be a folder" in capsys.readouterr().err
    assert main(["convert", "", str(tmp_path / "packed")]) == 1
    assert "source is ''; it must be a folder" in capsys.readouterr().err


def test_inspect_escapes_what_steers_a_terminal(capsys, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    name = next(name for name in header if name.startswith("model.layers.0.mlp.experts.0."))
    header[f"{name}\x1b]0;owned\x07\u202e"] = header.pop(name)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\u202e" in output
    assert "\x1b" not in output
