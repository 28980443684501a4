"""How model families name the tensors of a mixture-of-experts layer: one row each."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of one family.

    Attributes:
        model_types: `model_type` in config.json.
        block: the module of a layer's experts and router, `{layer}` its number.
        gate: the expert linear (H, I) that goes through the activation.
        up: the expert linear (H, I) that multiplies it.
        down: the expert linear (I, H).
        router: the router's tensor [E, H] inside the block.
        num_experts_keys: where config.json says E; the first that is there counts.
        intermediate_key: where config.json says I.
        renormalize: whether router weights are divided by their sum: a key of config.json (false where it is
            missing, as in transformers), or the family's fixed rule.
    """

    model_types: tuple[str, ...]
    block: str
    gate: str
    up: str
    down: str
    router: str
    num_experts_keys: tuple[str, ...]
    intermediate_key: str
    renormalize: str | bool

    def expert(self, layer: int, index: int, linear: str) -> str:
        """The module name of one linear of one expert."""
        return f"{self.block.format(layer=layer)}.experts.{index}.{linear}"


FAMILIES = (
    Family(
        model_types=("qwen3_moe",),
        block="model.layers.{layer}.mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="gate.weight",
        # Published files say num_experts, transformers 5 writes num_local_experts.
        num_experts_keys=("num_experts", "num_local_experts"),
        intermediate_key="moe_intermediate_size",
        renormalize="norm_topk_prob",
    ),
    Family(
        model_types=("mixtral",),
        block="model.layers.{layer}.block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        router="gate.weight",
        num_experts_keys=("num_local_experts",),
        intermediate_key="intermediate_size",
        renormalize=True,
    ),
)


def get_family(model_type: object, source: object) -> Family:
    """The row for a `model_type`; raises ValueError with the known ones otherwise, naming `source`."""
    for row in FAMILIES:
        if model_type in row.model_types:
            return row
    known = ", ".join(name for row in FAMILIES for name in row.model_types)
    raise ValueError(f"{source}: model_type is {model_type!r}; the loader knows {known}")
