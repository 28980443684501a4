"""What a free-threaded Python must do with the package: `nox -s free_threaded` runs it.

The GIL stays off behind the import, threads that share a compiled block get the same bits as one thread alone, and
checkpoints are read, or refused with words where safetensors is missing.
"""

import importlib.util
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer

THREADS, CALLS = 4, 50
CHECKPOINT = pathlib.Path(jmm.__file__).parent / "cli" / "demo_checkpoint"


def main() -> None:
    """Raises AssertionError where one of these does not hold."""
    assert not sys._is_gil_enabled(), "the GIL is on: run a free-threaded Python, with PYTHON_GIL unset"
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up, down = (
        jmm.quantize(jax.random.normal(key, shape) * shape[1] ** -0.5, "int4", group_size=64)
        for key, shape in zip(keys, ((4, 128, 128), (4, 64, 128)), strict=False)
    )
    x = jax.random.normal(keys[2], (16, 128), jnp.bfloat16)
    weights, ids = jmm.route(jnp.asarray(x[:, :4], jnp.float32), top_k=2)
    block = jax.jit(lambda x: jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cpu"))
    rows = [x * (1 + number) for number in range(THREADS)]
    expected = [np.asarray(block(x)) for x in rows]

    def call(number: int) -> bool:
        return all(np.array_equal(block(rows[number]), expected[number]) for _ in range(CALLS))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(call, range(THREADS))), "threads disagree with one thread alone"
    print(f"{THREADS * CALLS} calls of one block from {THREADS} threads are right, and the GIL is off")
    if importlib.util.find_spec("safetensors"):
        load_moe_layer(CHECKPOINT, layer=0)
        print("a checkpoint is read")
    else:
        try:
            load_moe_layer(CHECKPOINT, layer=0)
        except ImportError as error:
            print(f"refused: {error}")
        else:
            raise AssertionError("a checkpoint was read without safetensors")
    assert not sys._is_gil_enabled(), "something turned the GIL on"


if __name__ == "__main__":
    main()
