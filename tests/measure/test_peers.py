"""What the benchmarks' peers are timed on."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cuda.bindings.driver")
from benchmarks import blocks, peer_humming_weights
from benchmarks.peers import PEER_FORMATS, PEERS
from jax_marlin_moe.formats import FORMATS


def test_every_peer_has_formats_that_are_ours():
    assert PEER_FORMATS.keys() == PEERS.keys()
    for formats in PEER_FORMATS.values():
        assert set(formats) <= FORMATS.keys()


@pytest.mark.parametrize(("name", "zero"), [("int4", 8), ("mxfp4", 0), ("nvfp4", 0)])
def test_the_peers_codes_have_the_values_of_ours(name, zero):
    values = np.asarray(FORMATS[name].code.decode(jnp.arange(16, dtype=jnp.uint8)), np.float32) - zero
    np.testing.assert_array_equal(values, np.asarray(peer_humming_weights.FORMATS[name].values, np.float32))


def test_a_peer_is_not_timed_on_formats_that_it_does_not_have(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["blocks", "--peers", "tokamax", "--format", "nvfp4", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit):
        blocks.main()
    assert "tokamax is timed on int4, not on nvfp4" in capsys.readouterr().err
