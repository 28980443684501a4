"""AutoAWQ checkpoints, version "gemm": 4-bit codes packed along N, integer zero points in every group."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization, group_size_from
from jax_marlin_moe.checkpoint.quantization_keys import OTHER_MODULE, RECORD, RUNTIME, SEARCH, TENSORS_SHOW, Method
from jax_marlin_moe.checkpoint.schemes.stacks import check_float_scales, integer_format, pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    Storage,
    check_finite,
    number_of_groups,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.schemes.words import zeros_are_baked
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.layout import split_words
from jax_marlin_moe.packing import check_stack, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

AWQ = Method(
    "awq",
    read=("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "packing_format", "extra_config",
          "data_type"),
    harmless={
        "modules_to_not_convert": TENSORS_SHOW, "backend": RUNTIME, "do_fuse": RUNTIME, "fuse_max_seq_len": RUNTIME,
        "modules_to_fuse": RUNTIME, "exllama_config": RUNTIME, "export_compatible": RECORD, "meta": RECORD,
        "lm_head": OTHER_MODULE, "sym": "zero_point says it", "desc_act": "no tensor of AWQ has an order",
        "batch_size": SEARCH, "iters": SEARCH, "nsamples": SEARCH, "seqlen": SEARCH, "autoround_version": RECORD,
        "low_gpu_mem_usage": RUNTIME, "block_name_to_quantize": TENSORS_SHOW,
    },
    fixed={"pack_dtype": ("int32",), "method": ("awq",), "format": ("gemm",), "checkpoint_format": ("gemm",)},
    file="quant_config.json",
)  # fmt: skip

_CODES_PER_WORD = 8


# Bit position of column n % pf inside an AWQ word: docs/formats.md, "Source packings".
_AWQ_ORDER = {4: (0, 4, 1, 5, 2, 6, 3, 7), 8: (0, 2, 1, 3)}


@partial(jax.jit, static_argnames="bits")
def unpack_awq(words: Int32[Array, "*batch N/pf"], bits: int = 4) -> UInt8[Array, "*batch N"]:
    """Codes (or zero points) of AutoAWQ's `gemm` packing along N."""
    codes = split_words(words, _AWQ_ORDER[bits], bits)
    return codes.reshape(*words.shape[:-1], -1)


def decode_awq(qweight: Array, qzeros: Array | None, scales: Array, *, bits: int = 4) -> LogicalLinear:
    """AutoAWQ "gemm": words along N, columns interleaved; no `qzeros` where the format has its zero point baked in."""
    zeros = None if qzeros is None else unpack_awq(qzeros, bits=bits)
    return LogicalLinear(unpack_awq(qweight, bits=bits), scales, zeros)


@dataclasses.dataclass(frozen=True)
class AwqStorage(Scheme):
    """How an AWQ linear is stored.

    Attributes:
        group_size: rows of K that share a scale, None for one group.
        symmetric: whether the config promises that all zero points are 8; files may then lack them.
        baked: whether all zero points of the matrix are 8.
    """

    group_size: int | None
    symmetric: bool = False
    baked: bool = False
    methods: ClassVar[tuple[Method, ...]] = (AWQ,)
    known_as: ClassVar[str] = "AutoAWQ gemm"
    marks: ClassVar[tuple[str, ...]] = (".qweight",)

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where they differ."""
        return "int4" if self.baked else "int4_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """AutoAWQ's own key names (`w_bit`, `q_group_size`) count as well."""
        by_auto_round = "auto_awq" in (quantization.keys.text("packing_format", None, null=True) or "")
        if linear.name(".qweight") not in files or not (quantization.method == "awq" or by_auto_round):
            return None
        if not by_auto_round:
            version = quantization.keys.text("version", "gemm").lower()
            if version != "gemm":
                raise quantization.keys.fault("version", "'gemm'", ": no other layout can be loaded")
        rule = quantization.module_rule(linear.module, "extra_config")
        keys = Keys({**quantization.config, **rule}, quantization.source)
        bits = "bits" if "bits" in keys else "w_bit"
        if keys.integer(bits) != 4:
            raise keys.fault(bits, f"4 for {linear.module}")
        keys.choice("data_type", ["int"], None)
        size = "group_size" if "group_size" in keys else "q_group_size"
        symmetric = not keys.boolean("zero_point", True)
        sizes = get_format("int4" if symmetric else "int4_zp").group_sizes
        return cls(group_size_from(keys, size, k=k, sizes=sizes), symmetric=symmetric)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Words along N."""
        shape = shape_of_rank(files, linear.name(".qweight"), 2, "I32")
        return None if shape is None else (shape[0], shape[1] * _CODES_PER_WORD)

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> Storage:
        """Zero points need no storage where all of the matrix are 8."""
        baked = True
        for linear in linears:
            if self.symmetric and linear.name(".qzeros") not in files:
                continue
            of_linear = zeros_are_baked(self._zeros(files, linear, k, n), 4)
            if self.symmetric and not of_linear:
                raise files.fault(linear.name(".qzeros"), "holds zero points other than 8; zero_point is false")
            baked = baked and of_linear
            files.drop_pages()
        return dataclasses.replace(self, baked=baked)

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, zero points (None where baked in) and scales."""
        groups, words = number_of_groups(k, self.group_size), n // _CODES_PER_WORD
        qweight = linear.read(files, ".qweight", (k, words), ("I32",), columns=1, rows=0)
        scales = linear.read(files, ".scales", (groups, n), FLOATS, columns=1, rows=0 if groups > 1 else None)
        check_finite(files, linear.name(".scales"), scales)
        return qweight, None if self.baked else self._zeros(files, linear, k, n), scales

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_awq(*tensors)

    def _zeros(self, files: TensorFolder, linear: Linear, k: int, n: int) -> np.ndarray:
        groups, words = number_of_groups(k, self.group_size), n // _CODES_PER_WORD
        return linear.read(files, ".qzeros", (groups, words), ("I32",), columns=1, rows=0 if groups > 1 else None)


def from_awq(
    qweight: Int32[Array, "experts K N/8"],
    qzeros: Int32[Array, "experts groups N/8"] | None,
    scales: Float[Array, "experts groups N"],
    *,
    bits: int = 4,
    group_size: int | None = None,
) -> MarlinWeights:
    """Packs AutoAWQ tensors (version "gemm"), experts stacked in front; `(q - z) * s`, exact.

    The format is "int4_zp" or "int8_zp", without `qzeros` "int4" or "int8".

    Args:
        qweight: codes packed along N, interleaved as AutoAWQ does.
        qzeros: zero points, packed likewise; None where all are 8 (128 for 8 bit).
        scales: float16, bfloat16 or float32, kept as they are.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, bits is neither 4 nor 8, or the group size is not determined.
    """
    row = integer_format(bits, zeros=qzeros is not None)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    check_float_scales("scales", scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1], qweight.shape[2] * row.codes_per_word
    groups = scales.shape[1]
    check_stack("scales", scales.shape, (experts, groups, n))
    if qzeros is not None:
        check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
        check_stack("qzeros", qzeros.shape, (experts, groups, n // row.codes_per_word))
    size = resolve_group_size(group_size, k, groups, row)
    return pack_stack(decode_awq, (qweight, qzeros, scales), row, k, n, size, options={"bits": bits})
