"""CPU handlers under sanitizers for some seconds, and the proof that the sanitizers would see a missing check.

`.ci/run` runs the same program for longer, with the kernels of every instruction set.
"""

import os
import shutil
import subprocess

import pytest
from native import cpu_handlers_fuzz

CALLS = 3000
SCALES_CHECK = '  contract.HasExtents(operands.scales, prefix + "scales", {experts, groups, n});\n'

pytestmark = pytest.mark.skipif(cpu_handlers_fuzz.compiler() is None, reason="no C++ compiler")


def run(program, calls=CALLS):
    environment = os.environ | {"JAX_MARLIN_MOE_CPU_ISA": "portable"}
    return subprocess.run(
        [program, "30", str(calls), "1", "1"], env=environment, capture_output=True, text=True, timeout=600
    )


def test_handlers_have_no_memory_errors_and_no_undefined_behaviour(tmp_path):
    result = run(cpu_handlers_fuzz.build("address,undefined", tmp_path, only_portable=True))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_check_of_a_shape_is_seen(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(cpu_handlers_fuzz.CSRC, csrc)
    operands = csrc / "ffi" / "matrix_operands.cc"
    text = operands.read_text()
    assert text.count(SCALES_CHECK) == 1
    operands.write_text(text.replace(SCALES_CHECK, ""))
    result = run(cpu_handlers_fuzz.build("address", tmp_path / "build", csrc=csrc, only_portable=True), 30 * CALLS)
    assert "ABORTING" in result.stderr, result.stdout
