"""CPU handlers under sanitizers for some seconds, and the proof that the sanitizers would see a missing check.

Where FUZZ_SECONDS is set, as by `.ci/run`, the fuzzer runs for so long, with the kernels of every instruction set that
this processor runs.
"""

import os
import re
import subprocess

import pytest
from native import cpu_handlers_fuzz

SECONDS = os.environ.get("FUZZ_SECONDS")
CALLS = 3000
SANITIZERS = "address,undefined"
SCALES_CHECK = '  contract.HasExtents(operands.scales, prefix + "scales", {experts, groups, n});\n'

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(cpu_handlers_fuzz.compiler() is None, reason="no C++ compiler"),
]


def run(program, calls, seconds="30"):
    environment = os.environ if SECONDS else os.environ | {"JAX_MARLIN_MOE_CPU_ISA": "portable"}
    return subprocess.run(
        [program, seconds, str(calls), "1", "1"], env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Compiled once for both tests: the second one replaces the object that it changes."""
    folder = tmp_path_factory.mktemp("objects")
    kernels = cpu_handlers_fuzz.COMPILED if SECONDS else ()
    return cpu_handlers_fuzz.compile_objects(SANITIZERS, folder, cpu_handlers_fuzz.sources(folder, kernels), kernels)


def test_handlers_have_no_memory_errors_and_no_undefined_behaviour(objects, tmp_path):
    program = cpu_handlers_fuzz.link(SANITIZERS, tmp_path / "fuzz", objects.values())
    result = run(program, 1_000_000, SECONDS) if SECONDS else run(program, CALLS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_check_of_a_shape_is_seen(objects, tmp_path):
    text = (cpu_handlers_fuzz.CSRC / "ffi" / "matrix_operands.cc").read_text()
    assert text.count(SCALES_CHECK) == 1
    unchecked = tmp_path / "matrix_operands.cc"
    unchecked.write_text(text.replace(SCALES_CHECK, ""))
    replaced = cpu_handlers_fuzz.compile_objects(SANITIZERS, tmp_path / "build", [unchecked])
    program = cpu_handlers_fuzz.link(SANITIZERS, tmp_path / "fuzz", (objects | replaced).values())
    result = run(program, 30 * CALLS)
    assert result.returncode != 0, result.stdout
    # Scales that are too short, or none at all: which a call reads first is the threads' affair.
    assert re.search("ERROR: AddressSanitizer|runtime error: load of null pointer", result.stderr), result.stderr
