"""The commands: they run, say what they promise, and their exit status tells success from failure."""

import argparse

import jax
import pytest

from jax_marlin_moe import demo, native, shape_options
from jax_marlin_moe.__main__ import main
from jax_marlin_moe.cuda import cache, compiler


def test_demo(capsys):
    assert main(["demo", "--small"]) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines() if line.startswith("AWQ checkpoint")]
    tokens_and_names = [(row[4], row[5]) for row in rows]
    best = {"gpu": "cuda", "cpu": "cpu"}[jax.default_backend()]
    assert tokens_and_names == [("1", best), ("1", "xla"), ("16", best), ("16", "xla")]
    assert all(0 < float(row[6]) < 1e-2 for row in rows)
    assert "WRONG" not in output


def test_demo_of_a_real_size(capsys, monkeypatch):
    small = demo.ModelShape("small", 8, 2, 256, 128)
    monkeypatch.setitem(demo.MODELS, demo._LARGE_MODEL, small)
    assert main(["demo", "--dtype", "float16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("small")]
    assert len(rows) == 4
    assert all(row[-1].endswith("%") for row in rows)


def test_demo_fails_on_wrong_numbers(capsys, monkeypatch):
    monkeypatch.setitem(demo._ERROR_LIMIT, "bfloat16", 1e-9)
    assert main(["demo", "--small"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_demo_without_the_native_module(capsys, monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was left out")
    assert main(["demo", "--small"]) == 0
    output = capsys.readouterr().out
    assert "cannot serve: it was left out" in output
    assert " xla " in output


def test_doctor(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "not" / "yet"))
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_80")
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for line in (
        f"jax, jaxlib     {jax.__version__}",
        "native module   built for XLA FFI",
        "sm_80 (from JAX_MARLIN_MOE_CUDA_ARCH)",
        "not/yet: 0 kernels, writable",
        "runs on cpu     yes",
    ):
        assert line in output
    assert not (tmp_path / "not").exists()


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was left out")
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found; install something")
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "native module   cannot be used: it was left out" in output
    assert "NVRTC           missing: NVRTC was not found; install something" in output
    assert "kernel cache    off" in output
    assert "runs on cpu     no: it was left out" in output


def test_doctor_fails_without_a_device(capsys, monkeypatch):
    def no_device(*_):
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setattr(jax, "local_devices", no_device)
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_80")
    assert main(["doctor"]) == 1
    assert "nothing works" in capsys.readouterr().out


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A cache of its own, and no compiled kernels left in memory."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    compiler.compile_cubin.cache_clear()
    return tmp_path


def test_precompile(capsys, kernels):
    command = ["precompile", "--models", "qwen3-30b-a3b", "--tokens", "1", "--arch"]
    assert main([*command, "sm_90a", "sm_80"]) == 0
    assert f"{kernels}: 2 programs, 2 of them new" in capsys.readouterr().out
    assert len(list(kernels.glob("*.cubin"))) == 2
    compiler.compile_cubin.cache_clear()
    assert main([*command, "sm_80"]) == 0
    assert "2 programs, 0 of them new" in capsys.readouterr().out


def test_precompile_reports_failures(capsys, kernels):
    arguments = ["--arch", "sm_75", "--models", "qwen3-30b-a3b", "--tokens", "1"]
    assert main(["precompile", *arguments]) == 1
    assert "FAILED: x has dtype bfloat16" in capsys.readouterr().out
    assert main(["precompile", *arguments, "--dtype", "float16", "--format", "int4_zp", "--group-size", "64"]) == 0
    assert main(["precompile", *arguments, "--group-size", "96"]) == 1


def test_precompile_needs_a_cache_and_a_compiler(capsys, monkeypatch):
    arguments = ["precompile", "--arch", "sm_80", "--models", "qwen3-30b-a3b", "--tokens", "1"]
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert main(arguments) == 1
    assert "the kernel cache is off" in capsys.readouterr().out
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found")
    assert main(arguments) == 1
    assert "cannot compile: NVRTC was not found" in capsys.readouterr().out


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
    assert complaint in capsys.readouterr().out


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
    assert "it measures on an NVIDIA GPU, and JAX finds only cpu" in capsys.readouterr().out


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
    assert "us (" in capsys.readouterr().out
    assert main(["tune", *block, "--candidates", "2"]) == 0
    assert "stored in" in capsys.readouterr().out
    (table,) = kernels.glob("tuned-*.json")
    assert "E8 k2 H256 I128" in table.read_text()


@pytest.mark.gpu
def test_tune_without_a_cache(capsys, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert main(["tune", *_SIZES]) == 1
    assert "the kernel cache is off" in capsys.readouterr().out
