"""A slot that a hand-made alignment lists more than once: its first row counts, in a block that has an expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc
from oracle import assert_product_close, grouped_product, random_experts, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler, plan_products
from jax_marlin_moe.cuda.choose import candidates
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile

EXPERTS, TOP_K = 6, 2


def repeating_alignment(rng, tokens, block_size):
    """Random slots, each several times, in blocks of random experts, some of nobody's; and the expert of each slot."""
    slots, blocks = tokens * TOP_K, 4 * -(-tokens * TOP_K // block_size) + 3
    listed = rng.integers(-1, slots + 2, (blocks, block_size)).astype(np.int32)
    owners = rng.integers(-1, EXPERTS + 1, blocks).astype(np.int32)
    count = blocks * block_size - block_size // 2 - 1  # ends inside a block
    served = np.full(slots, -1, np.int32)
    for row, slot in enumerate(listed.reshape(-1)[:count]):
        expert = owners[row // block_size]
        if 0 <= slot < slots and served[slot] < 0 and 0 <= expert < EXPERTS:
            served[slot] = expert
    alignment = jmm.BlockAlignment(
        jnp.asarray(listed.reshape(-1)), jnp.asarray(owners), jnp.asarray([count], jnp.int32), block_size, EXPERTS
    )
    return alignment, served


def first_tile_of(kind):
    """In place of `choose_listed_tile`."""

    def choose(shape, num_slots, num_experts, list_block, capability):
        sizes = [rows for rows in range(8, list_block + 1, 8) if list_block % rows == 0]
        tokens = sizes[-1] if kind is WgmmaTile else max(rows for rows in sizes if rows <= 32)
        return next(tile for tile in candidates(shape, tokens, capability) if isinstance(tile, kind))

    return choose


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [MmaTile, WgmmaTile])
@pytest.mark.parametrize("block_size", [8, 16, 32, 48, 64])
@pytest.mark.parametrize(("tokens", "weighted"), [(3, True), (40, False), (700, True)])
def test_the_first_row_of_a_slot_counts_on_the_card(monkeypatch, tokens, weighted, block_size, kind):
    if kind is WgmmaTile and compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    monkeypatch.setattr(plan_products, "choose_listed_tile", first_tile_of(kind))
    rng = np.random.default_rng(tokens + block_size)
    experts = random_experts(rng, EXPERTS, 256, 192, group_size=64, bias=True, scale_dtype=jnp.dtype("bfloat16"))
    x = random_rows(rng, tokens, 256, jnp.dtype("bfloat16"))
    alignment, served = repeating_alignment(rng, tokens, block_size)
    router = rng.uniform(0.5, 1.5, (tokens, TOP_K)).astype(np.float32)
    router.reshape(-1)[served < 0] = np.nan  # of slots that nobody serves
    options = {"topk_weights": router, "mul_topk_weights": True} if weighted else {}
    with jax.default_device(jax.devices("cuda")[0]):
        run = jax.jit(lambda *a: jmm.moe_gemm(*a, top_k=TOP_K, implementation="cuda", **options))
        first = np.asarray(run(x, experts.packed(), alignment))
        for _ in range(20):
            np.testing.assert_array_equal(
                np.asarray(run(x, experts.packed(), alignment)).view(np.uint16), first.view(np.uint16)
            )
    weights = np.nan_to_num(router) if weighted else None
    expected = grouped_product(x, experts, served.reshape(tokens, TOP_K), router_weights=weights)
    assert_product_close(first, expected)
    assert not first[served < 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
def test_a_weight_of_nan_in_a_dropped_slot_is_of_no_account_on_the_card(tokens):
    """One token reads its slots straight off the ids, a few are grouped by every CTA, many are aligned."""
    rng = np.random.default_rng(tokens)
    options = {"group_size": 64, "scale_dtype": jnp.dtype("bfloat16")}
    gate_up = random_experts(rng, EXPERTS, 128, 256, **options).packed()
    down = random_experts(rng, EXPERTS, 128, 128, **options).packed()
    x = random_rows(rng, tokens, 128, jnp.dtype("bfloat16"))
    ids = rng.integers(-2, EXPERTS + 2, (tokens, 4)).astype(np.int32)
    ids[0] = [-1, 2, EXPERTS, 2**31 - 1]
    router = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    dropped = (ids < 0) | (ids >= EXPERTS)
    with jax.default_device(jax.devices("cuda")[0]):
        run = jax.jit(lambda *a: jmm.fused_moe(*a, implementation="cuda"))
        clean, poisoned = (
            np.asarray(run(x, gate_up, down, np.where(dropped, value, router).astype(np.float32), ids))
            for value in (0.0, np.nan)
        )
    assert not np.isnan(poisoned.astype(np.float32)).any()
    np.testing.assert_array_equal(poisoned.view(np.uint16), clean.view(np.uint16))


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("sm_75", MmaTile), ("sm_80", MmaTile), ("sm_90a", MmaTile), ("sm_90a", WgmmaTile)],
)
@pytest.mark.parametrize("tokens", [5, 900])
def test_a_product_finds_first_rows_and_stores_no_others(monkeypatch, architecture, kind, tokens):
    """The kernels of `moe_gemm` read what the kernel before found."""
    monkeypatch.setattr(plan_products, "choose_listed_tile", first_tile_of(kind))
    weights = jax.eval_shape(
        lambda dense: jmm.quantize(dense, "int4", group_size=64), jax.ShapeDtypeStruct((EXPERTS, 256, 192), jnp.float16)
    )
    planned = plan_products.plan_moe_gemm(
        jax.ShapeDtypeStruct((tokens, 256), jnp.float16),
        weights,
        top_k=TOP_K,
        block_size=64,
        list_length=2 * tokens + 500,
        weighted=False,
        architecture=architecture,
    )
    clear, find, gemm = planned.kernels
    assert clear.body.startswith("Clear<")
    assert find.body == "FindFirstRows<Facts>"
    assert find.structs["Facts"] == {
        "slots": 2 * tokens,
        "experts": EXPERTS,
        "list_block": 64,
        "list_length": 2 * tokens + 500,
    }
    assert [scratch.shape for scratch in planned.scratch] == [(2 * tokens,)]
    assert gemm.body.startswith(f"{kind.kernel}<")
    scratch = clear.pointers["first_rows"].buffer
    assert find.pointers["first_rows"].buffer == scratch
    assert gemm.pointers["token_tiles.first_rows"].buffer == scratch
    assert compiler.compile_cubin(planned.source, architecture)
