"""GPTQ checkpoints, v1 and v2, 4 and 8 bit, with or without act-order: codes packed along K."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization, group_size_from
from jax_marlin_moe.checkpoint.quantization_keys import (
    ACTIVATIONS,
    CACHE,
    OTHER_MODULE,
    RECORD,
    RUNTIME,
    SEARCH,
    TENSORS_SHOW,
    Method,
)
from jax_marlin_moe.checkpoint.schemes.stacks import check_float_scales, integer_format, pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    Storage,
    check_finite,
    number_of_groups,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.schemes.values import row_order
from jax_marlin_moe.checkpoint.schemes.words import unpack_along_k, unpack_along_n, zeros_are_baked
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_stack, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

GPTQ = Method(
    "gptq",
    read=("bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "pack_dtype", "dynamic",
          "is_marlin_format"),
    harmless={
        "static_groups": "g_idx says which group a row is in", "true_sequential": SEARCH, "damp_percent": SEARCH,
        "damp_auto_increment": SEARCH, "act_group_aware": SEARCH, "mse": SEARCH, "v2": SEARCH, "v2_alpha": SEARCH,
        "gptaq": SEARCH, "foem": SEARCH, "dataset": SEARCH, "batch_size": SEARCH, "model_seqlen": SEARCH,
        "pad_token_id": SEARCH, "cache_block_outputs": SEARCH, "tokenizer": SEARCH, "quantizer": RECORD,
        "lm_head": OTHER_MODULE, "meta": RECORD, "model_name_or_path": RECORD, "model_file_base_name": RECORD,
        "block_name_to_quantize": TENSORS_SHOW, "modules_in_block_to_quantize": TENSORS_SHOW,
        "module_name_preceding_first_block": TENSORS_SHOW, "modules_to_not_convert": TENSORS_SHOW,
        "use_cuda_fp16": RUNTIME, "use_exllama": RUNTIME, "exllama_config": RUNTIME, "max_input_length": RUNTIME,
        "disable_exllama": RUNTIME, "backend": RUNTIME, "hyb_act": SEARCH, "parallel_packing": RUNTIME,
        "pack_impl": RUNTIME, "offload_to_disk": RUNTIME, "offload_to_disk_path": RUNTIME,
    },
    fixed={"method": ("gptq",)},
    file="quantize_config.json",
)  # fmt: skip

AUTO_ROUND = Method(
    "auto-round",
    read=(*GPTQ.read, "packing_format", "extra_config", "data_type", "zero_point"),
    harmless={
        **GPTQ.harmless,
        **dict.fromkeys(
            ("iters", "nsamples", "seqlen", "batch_size", "lr", "minmax_lr", "enable_quanted_input", "dataset", "amp",
             "enable_minmax_tuning", "enable_norm_bias_tuning", "gradient_accumulate_steps", "seed", "damp_percent",
             "true_sequential", "enable_alg_ext", "disable_opt_rtn"),
            SEARCH,
        ),
        **dict.fromkeys(
            ("act_bits", "act_group_size", "act_sym", "act_dynamic", "act_data_type"), ACTIVATIONS
        ),
        "autoround_version": RECORD, "model_dtype": RECORD, "scale_dtype": "the tensors have a dtype",
        "provider": RECORD, "low_gpu_mem_usage": RUNTIME, "low_cpu_mem_usage": RUNTIME, "backend": RUNTIME,
        "block_name_to_quantize": TENSORS_SHOW, "quant_block_list": TENSORS_SHOW, "lm_head": OTHER_MODULE,
        "to_quant_block_names": TENSORS_SHOW, "modules_to_not_convert": TENSORS_SHOW, "quant_lm_head": OTHER_MODULE,
        "supported_types": RECORD, "static_kv_dtype": CACHE, "static_attention_dtype": CACHE,
    },
    fixed={"method": ("gptq", "auto-round")},
)  # fmt: skip


def decode_gptq(
    qweight: Array, qzeros: Array | None, scales: Array, order: Array | None, *, bits: int, stored_less_one: bool
) -> LogicalLinear:
    """GPTQ: codes along K, zero points along N; no `qzeros` where the format has its zero point baked in."""
    codes = unpack_along_k(qweight, bits=bits)
    zeros = None
    if qzeros is not None:
        zeros = unpack_along_n(qzeros, bits=bits) + jnp.uint8(stored_less_one)
    return LogicalLinear(codes if order is None else codes[order], scales, zeros)


def check_gptq_zeros(qzeros: np.ndarray, bits: int, less_one: bool) -> None:
    """Raises ValueError where a v1 zero point has no code."""
    largest = 2**bits - 1
    stored = np.ascontiguousarray(qzeros).view(np.uint8)
    fields = (stored & 15, stored >> 4) if bits == 4 else (stored,)
    if less_one and any((field == largest).any() for field in fields):
        raise ValueError(
            f"qzeros holds {largest}, a v1 zero point of {largest + 1}, which {bits} bits cannot hold; if the file "
            "stores zero points as they are, pass checkpoint_format='gptq_v2'"
        )


@dataclasses.dataclass(frozen=True)
class GptqStorage(Scheme):
    """How a GPTQ linear is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        less_one: whether zero points are stored less one (v1).
        desc_act: whether groups follow the activations: `g_idx` must then be there.
        symmetric: whether the config promises that all zero points are the middle code.
        baked: whether they are.
    """

    bits: int
    group_size: int | None
    less_one: bool
    desc_act: bool
    symmetric: bool
    baked: bool = False
    methods: ClassVar[tuple[Method, ...]] = (GPTQ, AUTO_ROUND)
    known_as: ClassVar[str] = "GPTQ, auto-round"
    marks: ClassVar[tuple[str, ...]] = (".qweight",)

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where they differ."""
        return f"int{self.bits}" if self.baked else f"int{self.bits}_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """`dynamic` rules override width and group size module by module."""
        packing = quantization.keys.text("packing_format", "auto_round:auto_gptq", null=True)
        by_auto_round = quantization.method == "auto-round" and "auto_awq" not in packing
        if linear.name(".qweight") not in files or not (quantization.method == "gptq" or by_auto_round):
            return None
        if by_auto_round and packing not in ("auto_round:auto_gptq", "auto_gptq", "auto_round:gptq"):
            raise quantization.keys.fault("packing_format", "'auto_round:auto_gptq' or 'auto_round:auto_awq'")
        rule = quantization.module_rule(linear.module, "dynamic", "extra_config")
        keys = Keys({**quantization.config, **rule}, quantization.source)
        if keys.integer("bits") not in (4, 8):
            raise keys.fault("bits", f"4 or 8 for {linear.module}")
        keys.choice("data_type", ["int"], None)
        keys.choice("pack_dtype", ["int32"], None)
        if keys.boolean("is_marlin_format", False, null=True):
            raise keys.fault("is_marlin_format", "false", ": only unpermuted GPTQ files can be loaded")
        name = "checkpoint_format" if "checkpoint_format" in keys else "format"
        variant = "gptq" if by_auto_round else keys.text(name, "gptq", null=True)
        if variant not in ("gptq", "gptq_v2"):
            raise keys.fault(name, "'gptq' or 'gptq_v2'", " (planar 'gptq_p' and Marlin files have other layouts)")
        bits = keys.integer("bits")
        return cls(
            bits=bits,
            group_size=group_size_from(keys, "group_size", k=k, sizes=get_format(f"int{bits}").group_sizes),
            less_one=variant == "gptq",
            desc_act=keys.boolean("desc_act", False, null=True),
            symmetric=keys.boolean("sym", False, null=True),
        )

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Words along K, of as many bits as the config and its rules say."""
        shape = shape_of_rank(files, linear.name(".qweight"), 2, "I32")
        if shape is None or quantization.method not in (GPTQ.name, AUTO_ROUND.name):
            return None
        rule = quantization.module_rule(linear.module, "dynamic", "extra_config")
        bits = Keys({**quantization.config, **rule}, quantization.source).integer("bits", low=1)
        return shape[0] * 32 // bits, shape[1]

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> Storage:
        """Zero points need no storage where all of the matrix are the middle code."""
        baked = True
        for linear in linears:
            qzeros = self._zeros(files, linear, k, n)
            try:
                check_gptq_zeros(qzeros, self.bits, self.less_one)
            except ValueError as error:
                raise files.fault(linear.name(".qzeros"), f"cannot be used: {error}") from None
            of_linear = zeros_are_baked(qzeros, self.bits, less_one=self.less_one)
            if self.symmetric and not of_linear:
                raise files.fault(
                    linear.name(".qzeros"),
                    f"holds zero points other than {2 ** (self.bits - 1)}; sym is true in the config, whose "
                    "checkpoint_format may be another than that of the file",
                )
            baked = baked and of_linear
            files.drop_pages()
        return dataclasses.replace(self, baked=baked)

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """From `g_idx`, where the file has it."""
        name = linear.name(".g_idx")
        if name not in files and not self.desc_act:
            return None
        index = linear.read(files, ".g_idx", (k,), ("I32",))
        try:
            return row_order(index, self.group_size or k)
        except ValueError as error:
            raise files.fault(name, f"cannot be used: {error}") from None

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, zero points (None where baked in) and scales."""
        groups = number_of_groups(k, self.group_size)
        qweight = linear.read(files, ".qweight", (k * self.bits // 32, n), ("I32",), columns=1, rows=0)
        scales = linear.read(files, ".scales", (groups, n), FLOATS, columns=1, rows=0 if groups > 1 else None)
        check_finite(files, linear.name(".scales"), scales)
        return qweight, None if self.baked else self._zeros(files, linear, k, n), scales

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        qweight, qzeros, scales = tensors
        return decode_gptq(qweight, qzeros, scales, order, bits=self.bits, stored_less_one=self.less_one)

    def _zeros(self, files: TensorFolder, linear: Linear, k: int, n: int) -> np.ndarray:
        groups = number_of_groups(k, self.group_size)
        rows = 0 if groups > 1 else None
        return linear.read(files, ".qzeros", (groups, n * self.bits // 32), ("I32",), columns=1, rows=rows)


def from_gptq(
    qweight: Int32[Array, "experts K/pf N"],
    qzeros: Int32[Array, "experts groups N/pf"],
    scales: Float[Array, "experts groups N"],
    *,
    g_idx: Int32[Array, "experts K"] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    checkpoint_format: str = "gptq",
) -> MarlinWeights:
    """Packs GPTQ tensors, experts stacked in front; `(q - z) * s[g_idx]`, exact.

    Codes whose zero points are all 8 (128 for 8 bit) become format "int4" ("int8"), others "int4_zp" ("int8_zp").
    Where `g_idx` is not `k // group_size`, rows are sorted by group and the order is kept in `input_order`.

    v1 files store z - 1. The writers' own conversion to v2 adds 1 to every code of a word by one addition to the word
    (0x11111111), so a stored 15 (255) would carry into its neighbour; the zero point 16 (256) that it stands for has
    no code. Such files are refused: their writers do not agree on what they mean.

    Args:
        qweight: codes packed along K.
        qzeros: zero points packed along N.
        scales: float16, bfloat16 or float32, kept as they are.
        g_idx: group of each row, concrete values; None means `k // group_size`. All groups must be equally long.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.
        checkpoint_format: "gptq" (v1: qzeros hold z - 1) or "gptq_v2" (they hold z).

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, groups are unequal or not determined, or a v1 zero point is 2^bits.
    """
    row = integer_format(bits, zeros=True)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
    check_float_scales("scales", scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1] * row.codes_per_word, qweight.shape[2]
    groups = scales.shape[1]
    check_stack("scales", scales.shape, (experts, groups, n))
    check_stack("qzeros", qzeros.shape, (experts, groups, n // row.codes_per_word))
    size = resolve_group_size(group_size, k, groups, row)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}; it must be 'gptq' or 'gptq_v2'")
    less_one = checkpoint_format == "gptq"
    stored = np.asarray(qzeros)
    check_gptq_zeros(stored, bits, less_one)
    baked = zeros_are_baked(stored, bits, less_one=less_one)
    if baked:
        row = integer_format(bits, zeros=False)
    order = None
    if g_idx is not None:
        check_array("g_idx", g_idx, ndim=2, dtype=jnp.int32)
        check_stack("g_idx", g_idx.shape, (experts, k))
        order = row_order(np.asarray(g_idx), size)
    tensors = (qweight, None if baked else qzeros, scales, order)
    options = {"bits": bits, "stored_less_one": less_one}
    return pack_stack(decode_gptq, tensors, row, k, n, size, order, options=options)
