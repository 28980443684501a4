"""Names of the experts' axis in both modules: placement on a mesh by them, and calls that agree with one device."""

import pathlib
import subprocess
import sys

from jax_marlin_moe.flax.parts import expert_axes


def test_experts_are_placed_by_the_name_of_their_axis():
    program = pathlib.Path(__file__).with_name("two_devices.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


def test_all_arrays_of_routed_experts_begin_with_them():
    assert expert_axes("down", "expert", stacked=False) == ("expert",)
    assert expert_axes("gate_up", "expert", stacked=True) == (None, "expert")
    assert expert_axes("router", "expert", stacked=True) == ()
    assert expert_axes("down", None, stacked=True) == ()
