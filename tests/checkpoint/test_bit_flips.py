"""Two thousand flipped bits in checkpoints: a load says what is wrong, or means what an independent decoder says.

Ordinary runs flip half of them.
"""

import pathlib
import shutil

import checkpoint_files as files
import numpy as np
import oracle
import pytest

from jax_marlin_moe.checkpoint import load_moe_layer

DATA = pathlib.Path(__file__).parents[1] / "data"
LOADS = 31  # of each folder and part
DECODERS = {
    "ck_awq": files.awq,
    "ck_q3_gptq_True": files.gptq,
    "ck_llmc_W4A16": files.pack_quantized,
    "ck_llmc_W4A16_ASYM": files.pack_quantized,
    "ck_llmc_W8A16": lambda t, m: files.pack_quantized(t, m, bits=8),
    "ck_llmc_NVFP4A16": files.nvfp4_compressed_tensors,
    "ck_llmc_MXFP4A16": files.mxfp4_compressed_tensors,
    "ck_modelopt": files.nvfp4_modelopt,
}


@pytest.mark.covering
@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("name", DECODERS)
def test_flipped_bits_are_refused_or_decoded(tmp_path, name, part):
    """One bit of the header in every third load, six of the data in the others."""
    shutil.copytree(DATA / name, tmp_path / name)
    path = tmp_path / name / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng([len(name), part])
    refused = 0
    for load in range(LOADS):
        changed = bytearray(raw)
        low, high, count = (0, 8 + size, 1) if load % 3 == 0 else (8 + size, len(raw), 6)
        for position in rng.integers(low, high, count):
            changed[position] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        layer, said = None, ""
        try:
            layer = load_moe_layer(tmp_path / name, 0)
        except (ValueError, OSError) as error:
            said = str(error)
        if layer is None:
            assert name in said
            refused += 1
            continue
        tensors = files.read(path)
        module = "model.layers.0.mlp"
        linears = [[f"{module}.experts.{e}.{part}" for part in ("gate_proj", "up_proj", "down_proj")] for e in range(4)]
        with np.errstate(over="ignore", invalid="ignore"):
            dense = [[DECODERS[name](tensors, linear) for linear in expert] for expert in linears]
            found = [oracle.dense(matrix) for matrix in (layer.gate_up, layer.down)]
        gate_up = np.stack([np.concatenate(expert[:2], axis=1) for expert in dense])
        for ours, expected in zip(found, (gate_up, np.stack([expert[2] for expert in dense])), strict=True):
            compare(ours, expected, name)
        np.testing.assert_array_equal(np.asarray(layer.router.T, np.float64), tensors[f"{module}.gate.weight"])
    assert LOADS / 10 < refused < LOADS  # most of a header is noticed, and most data are values


def compare(found, expected, name):
    if name == "ck_q3_gptq_True":  # the order of down is in the columns of gate and up, and they share one order
        found, expected = (np.sort(array.reshape(len(array), -1), axis=1) for array in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=2**-20, atol=1e-38)
