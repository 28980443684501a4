"""The named argument shapes that tests and benchmarks share: the expert blocks of real models, by tokens."""

import dataclasses

from jax_marlin_moe.formats import WeightFormat


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The expert block of a model.

    Attributes:
        name: as in the benchmark results.
        num_experts: E.
        top_k: experts per token.
        hidden: H.
        intermediate: I of one expert (of one rank, where the name says tp).
        group_size: rows of K that share a scale, a multiple of the 16 rows of a packed tile.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int = 128

    def grouped(self, row: WeightFormat, group_size: int | None = None) -> "ModelShape":
        """The same block with this group size; by default its own where the format has it, else the customary one."""
        if group_size is None:
            group_size = self.group_size if self.group_size in row.group_sizes else row.group_sizes[-1]
        return dataclasses.replace(self, group_size=group_size)


MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("mixtral-8x7b", 8, 2, 4096, 14336),
        ModelShape("qwen3-30b-a3b", 128, 8, 2048, 768),
        ModelShape("qwen3-235b-a22b", 128, 8, 4096, 1536),
        ModelShape("deepseek-v3", 256, 8, 7168, 2048),
        ModelShape("deepseek-v3-tp8", 256, 8, 7168, 256),
        ModelShape("gpt-oss-20b", 32, 4, 2880, 2880),
        ModelShape("gpt-oss-120b", 128, 4, 2880, 2880),
        ModelShape("kimi-k2", 384, 8, 7168, 2048),
    )
}

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (256, 1024, 4096)
