"""Work tiles that CTAs take as they come to them: of many rows, which differ in how long they last."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import planned_block

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import block_kernels
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.replay import operands_by_routing, replayed_block

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 16, 2, 512, 1024, 1000
MANY = WgmmaTile(48, 2, 1, 1, 128, 3, 1, True)
FEW = WgmmaTile(32, 2, 1, 1, 128, 3, 1, True)


def matrices():
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (EXPERTS, HIDDEN, 2 * INTERMEDIATE), (EXPERTS, INTERMEDIATE, HIDDEN)
    dense = [jax.random.normal(key, s, jnp.bfloat16) / s[1] ** 0.5 for key, s in zip(keys, shapes, strict=True)]
    return [jmm.quantize(matrix, "int4") for matrix in dense]


def operands():
    rng = np.random.default_rng(1)
    popularity = np.log(1 / np.arange(1, EXPERTS + 1))
    ids = np.argsort(-(popularity + rng.gumbel(size=(TOKENS, EXPERTS))), axis=1)[:, :TOP_K].astype(np.int32)
    x = jnp.asarray(rng.normal(size=(TOKENS, HIDDEN)), jnp.bfloat16)
    return x, *matrices(), jnp.asarray(rng.uniform(0.1, 1, ids.shape), jnp.float32), jnp.asarray(ids)


def block(tile):
    def call(x, gate_up, down, weights, ids):
        scheme = BlockScheme("aligned", tile, tile)
        return jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cuda", cuda_scheme=scheme)

    return call


@pytest.mark.gpu
def test_results_are_those_of_tiles_taken_in_turn(monkeypatch):
    arguments = operands()
    taken = jax.jit(block(MANY))
    results = [np.asarray(taken(*arguments).astype(jnp.float32)) for _ in range(5)]
    monkeypatch.setattr(block_kernels.BlockKernels, "_takes_tiles", lambda *_: False)
    in_turn = np.asarray(jax.jit(block(MANY))(*arguments).astype(jnp.float32))
    assert np.abs(in_turn).max() > 0
    for result in results:
        np.testing.assert_array_equal(result, in_turn)


@pytest.mark.gpu
def test_a_product_by_itself_leaves_the_counter_as_it_was():
    """Else a second launch would find no work: the result would be that of the first rows."""
    x, gate_up, down, weights, ids = operands()
    scheme = BlockScheme("aligned", MANY, MANY)
    replayed = replayed_block(x, [(gate_up, down)], [weights], np.asarray(ids)[None], scheme=scheme)
    first, second = (replayed.plan.position(stage) for stage in ("gate_up", "down"))
    y = len(operands_by_routing(x, [(gate_up, down)], [weights], np.asarray(ids)[None])[0])
    replayed.microseconds(samples=1)
    scratch = replayed._buffers[0][y + 1 :]
    (counters,) = [buffer for buffer in scratch if buffer.shape == (2,)]
    for kernels in ([first], [second], None):
        replayed.microseconds(kernels, samples=1)
        assert np.asarray(jnp.array(counters, copy=True)).tolist() == [0, 0]
    replayed.close()


def test_few_rows_take_their_turns():
    def counters(tile):
        x, gate_up, down = jax.eval_shape(lambda: operands()[:3])
        planned = planned_block(x, gate_up, down, top_k=TOP_K, scheme=BlockScheme("aligned", tile, tile))
        offsets = [
            kernel.pointers["token_tiles.taken"].offset
            for kernel in planned.kernels
            if kernel.pointers.get("token_tiles.taken")
        ]
        return offsets, [buffer.shape for buffer in planned.scratch if buffer.shape == (2,)]

    assert counters(MANY) == ([0, 4], [(2,)])
    assert counters(FEW) == ([], [])
