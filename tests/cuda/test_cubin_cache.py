"""Cubins in the kernel cache: what is in their key, when they are compiled anew, whole files for readers."""

import os
import subprocess
import sys

import pytest

from jax_marlin_moe.cuda import cache, compiler


@pytest.fixture
def compilations(monkeypatch):
    """Replaces NVRTC by a recorder: what is compiled, in order."""
    compiled = []

    def record(source, architecture):
        compiled.append((source, architecture))
        return f"{source} for {architecture}".encode()

    monkeypatch.setattr(compiler, "_compile", record)
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return compiled


def compile_anew(source="a", architecture="sm_90a"):
    """As a new process would: nothing is remembered but the disk."""
    return compiler.compile_cubin.__wrapped__(source, architecture)


def test_what_was_compiled_is_found_again(monkeypatch, tmp_path, compilations):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "new" / "folder"))
    assert compile_anew() == compile_anew() == b"a for sm_90a"
    assert compilations == [("a", "sm_90a")]
    assert [file.suffix for file in (tmp_path / "new" / "folder").iterdir()] == [".cubin"]


def test_everything_that_shapes_a_cubin_is_in_its_key(monkeypatch, tmp_path, compilations):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    compile_anew()
    compile_anew(source="b")
    compile_anew(architecture="sm_80")
    compile_anew(architecture="compute_80")
    monkeypatch.setattr(compiler, "version", lambda: (13, 1))
    compile_anew()
    monkeypatch.setattr(compiler, "_headers_digest", lambda: b"edited")
    compile_anew()
    assert len(compilations) == 6
    assert len(list(tmp_path.iterdir())) == 6


def test_the_cache_can_be_switched_off(monkeypatch, tmp_path, compilations):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    compile_anew()
    compile_anew()
    assert len(compilations) == 2
    assert not list(tmp_path.iterdir())


def test_the_cache_lies_in_the_users_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "jax_marlin_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "jax_marlin_moe"


def test_a_folder_that_cannot_be_made_costs_a_compilation(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "folder"))
    assert compile_anew() == compile_anew() == b"a for sm_90a"
    assert len(compilations) == 2


@pytest.mark.parametrize("function", ["replace", "fdopen"])
def test_a_write_that_fails_leaves_nothing_behind(monkeypatch, tmp_path, compilations, function):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, function, full)
    assert compile_anew() == b"a for sm_90a"
    assert not list(tmp_path.iterdir())


def test_readers_never_see_half_a_file(monkeypatch, tmp_path):
    """Four processes store different files of a megabyte under one name while this one reads it."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    script = (
        "import runpy, sys\n"
        "store = runpy.run_path(sys.argv[2])['store']\n"  # without the package, whose imports take longer
        "for _ in range(100): store('key', bytes([int(sys.argv[1])]) * 2**20)\n"
    )
    command = [sys.executable, "-c", script]
    writers = [subprocess.Popen([*command, str(i), cache.__file__], cwd=tmp_path) for i in range(4)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        cubin = cache.load("key")
        if cubin is not None:
            assert len(cubin) == 2**20
            assert len(set(cubin)) == 1
            seen.add(cubin[0])
    assert [writer.returncode for writer in writers] == [0] * 4
    assert seen
    assert [file.name for file in tmp_path.iterdir()] == ["key.cubin"]
