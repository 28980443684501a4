"""The transposed CPU kernel in every width of its vectors, those of processors that this one is not included."""

import ctypes
import pathlib
import subprocess

import ml_dtypes
import numpy as np
import oracle
import pytest
from native import cpu_handlers_fuzz

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TILES, UNITS = 3, 2
# In the order of `Code` (csrc/cpu/gemm.h): bits of a code, and the values of all of them, less the kernel's center.
SIXTEEN_BITS = np.arange(2**16, dtype=np.uint16)
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
CODES = {
    "int4": (4, np.arange(16.0)),
    "int8": (8, np.arange(256.0) - 128),
    "e2m1": (4, np.concatenate([E2M1, -E2M1])),
    "bf16": (16, (SIXTEEN_BITS.astype(np.uint32) << 16).view(np.float32)),
    "fp16": (16, SIXTEEN_BITS.view(np.float16).astype(np.float32)),
    "e4m3": (8, np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)),
}

pytestmark = pytest.mark.skipif(cpu_handlers_fuzz.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=[4, 8, 16])
def kernel(request, tmp_path_factory):
    library = tmp_path_factory.mktemp("lanes") / "kernel.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-DLANES={request.param}", f"-I{ROOT / 'csrc'}"]
    command = [cpu_handlers_fuzz.compiler(), *options, str(HERE / "transposed_lanes.cc"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run


@pytest.mark.parametrize("code", CODES)
def test_lanes_are_those_of_the_layout(kernel, code):
    rng = np.random.default_rng(0)
    bits, values = CODES[code]
    usable = np.flatnonzero(np.abs(values) < 1e4)
    codes = rng.choice(usable, (TILES * 16, UNITS * 64)).astype(np.uint16)
    words = oracle.pack_codes(codes[None], bits)[0]
    dense = values[codes].astype(np.float64)
    for rows in (1, 2, 3, 7):
        x = rng.normal(size=(rows, UNITS * 64)).astype(np.float32)
        # In Marlin's grouped order: column c of a unit at 8 * (c % 8) + c / 8.
        ordered = np.ascontiguousarray(x.reshape(rows, UNITS, 8, 8).swapaxes(-1, -2))
        out = np.ones((rows, TILES * 16), np.float32)
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (words, ordered, out)]
        number = list(CODES).index(code)
        kernel(arrays[0], ctypes.c_int64(words.shape[1]), TILES, UNITS, number, arrays[1], rows, arrays[2])
        expected = 1 + x.astype(np.float64) @ dense.T
        np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
