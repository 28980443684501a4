"""Expert blocks with random weights, rows and routing, from descriptions that say where they differ."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from oracle import Experts, expert_block, random_experts, random_routing, random_rows

import jax_marlin_moe as jmm


@dataclasses.dataclass(frozen=True)
class Case:
    """One block. The defaults are an ordinary one; each case says where it differs."""

    name: str
    tokens: int = 33
    top_k: int = 2
    experts: int = 6
    hidden: int = 128
    inner: int = 128
    group_size: int | None = 64
    down_group_size: int | None = 64
    weight_format: str = "int4"
    down_format: str = "int4"
    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    routing: str = "distinct"
    bias: bool = False
    expert_map: tuple[int, ...] | None = None
    reordered: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    x: np.ndarray
    gate_up: Experts
    down: Experts
    router: np.ndarray
    ids: np.ndarray
    options: dict

    def run(self, **changes):
        return jmm.fused_moe(
            self.x, self.gate_up.packed(), self.down.packed(), self.router, self.ids, **(self.options | changes)
        )

    def expected(self):
        expert_map = self.options["expert_map"]
        return expert_block(self.x, self.gate_up, self.down, self.router, self.ids, expert_map=expert_map)


def make_call(case: Case, implementation: str | None, seed=0) -> Call:
    rng = np.random.default_rng(seed)
    shared = {"scale_dtype": jnp.dtype(case.scale_dtype), "bias": case.bias}
    gate_up = random_experts(
        rng,
        case.experts,
        case.hidden,
        2 * case.inner,
        group_size=case.group_size,
        weight_format=case.weight_format,
        reordered=case.reordered,
        **shared,
    )
    down = random_experts(
        rng,
        case.experts,
        case.inner,
        case.hidden,
        group_size=case.down_group_size,
        weight_format=case.down_format,
        **shared,
    )
    routed = case.experts if case.expert_map is None else len(case.expert_map)
    x = random_rows(rng, case.tokens, case.hidden, jnp.dtype(case.dtype))
    router, ids = random_routing(rng, case.tokens, case.top_k, routed, case.routing)
    expert_map = None if case.expert_map is None else np.asarray(case.expert_map, np.int32)
    return Call(x, gate_up, down, router, ids, {"expert_map": expert_map, "implementation": implementation})
