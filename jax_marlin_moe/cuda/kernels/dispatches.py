"""What a table of dispatches says of rows and token tiles. Twin of csrc/cuda/dispatches.cuh."""

import jax.numpy as jnp

from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Facts, Pointer
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel


def resolve_kernel(
    num_rows: int,
    num_result_rows: int,
    num_dispatches: int,
    num_experts: int,
    tile_rows: int,
    columns: int,
    dtype: jnp.dtype,
    *,
    dispatches: int,
    tile_ends: int,
    owners: int,
    skipped: int,
    out: int,
) -> Kernel:
    """Checks a table of dispatches, and clears the rows of the result that it does not have."""
    facts: Facts = {
        "element": ELEMENT_TYPES[dtype.name],
        "dispatches": num_dispatches,
        "experts": num_experts,
        "source_rows": num_rows,
        "result_rows": num_result_rows,
        "rows": tile_rows,
        "columns": columns,
    }
    return Kernel(
        name=f"jmm_dispatches_m{num_result_rows}",
        headers=("dispatches.cuh",),
        body="ResolveDispatches<Facts>",
        structs={"Facts": facts},
        pointers={
            "dispatches": Pointer(dispatches, "int32"),
            "tile_ends": Pointer(tile_ends, "int32", written=True),
            "owners": Pointer(owners, "int32", written=True),
            "skipped": Pointer(skipped, "int32", written=True),
            "out": Pointer(out, dtype.name, written=True),
        },
        threads=256,
        shared_bytes=0,
        max_ctas=grid(1 + -(-num_result_rows // 8), "finding the rows of dispatches"),
    )
