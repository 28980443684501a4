"""The named argument shapes that tests and benchmarks share: the expert blocks and layers of real models."""

import dataclasses

from jax_marlin_moe.activations import Activation, swiglu
from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.routing import Routing


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


@dataclasses.dataclass(frozen=True)
class ModelLayer:
    """What a model's layer has beside the sizes of its expert block.

    Attributes:
        routing: how it chooses experts.
        router_bias: whether the logits have a bias.
        correction_bias: whether the choice has a bias of its own.
        shared: whether there is a shared expert, as large as one of the others.
        activation: of the experts.
        biased: whether the experts have biases.
    """

    routing: Routing
    router_bias: bool = False
    correction_bias: bool = False
    shared: bool = False
    activation: str | Activation = "silu"
    biased: bool = False


_V3 = ModelLayer(Routing(8, "sigmoid", num_groups=8, top_groups=4, scale=2.5), correction_bias=True, shared=True)
_GPT_OSS = ModelLayer(
    Routing(4, "identity", softmax_after_topk=True),
    router_bias=True,
    activation=swiglu(limit=7.0, alpha=1.702, beta=1.0),
    biased=True,
)

LAYERS: dict[str, ModelLayer] = {
    "mixtral-8x7b": ModelLayer(Routing(2)),
    "qwen3-30b-a3b": ModelLayer(Routing(8)),
    "qwen3-235b-a22b": ModelLayer(Routing(8)),
    "deepseek-v3": _V3,
    "deepseek-v3-tp8": _V3,
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-120b": _GPT_OSS,
    "kimi-k2": ModelLayer(Routing(8, "sigmoid", scale=2.827), correction_bias=True, shared=True),
}

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (256, 1024, 4096)
