"""Random matrices of a model's layers for `humming-kernels`, and the block on them in float32."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.peer_humming_kernels import quotient
from jax_marlin_moe.measure.models import ModelShape

try:
    import torch
except ImportError:
    torch = None

# The multiples that vLLM and SGLang pad matrices to before they hand them to the library.
_PAD_N, _PAD_K = 256, 128
_ROW_TYPES = {"float8_e4m3fn": "float8e4m3", "int8": "int8"}  # the library's names


@dataclasses.dataclass(frozen=True)
class PeerFormat:
    """What the library calls a format of weights.

    Attributes:
        schema: its names of the types.
        values: of the codes, in order.
    """

    schema: dict[str, str]
    values: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """Of uniform codes."""
        return float(np.std(self.values))


_E2M1_VALUES = tuple(sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
FORMATS = {
    "int4": PeerFormat({"dtype": "int4"}, tuple(range(-8, 8))),
    "mxfp4": PeerFormat({"dtype": "float4e2m1", "scale_dtype": "float8e8m0"}, _E2M1_VALUES),
    "nvfp4": PeerFormat(
        {"dtype": "float4e2m1", "scale_dtype": "float8e4m3", "scale_type": "group", "scale_2_type": "tensor"},
        _E2M1_VALUES,
    ),
}
WEIGHT_FORMATS = tuple(FORMATS)


def _matrix_sizes(shape: ModelShape) -> tuple[tuple[int, int, float], tuple[int, int, float]]:
    """N, K and the gain of gate_up and of down: the activation and the sum shrink the rows, down scales them back."""
    return (2 * shape.intermediate, shape.hidden, 1.0), (shape.hidden, shape.intermediate, 4.0)


def _random_tensors(shape: ModelShape, weight_format: str, layer: int, matrix: int, dtype) -> dict[str, Any]:
    """Random codes [E, N, K / 8], eight a word, and scales [E, N, K / group_size]; the same for the same numbers.

    NVFP4 has a scale for each expert besides.
    """
    n, k, gain = _matrix_sizes(shape)[matrix]
    generator = torch.Generator("cuda").manual_seed(2 * layer + matrix)
    codes = torch.empty((shape.num_experts, n, k // 8), dtype=torch.int32, device="cuda")
    codes.random_(-(2**31), 2**31 - 1, generator=generator)
    scales = torch.empty((shape.num_experts, n, quotient(k, shape.group_size)), dtype=torch.float32, device="cuda")
    scales.uniform_(0.5, 1.5, generator=generator)
    gain /= FORMATS[weight_format].deviation * k**0.5
    if weight_format == "nvfp4":
        gains = torch.full((shape.num_experts,), gain, dtype=torch.float32, device="cuda")
        return {"weight": codes, "weight_scale": scales.to(torch.float8_e4m3fn), "weight_scale_2": gains}
    scales.mul_(gain)
    if weight_format == "mxfp4":
        exponents = scales.log2_().round_().add_(127).to(torch.uint8)
        return {"weight": codes, "weight_scale": exponents.view(torch.float8_e8m0fnu)}
    return {"weight": codes, "weight_scale": scales.to(dtype)}


def prepare_matrix(
    shape: ModelShape, weight_format: str, layer: int, matrix: int, dtype, activation_dtype: str | None
) -> tuple[Any, dict[str, Any]]:
    """The library's configuration of one matrix and its tensors in the library's order."""
    from humming.schema import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config, transform_humming_tensors

    n, k, _ = _matrix_sizes(shape)[matrix]
    schema = HummingWeightSchema.from_config({**FORMATS[weight_format].schema, "group_size": shape.group_size})
    config = prepare_layer_config(
        shape_n=n,
        shape_k=k,
        weight_schema=schema,
        input_schema=None if activation_dtype is None else HummingInputSchema(a_dtype=_ROW_TYPES[activation_dtype]),
        num_experts=shape.num_experts,
        pad_n_to_multiple=_PAD_N,
        pad_k_to_multiple=_PAD_K,
        torch_dtype=dtype,
    )
    tensors = _random_tensors(shape, weight_format, layer, matrix, dtype)
    # Zeros up to the padded sizes. (The library's own padding counts the groups of K downwards, and takes no matrix
    # whose last group is a part.)
    widths = {"weight": config.shape_k // 8, "weight_scale": config.shape_k // shape.group_size}
    for name, width in widths.items():
        tensor = tensors[name]
        padding = (0, width - tensor.shape[2], 0, config.shape_n - tensor.shape[1])
        # Scales of a byte are padded as bytes: 0 is the least of them, which a weight of zero does not mind.
        stored = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        tensors[name] = torch.nn.functional.pad(stored, padding).view(tensor.dtype)
    return config, transform_humming_tensors(config, tensors, already_padded=True)


def _dequantize(weight_format: str, tensors: dict[str, Any], expert: int, group_size: int):
    """One expert's matrix [N, K] in float32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device="cuda")
    codes = ((tensors["weight"][expert][..., None] >> shifts) & 15).flatten(-2)
    scales = tensors["weight_scale"][expert].float().repeat_interleave(group_size, -1)
    if "weight_scale_2" in tensors:
        scales *= tensors["weight_scale_2"][expert]
    values = torch.tensor(FORMATS[weight_format].values, dtype=torch.float32, device="cuda")
    return values[codes] * scales[:, : codes.shape[1]]


def reference(shape: ModelShape, weight_format: str, x, ids, weights, dtype):
    """The block on the first layer, in float32."""
    gate_up, down = (_random_tensors(shape, weight_format, 0, matrix, dtype) for matrix in (0, 1))
    out = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ _dequantize(weight_format, gate_up, expert, shape.group_size).T).chunk(2, dim=-1)
        rows = torch.nn.functional.silu(gate) * up
        rows = rows @ _dequantize(weight_format, down, expert, shape.group_size).T
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out
