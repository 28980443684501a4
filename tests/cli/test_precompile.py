"""The command precompile."""

import argparse
import os
import pathlib
import re
import shlex
import string
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cli import precompile
from jax_marlin_moe.cli.main import main
from jax_marlin_moe.cuda import cache, compiler
from jax_marlin_moe.measure.models import MODELS


def test_precompile(capsys, kernels):
    command = ["precompile", "--models", "qwen3-30b-a3b", "--tokens", "1", "--arch"]
    assert main([*command, "sm_90a", "sm_80", "--ops", "fused_moe"]) == 0
    assert f"{kernels}: 2 programs, 2 of them new" in capsys.readouterr().out
    assert len(list(kernels.glob("*.cubin"))) == 2
    compiler.compile_cubin.cache_clear()
    assert main([*command, "sm_80"]) == 0
    printed = capsys.readouterr().out
    assert "3 programs, 1 of them new" in printed
    assert re.search(r"moe_layer +1 tokens", printed)


def test_precompiled_layers_are_those_of_models(kernels):
    """A layer as it is loaded, in bfloat16 but for its correction bias, finds its program."""
    command = ["precompile", "--models", "deepseek-v3-tp8", "--tokens", "1", "--arch", "sm_80", "--ops", "moe_layer"]
    assert main(command) == 0
    (program,) = kernels.iterdir()
    shape, bfloat16 = MODELS["deepseek-v3-tp8"], jnp.bfloat16

    def packed(*sizes):
        return jax.eval_shape(partial(jmm.quantize, weight_format="int4"), jax.ShapeDtypeStruct(sizes, bfloat16))

    experts, hidden, inner = shape.num_experts, shape.hidden, shape.intermediate
    layer = jmm.MoELayer(
        packed(experts, hidden, 2 * inner),
        packed(experts, inner, hidden),
        jax.ShapeDtypeStruct((hidden, experts), bfloat16),
        jmm.Routing(8, "sigmoid", num_groups=8, top_groups=4, scale=2.5),
        correction_bias=jax.ShapeDtypeStruct((experts,), jnp.float32),
        shared=jmm.SharedExpert(packed(1, hidden, 2 * inner), packed(1, inner, hidden)),
    )
    with mock.patch.dict(os.environ, {compiler.ARCHITECTURE_VARIABLE: "sm_80"}):
        call = jax.jit(lambda x, layer: layer(x, implementation="cuda"))
        traced = call.trace(jax.ShapeDtypeStruct((1, hidden), bfloat16), layer)
        assert "jmm_router_m8" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert list(kernels.iterdir()) == [program]


def test_precompile_reports_failures(capsys, kernels):
    arguments = ["--arch", "sm_75", "--models", "qwen3-30b-a3b", "--tokens", "1", "--ops", "fused_moe"]
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


def test_the_image_precompiles_with_options_that_there_are():
    recipe = (pathlib.Path(__file__).parents[2] / "containers" / "Dockerfile").read_text()
    defaults = {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.*)$", recipe, re.MULTILINE)}
    (command,) = re.findall(r"^RUN python -m jax_marlin_moe precompile (.*)$", recipe, re.MULTILINE)
    parser = argparse.ArgumentParser(exit_on_error=False)
    precompile.add_arguments(parser)
    options = parser.parse_args(shlex.split(string.Template(command).substitute(defaults)))
    assert options.arch == [defaults["ARCH"]]
    assert options.models == defaults["MODELS"].split()
