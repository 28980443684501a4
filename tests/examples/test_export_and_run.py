"""The exported step of a decoder writes what the decoder does, from its files alone."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from examples import export_and_run
from examples.generate import generate
from examples.models import load

CHECKPOINT = pathlib.Path(__file__).parents[1] / "data" / "ck_modelopt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    assert export_and_run.main(["export", str(CHECKPOINT), str(folder), "--capacity", "12", "--dtype", "float16"]) == 0
    return folder


def test_it_writes_the_tokens_of_the_decoder(folder, capsys):
    assert export_and_run.main(["run", str(folder), "--tokens", "5", "17", "200", "--new-tokens", "6"]) == 0
    model = load(CHECKPOINT, dtype=jnp.float16)
    chunks = generate(model, np.asarray([[5, 17, 200]], np.int32), new_tokens=6, chunk=5)
    expected = np.concatenate(list(chunks), axis=1)[0].tolist()
    assert [int(word) for word in capsys.readouterr().out.split()] == expected


def test_files_and_lengths_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"there are 3 tokens and 62 new ones; .* at most 64"):
        list(export_and_run.run(folder, [1, 2, 3], 62))
    (tmp_path / "step.bin").write_bytes((folder / "step.bin").read_bytes())
    np.savez(tmp_path / "weights.npz", np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"has other arrays than step\.bin takes; export both again"):
        list(export_and_run.run(tmp_path, [1], 2))
