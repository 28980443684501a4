"""Checkpoints over the devices of a mesh: what `four_devices_loading.py` finds in a process with four of them."""

import pytest
from other_process import cases_of, checked_by

FOLDERS = (
    "ck_awq",
    "ck_llmc_MXFP4A16",
    "ck_llmc_NVFP4A16",
    "ck_llmc_W4A16",
    "ck_modelopt",
    "ck_q3_gptq_True",
    "ck_q3",
)
CHECKS = [f"{folder} both" for folder in FOLDERS]
CHECKS += ["ck_q3 experts", "nvfp4 from plain weights", "packed", "stack", "orbax", "example"]

# The rest has a scheme of every kind: packed integers, orders of rows, global scales.
OTHER_SCHEMES = ("ck_awq both", "ck_llmc_MXFP4A16 both", "ck_modelopt both", "ck_q3 both", "nvfp4 from plain weights")


@pytest.fixture(scope="module")
def found(request):
    return checked_by("four_devices_loading.py", request, CHECKS)


@pytest.mark.parametrize("check", cases_of(CHECKS, OTHER_SCHEMES))
def test_what_is_loaded_in_shares_is_what_is_placed(found, check):
    assert found[check] is None, found[check]
