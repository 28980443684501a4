"""What a config states of one linear, compared with what the loader takes its tensors for."""

import dataclasses
import re
from collections.abc import Collection

from jax_marlin_moe.byte_rows import GROUP, ByteDtype
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.tensors import TensorFolder

# How torch's names of dtypes are spelt in safetensors files; one stated type may have more than one.
_STORED = {
    "torch.float16": ("F16",), "torch.bfloat16": ("BF16",), "torch.float32": ("F32",),
    "torch.float8_e4m3fn": ("F8_E4M3",), "torch.uint8": ("U8", "F8_E8M0"), "torch.float8_e8m0fnu": ("U8", "F8_E8M0"),
}  # fmt: skip
# ModelOpt's names of methods whose rows are in e4m3, with a scale for each or one that is fixed.
E4M3_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A8_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8")
_ALGORITHM_KEYS = ("quant_algo", "group_size", "awq_block_size", "pre_quant_scale", "has_zero_point")


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What the loader takes a linear with floating-point codes for.

    Attributes:
        bits: of a code.
        group_sizes: rows of K that may be stated to share a scale; None is one group.
        algorithms: ModelOpt's names for it.
        strategies: compressed-tensors' names for how scales lie.
        formats: compressed-tensors' names for how it is stored.
        scale_bits: exponent and mantissa bits of ModelOpt's block scales, None where they are floats.
        block: the only `block_structure`, None where scales do not lie in blocks.
        types: of codes, as configs call them.
    """

    bits: int
    group_sizes: tuple[int | None, ...]
    algorithms: tuple[str, ...]
    strategies: tuple[str, ...]
    formats: tuple[str, ...]
    scale_bits: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    types: tuple[str, ...] = ("float",)


def group_of(quantization: Quantization, module: str) -> Keys | None:
    """The config group that a module belongs to: by name first, then by the class "Linear".

    Raises:
        ValueError: a group is malformed; or there are some, and the tool is compressed-tensors and none has the module.
    """
    by_class = None
    groups = quantization.keys.object("config_groups", Keys({}, quantization.source), null=True)
    globs = quantization.method != "compressed-tensors"
    for name in groups.values:
        group = groups.object(name)
        group.object("weights")
        for target in group.texts("targets", [], null=True):
            if target.startswith("re:"):
                found = quantization.matches(target.removeprefix("re:"), module)
            else:
                found = target == module or (globs and _matches_glob(quantization, target, module))
            if found:
                return group
            if target == "Linear":
                by_class = by_class or group
    if by_class is None and groups.values and not globs:
        raise ValueError(f"{quantization.source}: no config group has {module} among its targets")
    return by_class


def states_e4m3_inputs(quantization: Quantization, module: str) -> bool | None:
    """Whether the module's config group has rows in e4m3 with one fixed scale; None where it says nothing of rows.

    Raises:
        ValueError: the group is malformed.
    """
    group = group_of(quantization, module)
    inputs = None if group is None else group.object("input_activations", None, null=True)
    if inputs is None:
        return None
    fixed = inputs.values.get("dynamic") in (False, None)
    kind = inputs.values.get("type"), inputs.values.get("num_bits"), inputs.values.get("strategy")
    return fixed and kind in (("float", 8, "tensor"), ("float", 8, None))


def algorithm_of(quantization: Quantization, module: str) -> str | None:
    """ModelOpt's name for how a module is quantised: its own in `quantized_layers`, or that of the model."""
    layer = _layer_of(quantization, module)
    if layer is not None:
        return layer.text("quant_algo", None, null=True)
    keys = quantization.keys
    of_experts = keys.text("moe_quant_algo", None, null=True) if ".experts." in module else None
    return of_experts or keys.text("quant_algo", None, null=True)


def stated_activation_dtype(quantization: Quantization, module: str) -> ByteDtype | None:
    """What the config says that a module's rows are quantised to; None where it says nothing, or something else.

    Raises:
        ValueError: its group is malformed.
    """
    algorithm = algorithm_of(quantization, module)
    if algorithm in E4M3_ALGORITHMS:
        return "float8_e4m3fn"
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return "int8"
    group = group_of(quantization, module)
    inputs = None if group is None else group.object("input_activations", None, null=True)
    if inputs is not None:
        kind = inputs.values.get("type"), inputs.values.get("num_bits")
        strategy, size = inputs.values.get("strategy"), inputs.values.get("group_size")
        if kind == ("float", 8) and strategy == "group" and size == GROUP:
            return "float8_e4m3fn_g128"
        of_rows = strategy in ("tensor", "token") or (strategy is None and size is None)
        names: dict[tuple, ByteDtype] = {("float", 8): "float8_e4m3fn", ("int", 8): "int8"}
        return names.get(kind) if of_rows else None
    if quantization.method != "fp8" or quantization.config.get("activation_scheme") is None:
        return None
    blocks = quantization.config.get("weight_block_size") is not None
    return "float8_e4m3fn_g128" if blocks else "float8_e4m3fn"


def check_format(quantization: Quantization, group: Keys | None, formats: tuple[str, ...]) -> None:
    """Raises ValueError where a config group, or the config of all groups, states another format."""
    if group is not None:
        group.choice("format", formats, None, null=True)
    quantization.keys.choice("format", (*formats, "mixed-precision"), None, null=True)


def check_scale_dtype(files: TensorFolder, linear: Linear, suffix: str, keys: Keys) -> None:
    """Raises ValueError where the config states another dtype of scales than the file has."""
    stated = keys.choice("scale_dtype", tuple(_STORED), None, null=True)
    stored = files.dtype(linear.name(suffix))
    if stated is not None and stored is not None and stored not in _STORED[stated]:
        raise keys.fault(
            "scale_dtype",
            " or ".join(repr(name) for name in _STORED if stored in _STORED[name]) or "a dtype of floats",
            f", that of {linear.name(suffix)}, {stored}",
        )


def check_stated(
    files: TensorFolder, linear: Linear, scales: str, quantization: Quantization, assumed: Assumed
) -> None:
    """Compares the config with what a linear of floating-point codes is taken for.

    Args:
        files: the checkpoint.
        linear: the linear.
        scales: the suffix of its scales.
        quantization: the config.
        assumed: what it is taken for.

    Raises:
        ValueError: the config states something else of it; names file, key and both values.
    """
    module, keys = linear.module, quantization.keys
    group = group_of(quantization, module)
    if quantization.method == "compressed-tensors":
        check_format(quantization, group, assumed.formats)
    if group is not None:
        weights = group.object("weights")
        _check_bits(weights, module, assumed)
        _check_group_size(weights, module, assumed.group_sizes)
        check_scale_dtype(files, linear, scales, weights)
    layer = _layer_of(quantization, module)
    if layer is not None:
        for key in layer.values:
            if key not in _ALGORITHM_KEYS:
                raise layer.fault(key, "omitted", ": the loader does not know this key")
        layer.choice("quant_algo", assumed.algorithms)
        if layer.boolean("has_zero_point", False, null=True):
            raise layer.fault("has_zero_point", "false")
        _check_group_size(layer, module, assumed.group_sizes)
    if ".experts." in module:
        keys.choice("moe_quant_algo", assumed.algorithms, None, null=True)
    # The size for the whole model is that of its algorithm; modules of others are in groups or layers of their own.
    algorithm = keys.text("moe_quant_algo", None, null=True) or keys.text("quant_algo", None, null=True)
    alone = group is None and layer is None and algorithm is None
    if algorithm in assumed.algorithms or (quantization.method in ("fp8", "w4afp8") and alone):
        _check_group_size(keys, module, assumed.group_sizes)


def check_zero_point_dtype(keys: Keys, *, symmetric: bool) -> None:
    """Zero points are packed integers with the offset of the codes; where there are none their dtype says nothing."""
    if symmetric:
        keys.text("zp_dtype", None, null=True)
    else:
        keys.choice("zp_dtype", ["torch.int8"], None, null=True)


def check_order(keys: Keys) -> str | None:
    """`actorder`, "group" or "weight" by all its spellings; None where there is none."""
    if isinstance(keys.values.get("actorder"), bool):  # of the first versions
        return "group" if keys.values["actorder"] else None
    order = keys.choice("actorder", ("group", "weight", "dynamic", "static"), None, null=True)
    return {"dynamic": "group", "static": "weight"}.get(order or "", order)


def _check_bits(group: Keys, module: str, assumed: Assumed) -> None:
    if group.integer("num_bits", assumed.bits) != assumed.bits:
        raise group.fault("num_bits", f"{assumed.bits}, as the tensors of {module} have them")
    group.choice("type", assumed.types, None)
    group.choice("strategy", assumed.strategies, None, null=True)
    if not group.boolean("symmetric", True, null=True):
        raise group.fault("symmetric", "true", ": codes that are floats have no zero points")
    check_zero_point_dtype(group, symmetric=True)
    check_order(group)
    if group.values.get("scale_bits") is not None:
        stated = None if assumed.scale_bits is None else list(assumed.scale_bits)
        if repr(group.values["scale_bits"]) != repr(stated):
            raise group.fault("scale_bits", str(stated or "null"))
    if group.values.get("block_structure") is not None:
        must = None if assumed.block is None else list(assumed.block)
        spelled = "" if must is None else "x".join(map(str, must))
        if repr(group.values["block_structure"]) not in (repr(must), repr(spelled)):
            raise group.fault("block_structure", str(must or "null"))


def _check_group_size(keys: Keys, module: str, sizes: Collection[int | None]) -> None:
    size = keys.integer("group_size", None, null=True)
    if size is None and "group_size" not in keys:
        return
    if (None if size == -1 else size) not in {*sizes, None}:
        known = " or ".join(str(one) for one in sizes if one is not None)
        raise keys.fault("group_size", known or "null", f", that of the tensors of {module}")


def _layer_of(quantization: Quantization, module: str) -> Keys | None:
    """The entry of ModelOpt's `quantized_layers` for a module, whose keys are names or globs."""
    layers = quantization.keys.object("quantized_layers", None, null=True)
    for name in () if layers is None else layers.values:
        if layers is not None and (name == module or _matches_glob(quantization, name, module)):
            return layers.object(name)
    return None


def _matches_glob(quantization: Quantization, glob: str, module: str) -> bool:
    if "*" not in glob:
        return False
    return quantization.matches(".*".join(re.escape(part) for part in glob.split("*")) + "$", module)
