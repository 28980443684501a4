"""The command doctor."""

import pathlib
import re

import jax

import jax_marlin_moe
from jax_marlin_moe import native
from jax_marlin_moe.cli.main import main
from jax_marlin_moe.cuda import cache, compiler

ROOT = pathlib.Path(__file__).parents[2]


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
    assert "kernel cache    off: JAX_MARLIN_MOE_CACHE_DIR is empty; set it to a folder" in output
    assert "runs on cpu     no: it was left out" in output


def test_doctor_fails_without_a_device(capsys, monkeypatch):
    def no_device(*_):
        raise RuntimeError("no backend")

    monkeypatch.setattr(jax, "devices", no_device)
    monkeypatch.setattr(jax, "local_devices", no_device)
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_80")
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    reason = r"JAX finds no device( with JAX_PLATFORMS=\S+)?: no backend"  # names the platforms that were chosen
    assert re.search(rf"^device {{10}}none: {reason}$", captured.out, re.MULTILINE)
    assert re.search(rf"nothing works: {reason}; reinstall jax", captured.err)


def test_doctor_names_unknown_values(capsys, monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "x")
    monkeypatch.setenv(native.CPU_ISA_VARIABLE, "sse9")
    monkeypatch.setattr(native, "shadowed_installation", lambda: pathlib.Path("/somewhere/jax_marlin_moe"))
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "architecture    none: JAX_MARLIN_MOE_CUDA_ARCH is 'x'; it must" in output
    assert "CPU kernels     JAX_MARLIN_MOE_CPU_ISA is 'sse9'; it must be one of portable, avx2," in output
    assert f"{jax_marlin_moe.__version__} in {pathlib.Path(jax_marlin_moe.__file__).parent}" in output
    assert "SHADOWS the package that is installed in /somewhere, which is not what runs here" in output
    monkeypatch.setenv(native.CPU_ISA_VARIABLE, "portable")
    assert main(["doctor"]) == 0
    assert "CPU kernels     portable (from JAX_MARLIN_MOE_CPU_ISA)" in capsys.readouterr().out


def test_instruction_sets_are_those_of_the_native_module(monkeypatch):
    source = (ROOT / "csrc" / "cpu" / "gemm_dispatch.cc").read_text()
    assert set(re.findall(r'\{"(\w+)", \w+Panel,', source)) == set(native.CPU_ISAS)
    for name in native.CPU_ISAS:
        monkeypatch.setenv(native.CPU_ISA_VARIABLE, name)
        complaint = native.cpu_isa_complaint()
        assert complaint is None or "and this CPU lacks" in complaint
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert "'avx512bf16', and this CPU lacks avx512_bf16, avx512bw" in native.cpu_isa_complaint()
    monkeypatch.setenv(native.CPU_ISA_VARIABLE, "avx2")
    assert native.cpu_isa_complaint() is None
