"""The CUDA headers, what the compiler says of a source, and what is said where there is no compiler."""

import re

import jax
import jax.numpy as jnp
import pytest
from abstract_calls import CALL, abstract_block, needs_nvrtc

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import cache, compiler

HEADERS = sorted(
    path.relative_to(compiler.source_directory()).as_posix() for path in compiler.source_directory().rglob("*.cuh")
)


@needs_nvrtc
@pytest.mark.parametrize("header", HEADERS)
def test_every_header_includes_what_it_uses(header, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert compiler.compile_cubin.__wrapped__(f'#include "{header}"', "sm_90a")


def test_instructions_stand_in_one_folder():
    assert {
        header.split("/")[0] for header in HEADERS if "asm" in (compiler.source_directory() / header).read_text()
    } == {"ptx"}


def test_headers_use_no_builtin_that_an_older_compiler_lacks():
    """NVRTC 12.9 and 13.0 do not parse offsetof, 13.5 does."""
    root = compiler.source_directory()
    assert not [path for path in root.rglob("*.cuh") if re.search(r"\boffsetof\(|__builtin_", path.read_text())]


def test_the_key_of_a_program_depends_on_headers_in_folders(monkeypatch, tmp_path):
    (tmp_path / "ptx").mkdir()
    digests = []
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    for text in ("one", "another"):
        (tmp_path / "ptx" / "a.cuh").write_text(text)
        digests.append(compiler._headers_digest.__wrapped__())
    (tmp_path / "ptx" / "a.cuh").rename(tmp_path / "a.cuh")
    assert len({*digests, compiler._headers_digest.__wrapped__()}) == 3


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("this is no C++", "sm_90a"),
        ('#include "absent.cuh"', "sm_90a"),
        ("", "sm_42"),
        ("this is no C++", "compute_80"),
        ("", "compute_42"),
    ],
)
def test_what_the_compiler_refuses_is_a_compilation_error(source, architecture, monkeypatch, capsys):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    with pytest.raises(compiler.CompilationError, match=f"refused a kernel for {architecture}"):
        compiler.compile_cubin.__wrapped__(source, architecture)
    assert source in capsys.readouterr().err


def test_a_missing_compiler_names_the_extra(monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(compiler, "version", missing)
    reason = compiler.unavailable_reason.__wrapped__()
    assert "No module named 'cuda'" in reason
    assert "jax_marlin_moe[cuda13]" in reason
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: reason)
    with pytest.raises(ImportError, match=r"cannot compile its CUDA kernels: .*install jax_marlin_moe\[cuda13\]"):
        compiler.compile_cubin.__wrapped__("", "sm_90a")
    with pytest.raises(ValueError, match=r"implementation is 'cuda', .*install jax_marlin_moe\[cuda13\]"):
        jax.eval_shape(
            lambda *arrays: jmm.fused_moe(*arrays, implementation="cuda"),
            *abstract_block(4, 2, 128, 64, 4, jnp.float16),
        )


def test_a_missing_compiler_is_no_reason_to_carry_the_reference_unasked(monkeypatch, lower):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    arguments = abstract_block(4, 2, 128, 64, 4, jnp.float16)
    with pytest.raises(ValueError, match="lowered for cuda on a cpu backend would carry the slow reference: NVRTC was"):
        lower("sm_90a", jmm.fused_moe, *arguments)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="slow reference on cuda: NVRTC was not found"):
        text = lower("sm_90a", jmm.fused_moe, *arguments)
    assert CALL not in text
    assert "dot_general" in text
