"""Every key of a quantisation config: read, harmless for a stated reason, or refused by name.

A scheme states the keys of its methods in rows of `Method`. A key that no row has is refused: a setting that the loader
does not know may change what the tensors mean.
"""

import dataclasses
from collections.abc import Mapping

from jax_marlin_moe.checkpoint.keys import Keys, short

# Why a key does not matter to the weights.
TENSORS_SHOW = "the tensors show which modules are quantised, and how"
SEARCH = "says how codes and scales were searched for, not what they mean"
RUNTIME = "a choice of the kernels or the memory of another tool"
RECORD = "a record of the tool that wrote the file"
ACTIVATIONS = "rounds activations; the weights are what is loaded, and x stays in 16 bits"
CACHE = "about the key-value cache"
OTHER_MODULE = "about a module that no layer of experts has"


@dataclasses.dataclass(frozen=True)
class Method:
    """A `quant_method`, and every key that its configs may have.

    Attributes:
        name: its name.
        read: keys that the scheme reads, or compares with the tensors.
        harmless: keys that cannot change what the weights mean, each with the reason.
        fixed: keys that may only have one of a few values, those that the scheme follows.
        known: likewise of keys whose other values are names of what the loader does not know; null is allowed.
        file: a file that may hold the config in place of config.json, and then means this method.
    """

    name: str
    read: tuple[str, ...]
    harmless: Mapping[str, str]
    fixed: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    known: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    file: str | None = None


# What harmless keys must be, so that their reason holds: a list of modules that is an object, or a flag that is a word,
# is of a tool that means something else by it.
_LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "skip_modules")
_FLAGS = (
    "static_groups", "true_sequential", "lm_head", "quant_lm_head", "sym", "desc_act", "dequantize", "swizzle",
    "pre_quant_scale", "do_fuse", "export_compatible", "act_group_aware", "v2", "act_dynamic", "use_exllama",
    "disable_exllama", "use_cuda_fp16", "cache_block_outputs",
)  # fmt: skip
_OBJECTS = ("kv_cache_scheme", "producer", "meta")

# Keys of any method that change what the weights, or the rows multiplied with them, mean: the loader supports none of
# them, so they must be switched off.
_TRANSFORMS = (
    "transform_config", "transforms", "rotation", "rotation_config", "hadamard", "hadamard_config", "online_had",
    "spinquant", "spinquant_config", "quip", "adapter", "super_bits", "super_group_size", "regex_config",
    "smoothquant", "dynamic_config", "has_zero_point",
)  # fmt: skip
_OFF: tuple[object, ...] = (None, False, {}, [], "", 0)


def check_keys(method: Method, keys: Keys) -> None:
    """Raises ValueError, naming file and key, where a config has a key that is not read and not harmless."""
    for key in keys.values:
        if key in method.known:
            _check_known(key, keys, method.known[key])
        elif key in method.harmless:
            _check_kind(key, keys)
        elif key in method.fixed:
            _check_value(key, keys, method.fixed[key])
        elif key != "quant_method" and key not in method.read:
            _check_off(key, keys)
    groups = keys.values.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict):  # the readers of groups refuse anything else
            check_group(Keys(group, keys.source, f"{keys.path}config_groups.{name}."))
    meta = keys.object("meta", Keys({}, keys.source), null=True)
    for key in meta.values:
        if key in _TRANSFORMS:
            _check_off(key, meta)


def check_group(keys: Keys) -> None:
    """The same for one of `config_groups`, and for its `weights`."""
    for key in keys.values:
        if key not in ("weights", "targets", "format", "input_activations", "output_activations"):
            _check_off(key, keys)
    weights = keys.object("weights", None, null=True)
    if weights is None:
        return
    for key in weights.values:
        if key in ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "scale_dtype", "zp_dtype"):
            continue
        if key in ("observer", "observer_kwargs", "block_structure", "scale_bits"):
            continue  # how the scales were found; the others are compared with the tensors
        _check_off(key, weights)
    for key in ("input_activations", "output_activations"):
        keys.object(key, None, null=True)


def _check_kind(key: str, keys: Keys) -> None:
    if key in _LISTS:
        keys.texts(key, None, null=True)
    elif key in _FLAGS:
        keys.boolean(key, None, null=True)
    elif key in _OBJECTS:
        keys.object(key, None, null=True)


def _check_value(key: str, keys: Keys, allowed: tuple[object, ...]) -> None:
    if not any(type(keys.values[key]) is type(value) and keys.values[key] == value for value in allowed):
        raise keys.fault(key, f"one of {', '.join(map(repr, allowed))}; nothing else can be loaded")


def _check_known(key: str, keys: Keys, known: tuple[str, ...]) -> None:
    value = keys.values[key]
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"{keys.source}: {keys.path}{key} is {short(value)}; the loader knows {', '.join(known)}")


def _check_off(key: str, keys: Keys) -> None:
    """A transform must be off; a key that is not known is refused whatever it is, but for null."""
    value = keys.values[key]
    if value is None:
        return
    known = key in _TRANSFORMS or key == "dynamic"
    if known and any(type(value) is type(off) and value == off for off in _OFF):
        return
    if known:
        raise keys.fault(key, "off (null, false or empty)", ": the loader does not apply it")
    raise keys.fault(key, "omitted", ": the loader does not know this key, and it may change what the weights mean")
