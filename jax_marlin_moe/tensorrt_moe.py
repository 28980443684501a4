"""`TensorRTMoE`: the contract of TensorRT's IMoELayer (docs/formats.md, "TensorRT's IMoELayer").

Its definition is that of https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/MoE.html, whose names
the arguments have.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.arguments import check_rank, check_shape, check_weights
from jax_marlin_moe.intermediate import IntermediateQuantizer, check_positive, in_units, usable
from jax_marlin_moe.ops.block_arguments import check_intermediate
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.weights import MarlinWeights, concatenate_columns, refuse_hash, summary


@dataclasses.dataclass(frozen=True, repr=False)
class TensorRTMoE:
    """The experts of an IMoELayer. A pytree: arrays are leaves, the activation is static. Made by `from_weights`.

    Attributes:
        gate_up: E matrices (H, 2 I), columns [fcGate | fcUp].
        down: E matrices (I, H).
        intermediate: how the product of the activation and fcUp is quantised, or None.
        hidden_scale: of hidden states in FP8, or None.
        activation: between the products.
    """

    gate_up: MarlinWeights
    down: MarlinWeights
    intermediate: IntermediateQuantizer | None
    hidden_scale: Float32[Array, ""] | None
    activation: Activation

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes."""
        return summary(self)

    def __hash__(self) -> int:
        """Refused, since arrays have no hash."""
        refuse_hash(self)

    @classmethod
    def from_weights(
        cls,
        fc_gate: MarlinWeights,
        fc_up: MarlinWeights,
        fc_down: MarlinWeights,
        *,
        activation: str | Activation = "silu",
        intermediate: IntermediateQuantizer | None = None,
        hidden_scale: ArrayLike | None = None,
    ) -> "TensorRTMoE":
        """The layer of three stacks of matrices, input dimension first; biases are theirs.

        TensorRT has NVFP4 weights (`from_tensorrt_nvfp4`); here they may have any format.

        Args:
            fc_gate: (H, I), E experts.
            fc_up: (H, I).
            fc_down: (I, H).
            activation: "silu", "none" (kNONE: `gate * up`), or `jax_marlin_moe.swiglu(limit, alpha, beta)`, which
                setSwigluParams makes of SiLU; any gated one.
            intermediate: `IntermediateQuantizer.static_fp8(scale)` for setQuantizationStatic, `.dynamic_nvfp4(scale)`
                for setQuantizationDynamicDblQ, with one scale or one per expert.
            hidden_scale: hidden states are quantised to FP8 with it, or are FP8 already.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: shapes disagree, the activation is not gated, or a scale is not positive and finite.
        """
        for name, weights in (("fc_gate", fc_gate), ("fc_up", fc_up), ("fc_down", fc_down)):
            check_weights(name, weights)
        experts, hidden, inner = fc_gate.num_experts, fc_gate.k, fc_gate.n
        for name, weights, shape in (("fc_up", fc_up, (hidden, inner)), ("fc_down", fc_down, (inner, hidden))):
            found = weights.num_experts, weights.k, weights.n
            if found != (experts, *shape):
                raise ValueError(
                    f"{name} is {found[0]} matrices {found[1:]}; with fc_gate, {experts} matrices {(hidden, inner)}, "
                    f"it must be {experts} matrices {shape}"
                )
        if intermediate is not None:
            check_intermediate(intermediate, experts)
        act = get_activation(activation)
        if not act.gated:
            raise ValueError(f"activation is {act.name!r}, which is not gated; the layer has fc_gate and fc_up")
        if hidden_scale is not None:
            try:
                hidden_scale = jnp.asarray(hidden_scale, jnp.float32)
            except (TypeError, ValueError):
                raise TypeError(f"hidden_scale is {hidden_scale!r}; it must be a number") from None
            check_shape("hidden_scale", hidden_scale, (), "()")
            check_positive("hidden_scale", hidden_scale)
        layer = cls(concatenate_columns([fc_gate, fc_up]), fc_down, intermediate, hidden_scale, act)
        rows = jax.ShapeDtypeStruct((1, hidden), jnp.bfloat16 if hidden_scale is None else jnp.float32)
        slots = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        jax.eval_shape(lambda parts, *tokens: parts(*tokens, tokens[1].astype(jnp.float32)), layer, rows, slots)
        return layer

    def __call__(
        self,
        hidden_states: Float[Array, "*batch H"],
        selected_experts: Int[Array, "*batch top_k"],
        scores: Float[Array, "*batch top_k"],
        *,
        implementation: str | None = None,
    ) -> Float[Array, "*batch H"]:
        """The sum over each token's experts, weighted by the scores, in the type of the hidden states.

        Args:
            hidden_states: float32, bfloat16 or float16, quantised here, or float8_e4m3fn with a result in float32;
                without a `hidden_scale` bfloat16 or float16. [batch, seq, H] in TensorRT.
            selected_experts: integers. Those outside [0, E) contribute nothing.
            scores: of any floating-point type; taken as float32.
            implementation: as for `jax_marlin_moe.fused_moe`.

        Raises:
            TypeError: an argument has the wrong dtype.
            ValueError: shapes disagree, or the implementation cannot run.
        """
        x, scale = self._rows(hidden_states)
        batch = hidden_states.shape[:-1]
        check_rank("selected_experts", selected_experts, hidden_states.ndim)
        check_rank("scores", scores, hidden_states.ndim)
        if not jnp.issubdtype(selected_experts.dtype, jnp.integer):
            raise TypeError(f"selected_experts has dtype {selected_experts.dtype}; it must be integers")
        if not jnp.issubdtype(scores.dtype, jnp.floating):
            raise TypeError(f"scores has dtype {scores.dtype}; it must be floating point")
        top_k = selected_experts.shape[-1]
        check_shape("selected_experts", selected_experts, (*batch, top_k), "(*batch, top_k)")
        check_shape("scores", scores, (*batch, top_k), "(*batch, top_k)")
        ids = jnp.where(selected_experts < self.down.num_experts, selected_experts, -1).astype(jnp.int32)
        is_fp8 = hidden_states.dtype == jnp.float8_e4m3fn
        result = jnp.dtype(jnp.float32 if is_fp8 else hidden_states.dtype)
        y = fused_moe(
            x,
            self.gate_up,
            self.down,
            scores.reshape(x.shape[0], top_k).astype(jnp.float32),
            ids.reshape(x.shape[0], top_k),
            activation=self.activation,
            x_scale=scale,
            intermediate=self.intermediate,
            preferred_element_type=jnp.float32 if scale is not None else result,
            implementation=implementation,
        )
        return y.astype(result).reshape(*batch, y.shape[-1])

    def _rows(self, hidden_states: Array) -> tuple[Array, Array | None]:
        """Rows of x, and what they are in units of."""
        dtype = getattr(hidden_states, "dtype", None)
        known = (jnp.bfloat16, jnp.float16, *(() if self.hidden_scale is None else (jnp.float32, jnp.float8_e4m3fn)))
        if dtype not in known:
            names = ", ".join(jnp.dtype(k).name for k in known)
            raise TypeError(
                f"hidden_states has dtype {dtype or type(hidden_states).__name__}; it must be one of {names}"
                + (": float32 and float8_e4m3fn need a hidden_scale" if self.hidden_scale is None else "")
            )
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.hidden_scale is None:
            return rows, None
        scale = jnp.asarray(self.hidden_scale)  # of a stack of layers it may be a slice
        if dtype != jnp.float8_e4m3fn:
            rows = in_units(rows.astype(jnp.float32), usable(scale)).astype(jnp.float8_e4m3fn)
        return rows, scale


jax.tree_util.register_dataclass(
    TensorRTMoE,
    data_fields=["gate_up", "down", "intermediate", "hidden_scale"],
    meta_fields=["activation"],
)
