"""The handlers of CUDA programs under sanitizers, on a driver that runs nothing: needs a C++ compiler, no card."""

import os
import pathlib
import shutil
import subprocess

import jax
import pytest
from abstract_calls import needs_nvrtc

from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.align import plan_align

ROOT = pathlib.Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
CXX, CC = (os.environ.get(name) or shutil.which(default) for name, default in (("CXX", "g++"), ("CC", "gcc")))

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CXX is None or CC is None, reason="there is no C++ compiler"),
]


def run(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment |= {"ASAN_OPTIONS": "abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"} | variables
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the harness and, in `new` and `old`, drivers that count parameters and that do not."""
    folder = tmp_path_factory.mktemp("cuda_handlers")
    for name, options in (("new", []), ("old", ["-DFAKE_OLD_DRIVER"])):
        (folder / name).mkdir()
        run(CC, "-shared", "-fPIC", "-O1", *options, NATIVE / "fake_libcuda.c", "-o", folder / name / "libcuda.so.1")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    sources = [NATIVE / "cuda_program_fuzz.cc", *sorted((ROOT / "csrc" / "ffi").glob("cuda_*.cc"))]
    harness_of_all = folder / "harness.cc"  # they share headers: one translation unit compiles in half the time
    harness_of_all.write_text("".join(f'#include "{source}"\n' for source in sources))
    headers = ["-I", ROOT / "csrc", "-isystem", jax.ffi.include_dir()]
    libraries = ["-ldl", "-pthread"]
    harness = folder / "cuda_program_fuzz"
    run(CXX, "-std=c++17", "-Og", "-g1", "-Wall", *sanitizers, *headers, harness_of_all, *libraries, "-o", harness)
    return folder


@pytest.mark.parametrize("driver", ["new", "old"])
def test_programs_run_or_are_refused_by_name(built, driver):
    output = run(built / "cuda_program_fuzz", 4000, 1, LD_LIBRARY_PATH=str(built / driver))
    assert "4000 calls" in output


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a"])
def test_an_image_is_accepted_whole_alone(built, tmp_path, architecture):
    plan = plan_align(12, 5, 8, False, architecture)
    (tmp_path / "image").write_bytes(compiler.compile_cubin(plan.source, architecture))
    run(built / "cuda_program_fuzz", "image", tmp_path / "image")


def test_ptx_is_text_that_ends_with_its_only_nul(built, tmp_path):
    (tmp_path / "image").write_bytes(b".version 8.0\n.target sm_80\n.address_size 64\n" + b"// \n" * 500 + b"\0")
    run(built / "cuda_program_fuzz", "image", tmp_path / "image")
