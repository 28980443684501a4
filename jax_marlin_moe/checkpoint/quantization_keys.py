"""Every key of a quantisation config: read, harmless for a stated reason, or refused by name.

A key that a table lacks is refused: a setting that the loader does not know may change what the tensors mean.
"""

from collections.abc import Mapping

from jax_marlin_moe.checkpoint.keys import Keys

# Why a key does not matter to the weights.
_TENSORS_SHOW = "the tensors show which modules are quantised, and how"
_SEARCH = "says how codes and scales were searched for, not what they mean"
_RUNTIME = "a choice of the kernels or the memory of another tool"
_RECORD = "a record of the tool that wrote the file"
_ACTIVATIONS = "rounds activations; the weights are what is loaded, and x stays in 16 bits"
_CACHE = "about the key-value cache"
_OTHER_MODULE = "about a module that no layer of experts has"

# Keys that a scheme reads; `quant_method` is read by the loader.
_READ: Mapping[str, tuple[str, ...]] = {
    "awq": ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "packing_format", "extra_config"),
    "gptq": ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype", "dynamic",
             "is_marlin_format"),
    "auto-round": ("bits", "group_size", "desc_act", "sym", "packing_format", "extra_config", "data_type", "pack_dtype",
                   "checkpoint_format", "zero_point"),
    "compressed-tensors": ("config_groups", "format", "version", "group_size", "bits", "desc_act"),
    "modelopt": ("quant_algo", "group_size", "config_groups", "quantized_layers"),
    "fp8": ("weight_block_size", "config_groups", "group_size", "quantized_layers", "quant_algo", "moe_quant_algo",
            "activation_scheme", "scale_fmt"),
    "mxfp4": (),
    "hqq": ("quant_config",),
}  # fmt: skip

_HARMLESS: Mapping[str, Mapping[str, str]] = {
    "awq": {
        "modules_to_not_convert": _TENSORS_SHOW, "backend": _RUNTIME, "do_fuse": _RUNTIME, "fuse_max_seq_len": _RUNTIME,
        "modules_to_fuse": _RUNTIME, "exllama_config": _RUNTIME, "export_compatible": _RECORD, "meta": _RECORD,
        "lm_head": _OTHER_MODULE, "sym": "zero_point says it", "desc_act": "no tensor of AWQ has an order",
        "batch_size": _SEARCH, "iters": _SEARCH, "nsamples": _SEARCH, "seqlen": _SEARCH, "autoround_version": _RECORD,
        "low_gpu_mem_usage": _RUNTIME, "block_name_to_quantize": _TENSORS_SHOW, "data_type": "AWQ codes are integers",
    },
    "gptq": {
        "static_groups": "g_idx says which group a row is in", "true_sequential": _SEARCH, "damp_percent": _SEARCH,
        "damp_auto_increment": _SEARCH, "act_group_aware": _SEARCH, "mse": _SEARCH, "v2": _SEARCH, "v2_alpha": _SEARCH,
        "gptaq": _SEARCH, "foem": _SEARCH, "dataset": _SEARCH, "batch_size": _SEARCH, "model_seqlen": _SEARCH,
        "pad_token_id": _SEARCH, "cache_block_outputs": _SEARCH, "tokenizer": _SEARCH, "quantizer": _RECORD,
        "lm_head": _OTHER_MODULE, "meta": _RECORD, "model_name_or_path": _RECORD, "model_file_base_name": _RECORD,
        "block_name_to_quantize": _TENSORS_SHOW, "modules_in_block_to_quantize": _TENSORS_SHOW,
        "module_name_preceding_first_block": _TENSORS_SHOW, "modules_to_not_convert": _TENSORS_SHOW,
        "use_cuda_fp16": _RUNTIME, "use_exllama": _RUNTIME, "exllama_config": _RUNTIME, "max_input_length": _RUNTIME,
        "disable_exllama": _RUNTIME, "backend": _RUNTIME, "hyb_act": _SEARCH, "parallel_packing": _RUNTIME,
        "pack_impl": _RUNTIME, "offload_to_disk": _RUNTIME, "offload_to_disk_path": _RUNTIME,
    },
    "auto-round": {
        **dict.fromkeys(
            ("iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr", "enable_quanted_input", "dataset", "amp",
             "enable_minmax_tuning", "enable_norm_bias_tuning", "gradient_accumulate_steps", "seed", "damp_percent",
             "true_sequential", "enable_alg_ext", "disable_opt_rtn"),
            _SEARCH,
        ),
        **dict.fromkeys(
            ("act_bits", "act_group_size", "act_sym", "act_dynamic", "act_data_type"), _ACTIVATIONS
        ),
        "autoround_version": _RECORD, "model_dtype": _RECORD, "scale_dtype": "the tensors have a dtype",
        "provider": _RECORD, "low_gpu_mem_usage": _RUNTIME, "low_cpu_mem_usage": _RUNTIME, "backend": _RUNTIME,
        "block_name_to_quantize": _TENSORS_SHOW, "quant_block_list": _TENSORS_SHOW, "lm_head": _OTHER_MODULE,
        "to_quant_block_names": _TENSORS_SHOW, "modules_to_not_convert": _TENSORS_SHOW, "quant_lm_head": _OTHER_MODULE,
        "supported_types": _RECORD, "static_kv_dtype": _CACHE, "static_attention_dtype": _CACHE,
    },
    "compressed-tensors": {
        "ignore": _TENSORS_SHOW, "quantization_status": _RECORD, "kv_cache_scheme": _CACHE,
        "global_compression_ratio": _RECORD, "producer": _RECORD,
    },
    "modelopt": {
        "ignore": _TENSORS_SHOW, "exclude_modules": _TENSORS_SHOW, "producer": _RECORD, "kv_cache_scheme": _CACHE,
        "kv_cache_quant_algo": _CACHE, "kv_cache_quant_method": _CACHE, "quantization_status": _RECORD,
        "pre_quant_scale": "the tensors of that name are checked, linear by linear",
        "awq_block_size": "group_size says it", "modules_to_not_convert": _TENSORS_SHOW, "version": _RECORD,
    },
    "fp8": {
        "activation_scale_ub": _ACTIVATIONS, "modules_to_not_convert": _TENSORS_SHOW,
        "ignored_layers": _TENSORS_SHOW, "ignore": _TENSORS_SHOW, "exclude_modules": _TENSORS_SHOW,
        "expert_dtype": _TENSORS_SHOW, "kv_cache_scheme": _CACHE, "kv_cache_quant_algo": _CACHE,
        "dequantize": _RUNTIME, "producer": _RECORD,
    },
    "mxfp4": {"modules_to_not_convert": _TENSORS_SHOW, "dequantize": _RUNTIME, "swizzle": _RUNTIME},
    "hqq": {"skip_modules": _TENSORS_SHOW},
}  # fmt: skip

# What harmless keys must be, so that their reason holds: a list of modules that is an object, or a flag that is a word,
# is of a tool that means something else by it.
_LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules", "skip_modules")
_FLAGS = (
    "static_groups", "true_sequential", "lm_head", "quant_lm_head", "sym", "desc_act", "dequantize", "swizzle",
    "pre_quant_scale", "do_fuse", "export_compatible", "act_group_aware", "v2", "act_dynamic", "use_exllama",
    "disable_exllama", "use_cuda_fp16", "cache_block_outputs",
)  # fmt: skip
_OBJECTS = ("kv_cache_scheme", "producer", "meta")

# Keys of any method that change what the weights, or the rows that meet them, mean: nothing of the loader does that, so
# they must be switched off.
_TRANSFORMS = (
    "transform_config", "transforms", "rotation", "rotation_config", "hadamard", "hadamard_config", "online_had",
    "spinquant", "spinquant_config", "quip", "adapter", "super_bits", "super_group_size", "regex_config",
    "smoothquant", "dynamic_config", "has_zero_point",
)  # fmt: skip

# Keys with one value that the loader follows: what it may be.
_ONE_VALUE: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "awq": {"pack_dtype": ("int32",), "method": ("awq",), "format": ("gemm",), "checkpoint_format": ("gemm",)},
    "gptq": {"method": ("gptq",)},
    "auto-round": {"method": ("gptq", "auto-round")},
    "compressed-tensors": {"sparsity_config": (None, {}, {"format": "dense"})},
    "fp8": {"fmt": ("e4m3", "float8_e4m3fn", "float8_e4m3", None)},
}
_OFF: tuple[object, ...] = (None, False, {}, [], "", 0)


_OTHERS = {"auto-round": ("auto-round", "gptq")}  # tables of another tool that count as well


def check_keys(method: str, keys: Keys) -> None:
    """Raises ValueError, naming file and key, where a config has a key that is not read and not harmless."""
    method = "modelopt" if method.startswith("modelopt") else method
    for key in keys.values:
        tables = _OTHERS.get(method, (method,))
        if key == "quant_method" or any(key in _READ[table] for table in tables):
            continue
        if any(key in _HARMLESS[table] for table in tables):
            _check_kind(key, keys)
            continue
        _check_value(method, key, keys)
    groups = keys.values.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict):  # what is no object, the readers of groups refuse
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


def _check_value(method: str, key: str, keys: Keys) -> None:
    allowed = _ONE_VALUE.get(method, {}).get(key)
    if allowed is None:
        _check_off(key, keys)
    elif not any(type(keys.values[key]) is type(value) and keys.values[key] == value for value in allowed):
        raise keys.fault(key, f"one of {', '.join(map(repr, allowed))}; nothing else can be loaded")


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
    raise keys.fault(key, "left out", ": the loader does not know this key, and it may change what the weights mean")
