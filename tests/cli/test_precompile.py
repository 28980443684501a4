"""The command precompile."""

import re

import pytest

from jax_marlin_moe.cli.main import main
from jax_marlin_moe.cuda import cache, compiler


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
    captured = capsys.readouterr()
    assert "FAILED: x has dtype bfloat16" in captured.out
    assert captured.err == "1 programs were not compiled\n"  # and nothing of a folder that cannot be written
    assert main(["precompile", *arguments, "--dtype", "float16", "--format", "int4_zp", "--group-size", "64"]) == 0
    assert main(["precompile", *arguments, "--group-size", "96"]) == 1


@pytest.mark.parametrize("option", [["--tokens", "-1"], ["--tokens", "0"], ["--tokens", "x"], ["--group-size", "0"]])
def test_precompile_takes_positive_numbers(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["precompile", "--arch", "sm_80", "--models", "qwen3-30b-a3b", *option])
    assert stopped.value.code == 2
    assert f"argument {option[0]}: '{option[1]}' is not a positive integer" in capsys.readouterr().err


def test_precompile_fails_where_nothing_can_be_kept(capsys, kernels, monkeypatch):
    """Also beside an old kernel."""
    (kernels / "old.cubin").write_bytes(b"")
    arguments = ["precompile", "--arch", "sm_80", "--models", "qwen3-30b-a3b", "--tokens", "1"]

    def full(*_):
        raise OSError(28, "No space left on device")  # as `write` does, without a name

    monkeypatch.setattr(cache, "write_file", full)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"cannot keep kernels: [Errno 28] No space left on device: '{kernels}'; set JAX_MARLIN_MOE_CACHE" in error
    monkeypatch.undo()
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(kernels / "old.cubin" / "below"))
    assert main(arguments) == 1
    assert "cannot keep kernels: " in capsys.readouterr().err
    assert [path.name for path in kernels.iterdir()] == ["old.cubin"]


def test_precompile_needs_a_cache_and_a_compiler(capsys, monkeypatch):
    arguments = ["precompile", "--arch", "sm_80", "--models", "qwen3-30b-a3b", "--tokens", "1"]
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert main(arguments) == 1
    assert "the kernel cache is off" in capsys.readouterr().err
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found")
    assert main(arguments) == 1
    assert "cannot compile: NVRTC was not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("sm_999", "it must be one of sm_75, sm_80, .*, or compute_ in place of sm_ for PTX"),
        ("compute_60", "it must be one of sm_75, sm_80, .*, or compute_ in place of sm_ for PTX"),
        ("90a", "it must look like sm_90a, or compute_80 for PTX"),
    ],
)
def test_precompile_refuses_an_architecture_before_it_compiles_for_others(capsys, kernels, name, complaint):
    with pytest.raises(SystemExit) as stopped:
        main(["precompile", "--arch", "sm_80", name, "--models", "qwen3-30b-a3b", "--tokens", "1"])
    assert stopped.value.code == 2
    assert re.search(f"argument --arch: the architecture is '{name}'; {complaint}", capsys.readouterr().err)
    assert not list(kernels.iterdir())
