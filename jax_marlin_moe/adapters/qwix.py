"""`MarlinProvider`: qwix's quantisation of a Flax NNX model after training, with experts in the packed form.

qwix's own providers quantise dot_general, einsum and convolutions and let `jax.lax.ragged_dot` pass. This one packs the
experts of each ragged_dot when the model is quantised, and multiplies with them from then on:

    model = qwix.quantize_model(model, MarlinProvider(rules), x)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import qwix
from flax import nnx
from jaxtyping import Array
from qwix._src.utils import flax_util

from jax_marlin_moe.flax.nnx import QuantizedParam
from jax_marlin_moe.ops.ragged_dot import ragged_dot
from jax_marlin_moe.quantize import quantize
from jax_marlin_moe.weights import MarlinWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Packed experts in the place of a model's array: what it does to the array before ragged_dot changes nothing."""

    weights: MarlinWeights

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        return self.weights.num_experts, self.weights.k, self.weights.n

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    @property
    def dtype(self) -> Any:
        """Of the scales, or of their bits."""
        return self.weights.scales.dtype

    def astype(self, dtype: Any) -> "PackedExperts":
        """Itself: rows have a dtype, codes have none to change."""
        return self

    def __getitem__(self, key: Any) -> "PackedExperts":
        """Itself, for `[...]`.

        Raises:
            TypeError: another key.
        """
        if key is not Ellipsis:
            raise TypeError(f"packed experts are indexed with {key!r}; it must be ...: take experts of `weights`")
        return self


class MarlinProvider(qwix.PtqProvider):
    """qwix's PtqProvider, and experts of `jax.lax.ragged_dot` in a format of this package.

    Args:
        rules: as for qwix; experts are packed in modules whose rule has a `weight_qtype`, which is that of the other
            products.
        weight_format: of the experts, a name of `jax_marlin_moe.FORMATS`.
        group_size: as for `jax_marlin_moe.quantize`.
        **options: of PtqProvider.
    """

    def __init__(
        self,
        rules: Sequence[qwix.QuantizationRule],
        *,
        weight_format: str = "int4",
        group_size: Any = "customary",
        **options: Any,
    ) -> None:
        super().__init__(rules, **options)
        self.weight_format, self.group_size = weight_format, group_size

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Those of qwix, and `jax.lax.ragged_dot`."""
        return {**super().get_intercept_map(), "jax.lax.ragged_dot": self.ragged_dot}

    def ragged_dot(self, lhs: Array, rhs: Any, group_sizes: Array, *arguments: Any, **options: Any) -> Array:
        """In the place of `jax.lax.ragged_dot`, with its arguments; packs experts when the model is quantised."""
        if isinstance(rhs, PackedExperts):
            return ragged_dot(lhs, rhs.weights, group_sizes, *arguments, **options)
        rule, _ = self._get_current_rule_and_op_id("ragged_dot")
        name = None if rule is None or rule.weight_qtype is None else flax_util.find_param(rhs)
        module = None if name is None else flax_util.get_current_module()
        if name is None or not isinstance(module, nnx.Module):
            return jax.lax.ragged_dot(lhs, rhs, group_sizes, *arguments, **options)
        packed = PackedExperts(quantize(rhs, self.weight_format, group_size=self.group_size))
        setattr(module, name, QuantizedParam(packed))
        return ragged_dot(lhs, packed.weights, group_sizes, *arguments, **options)
