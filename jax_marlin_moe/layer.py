"""`MoELayer`: the experts of one layer, its router and its shared expert, as one pytree that can be called."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.arguments import check_shape
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.expert_placement import first_slots
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.ops.moe_layer import moe_layer
from jax_marlin_moe.reference_layer import scaled_rows
from jax_marlin_moe.routing import Routing, rms_normalized, route_rows
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights, refuse_hash, summary


@dataclasses.dataclass(frozen=True, repr=False)
class MoELayer:
    """The experts of one layer and how tokens are routed to them. A pytree: arrays are leaves, the rest is static.

    Attributes:
        gate_up: E matrices (H, 2 I), columns [gate | up]; (H, I) where the activation is not gated.
        down: E matrices (I, H).
        router: kernel of the router, input dimension first, in the checkpoint's dtype: `logits = x @ router`. Where
            the routing has `identity_experts`, its E counts them too, and so do the vectors by expert.
        routing: the model's rule, for `jax_marlin_moe.route`.
        activation: for `jax_marlin_moe.fused_moe`.
        router_bias: [E], added to the logits, or None.
        correction_bias: [E], added to the scores for the choice alone, or None.
        expert_scale: [E], factors of the router weights by expert, or None.
        router_input_scale: [H], or None; where it is there, the router sees `rms_norm(x) * scale / sqrt(H)`.
        token_experts: [vocabulary, top_k] int32, the experts of each token id in layers that route by a hash, or None.
        shared: the expert that every token visits, or None.
        output_norm: [H], or None; where it is there, the layer returns `rms_norm(y) * output_norm` (A.X K1).
        norm_epsilon: of both norms.
        shared_activation: of the shared expert where it is another one, or None.
        placement: [slots] int32, the expert in each slot of the packed experts, where they have an order of their own
            or hot ones are there more than once (`jax_marlin_moe.sharding.place_experts`), or None.
        x_scale: [], the scale that calibration has fixed for x in "float8_e4m3fn", or None. It counts where the layer
            is called with that `activation_dtype`.
        intermediate_scales: [E], likewise of the rows between the two products, by expert, or None.
        expert_input_scale: [H], or None; where it is there, the routed experts read `x * expert_input_scale` (AWQ of
            ModelOpt): `expert_input`.
    """

    gate_up: MarlinWeights
    down: MarlinWeights
    router: Float[Array, "H E"]
    routing: Routing
    activation: str | Activation = "silu"
    router_bias: Float[Array, " E"] | None = None
    correction_bias: Float[Array, " E"] | None = None
    expert_scale: Float[Array, " E"] | None = None
    router_input_scale: Float[Array, " H"] | None = None
    token_experts: Int32[Array, "vocabulary top_k"] | None = None
    shared: SharedExpert | None = None
    output_norm: Float[Array, " H"] | None = None
    norm_epsilon: float = 1e-6
    shared_activation: str | Activation | None = None
    placement: Int32[Array, " slots"] | None = None
    x_scale: Float32[Array, ""] | None = None
    intermediate_scales: Float32[Array, " E"] | None = None
    expert_input_scale: Float[Array, " H"] | None = None

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes, and how tokens are routed."""
        return summary(self)

    def __hash__(self) -> int:
        """Refused: of a layer that is no argument, a compiled function would make constants."""
        refuse_hash(self)

    def route(
        self, x: Float[Array, "tokens H"], token_ids: Int32[Array, " tokens"] | None = None
    ) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
        """Router weights and expert ids of each row of x, in float32 from the logits on.

        Args:
            x: the input of the layer.
            token_ids: for layers with `token_experts`, the token of each row.

        Raises:
            ValueError: the layer routes by token and there are no `token_ids`.
        """
        return route_rows(
            x,
            self.router,
            self.routing,
            router_bias=self.router_bias,
            correction_bias=self.correction_bias,
            expert_scale=self.expert_scale,
            input_scale=self.router_input_scale,
            norm_epsilon=self.norm_epsilon,
            ids=self._given(token_ids),
        )

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        token_ids: Int32[Array, "*batch"] | None = None,
        *,
        router_input: Float[Array, "*batch H"] | None = None,
        activation_dtype: ByteDtype | DTypeLike | None = None,
        implementation: str | None = None,
        batch_invariant: bool = False,
    ) -> Float[Array, "*batch H"]:
        """The whole layer: routed experts plus the shared one.

        Args:
            x: float16 or bfloat16; float32 rows as in `jax_marlin_moe.moe_layer`.
            token_ids: as for `route`.
            router_input: rows that the router reads, where they are not those of the experts (Gemma-4 norms them
                apart).
            activation_dtype: as for `jax_marlin_moe.moe_layer`; "float8_e4m3fn" with the layer's own scales where it
                has them, "int8" with scales of each row.
            implementation: as for `jax_marlin_moe.fused_moe`.
            batch_invariant: as for `jax_marlin_moe.moe_layer`.
        """
        check_rows(self, x, token_ids, router_input)
        rows = x.reshape(-1, x.shape[-1])
        placement = None if self.placement is None else jnp.asarray(self.placement)
        x_scale, intermediate = self.fixed_scales(activation_dtype)
        y = moe_layer(
            rows,
            self.router,
            self.gate_up,
            self.down,
            routing=self.routing,
            activation=self.activation,
            shared=self.shared,
            shared_activation=self.shared_activation,
            router_bias=self.router_bias,
            correction_bias=self.correction_bias,
            expert_scale=self.expert_scale,
            router_input=None if router_input is None else router_input.reshape(rows.shape),
            router_input_scale=self.router_input_scale,
            expert_input_scale=self.expert_input_scale,
            norm_epsilon=self.norm_epsilon,
            topk_ids=self._given(None if token_ids is None else token_ids.reshape(-1)),
            expert_map=None if placement is None else first_slots(placement, self.num_experts),
            activation_dtype=activation_dtype,
            x_scale=x_scale,
            intermediate=intermediate,
            implementation=implementation,
            batch_invariant=batch_invariant,
        )
        return self.normalized(y).reshape(x.shape)

    @property
    def num_experts(self) -> int:
        """Experts that ids may name and that have weights: those of the router without identity experts."""
        return self.router.shape[1] - self.routing.identity_experts

    def expert_input(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Rows as the routed experts read them: times `expert_input_scale`, rounded to the type of x.

        For calls of `fused_moe` or `ragged_dot` with the layer's matrices; `__call__` takes x as it is.
        """
        return scaled_rows(x, self.expert_input_scale)

    def normalized(self, y: Float[Array, "tokens H"]) -> Float[Array, "tokens H"]:
        """Results of the experts as the layer returns them: under its `output_norm`, where there is one."""
        if self.output_norm is None:
            return y
        scale = self.output_norm.astype(jnp.float32)[None]
        return (rms_normalized(y.astype(jnp.float32), self.norm_epsilon) * scale).astype(y.dtype)

    def fixed_scales(
        self, activation_dtype: ByteDtype | DTypeLike | None
    ) -> tuple[Float32[Array, ""] | None, IntermediateQuantizer | None]:
        """`x_scale` and `intermediate` of `jax_marlin_moe.fused_moe`, by slot, where calibration has fixed them.

        Both are None for any type of rows but "float8_e4m3fn".
        """
        if as_byte_dtype(activation_dtype) != "float8_e4m3fn":
            return None, None
        if self.intermediate_scales is None:
            return self.x_scale, None
        scales = jnp.asarray(self.intermediate_scales)
        if self.placement is not None:
            scales = scales[jnp.asarray(self.placement)]
        return self.x_scale, IntermediateQuantizer(scales, "static_fp8")

    def _given(self, token_ids: Int32[Array, " tokens"] | None) -> Int32[Array, "tokens top_k"] | None:
        """The experts of each row, where they follow from its token."""
        if self.token_experts is None:
            return None
        if token_ids is None:
            raise ValueError("token_ids is None; this layer chooses experts by token, so it must be given")
        return self.token_experts[token_ids]


def check_rows(layer: MoELayer, x: object, token_ids: object | None, router_input: object | None) -> None:
    """Raises TypeError or ValueError, naming the argument, unless rows have the shapes that a layer takes."""
    if not hasattr(layer.router, "shape"):
        raise TypeError(f"router has type {type(layer.router).__name__}; it must be an array (H, experts)")
    hidden = layer.router.shape[0]
    if not hasattr(x, "shape") or not x.shape:
        raise TypeError(f"x has type {type(x).__name__}; it must be an array whose last dimension is H = {hidden}")
    if x.shape[-1] != hidden:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be H = {hidden}")
    for name, rows, shape, meaning in (
        ("token_ids", token_ids, x.shape[:-1], "that of x without the last dimension"),
        ("router_input", router_input, x.shape, "that of x"),
    ):
        if rows is not None:
            check_shape(name, rows, shape, meaning)  # type: ignore[arg-type]


def check_layer(source: object, layer: MoELayer) -> None:
    """Raises ValueError, naming `source`, unless the parts of a layer and its routing rule fit each other."""
    ids = None if layer.token_experts is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        if not jnp.issubdtype(layer.router.dtype, jnp.floating):
            raise TypeError(f"router has dtype {layer.router.dtype}; it must be floating point")
        x = jax.ShapeDtypeStruct((1, layer.router.shape[0]), jnp.bfloat16)
        y = jax.eval_shape(lambda parts, *rows: parts(*rows, implementation="xla"), layer, x, ids)
    except (AttributeError, IndexError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: the layer does not fit together: {error}") from None
    if y.shape != x.shape:
        raise ValueError(f"{source}: the layer does not fit together: it makes {y.shape} of rows {x.shape}")


# The fields of `MoELayer` that are static; all others are arrays, or pytrees of arrays.
STATIC = ("routing", "activation", "norm_epsilon", "shared_activation")
jax.tree_util.register_dataclass(
    MoELayer,
    data_fields=[field.name for field in dataclasses.fields(MoELayer) if field.name not in STATIC],
    meta_fields=list(STATIC),
)
