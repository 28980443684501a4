"""The least time a block can take: each hit expert's bytes once over the memory, its products over the tensor cores."""

import dataclasses

import numpy as np

from jax_marlin_moe.measure.models import ModelShape


@dataclasses.dataclass(frozen=True)
class Limit:
    """Bytes and operations of one block, and the ceilings that they are held against.

    Attributes:
        hit_experts: distinct experts in the routing.
        weight_bytes: packed codes and scales of the hit experts, both matrices.
        flops: of both products.
        read_tb_s: measured read bandwidth.
        bf16_tflop_s: measured matrix rate.
    """

    hit_experts: float
    weight_bytes: float
    flops: float
    read_tb_s: float
    bf16_tflop_s: float

    @property
    def weight_microseconds(self) -> float:
        """To read the experts."""
        return self.weight_bytes / self.read_tb_s / 1e6

    @property
    def microseconds(self) -> float:
        """The larger of the two times."""
        return max(self.weight_microseconds, self.flops / self.bf16_tflop_s / 1e6)


def block_limit(
    shape: ModelShape, routings: np.ndarray, *, expert_bytes: float, read_tb_s: float, bf16_tflop_s: float
) -> Limit:
    """The limit for routings [repeats, tokens, top_k], averaged over the repeats.

    `expert_bytes` are those of one expert: codes, scales and zero points of both matrices.
    """
    hit = float(np.mean([len(np.unique(ids)) for ids in routings]))
    weights = 3 * shape.hidden * shape.intermediate
    slots = routings.shape[1] * routings.shape[2]
    return Limit(hit, hit * expert_bytes, 2.0 * slots * weights, read_tb_s, bf16_tflop_s)
