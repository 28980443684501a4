"""The peers that `benchmarks.blocks` times on its own routings: name, and how to time a block of it.

Each takes (shape, tokens, ids [repeats, tokens, top_k], dtype=, samples=, pause_seconds=, weight_format=), makes
weights of the shape's group size itself, and returns columns of the results, or None where it is not installed. A peer
that fails raises. Blocks of peers have silu and no biases.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.peer_humming import compile_humming_blocks, humming_block
from benchmarks.peer_humming_weights import WEIGHT_FORMATS
from benchmarks.peer_tokamax import tokamax_block

PEERS: dict[str, Callable[..., dict[str, Any] | None]] = {"humming": humming_block, "tokamax": tokamax_block}

# The formats of weights that each is timed on.
PEER_FORMATS = {"humming": WEIGHT_FORMATS, "tokamax": ("int4",)}

# Those that compile the kernels of all numbers of tokens beside each other: (shape, numbers of tokens, dtype=,
# weight_format=).
COMPILERS: dict[str, Callable[..., None]] = {"humming": compile_humming_blocks}
