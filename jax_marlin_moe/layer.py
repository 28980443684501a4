"""`MoELayer`: the experts of one layer, its router and its shared expert, as one pytree that can be called."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.routing import Routing, route
from jax_marlin_moe.weights import MarlinWeights, summary


@dataclasses.dataclass(frozen=True, repr=False)
class SharedExpert:
    """An expert that every token visits. A pytree.

    Attributes:
        gate_up: (H, 2 I'), columns [gate | up], (H, I') where the activation is not gated: a stack of one packed
            expert where the file is quantised, else a dense array in the file's dtype.
        down: (I', H), likewise.
        gate: [H, 1]; its sigmoid multiplies the result (Qwen), or None.
    """

    gate_up: MarlinWeights | Float[Array, "H N"]
    down: MarlinWeights | Float[Array, "I H"]
    gate: Float[Array, "H 1"] | None = None

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes."""
        return summary(self)


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
    """

    gate_up: MarlinWeights
    down: MarlinWeights
    router: Float[Array, "H E"]
    routing: Routing
    activation: str | Activation = "silu"
    router_bias: Float[Array, "E"] | None = None
    correction_bias: Float[Array, "E"] | None = None
    expert_scale: Float[Array, "E"] | None = None
    router_input_scale: Float[Array, "H"] | None = None
    token_experts: Int32[Array, "vocabulary top_k"] | None = None
    shared: SharedExpert | None = None
    output_norm: Float[Array, "H"] | None = None
    norm_epsilon: float = 1e-6
    shared_activation: str | Activation | None = None

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes, and how tokens are routed."""
        return summary(self)

    def route(
        self, x: Float[Array, "tokens H"], token_ids: Int32[Array, "tokens"] | None = None
    ) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
        """Router weights and expert ids of each row of x, in float32 from the logits on.

        Args:
            x: the input of the layer.
            token_ids: for layers with `token_experts`, the token of each row.

        Raises:
            ValueError: the layer routes by token and there are no `token_ids`.
        """
        rows = x.astype(jnp.float32)
        if self.router_input_scale is not None:
            rows = self._normalized(rows)
            rows = rows * self.router_input_scale.astype(jnp.float32)[None] * rows.shape[-1] ** -0.5
        logits = jnp.matmul(rows, self.router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        if self.router_bias is not None:
            logits = logits + self.router_bias.astype(jnp.float32)[None]
        ids = None
        if self.token_experts is not None:
            if token_ids is None:
                raise ValueError("token_ids is None; this layer chooses experts by token, so it must be given")
            ids = self.token_experts[token_ids]
        return route(
            logits,
            correction_bias=self.correction_bias,
            expert_scale=self.expert_scale,
            ids=ids,
            **self.routing.options(),  # type: ignore[arg-type]
        )

    def __call__(
        self,
        x: Float[Array, "*batch H"],
        token_ids: Int32[Array, "*batch"] | None = None,
        *,
        router_input: Float[Array, "*batch H"] | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "*batch H"]:
        """The whole layer: routed experts plus the shared one.

        Args:
            x: float16 or bfloat16.
            token_ids: as for `route`.
            router_input: rows that the router reads, where they are not those of the experts (Gemma-4 norms them
                apart).
            implementation: as for `jax_marlin_moe.fused_moe`.
        """
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(
            rows if router_input is None else router_input.reshape(rows.shape),
            None if token_ids is None else token_ids.reshape(-1),
        )
        y = self._experts(rows, weights, ids, implementation)
        if self.output_norm is not None:
            scale = self.output_norm.astype(jnp.float32)[None]
            y = (self._normalized(y.astype(jnp.float32)) * scale).astype(x.dtype)
        return y.reshape(x.shape)

    def _normalized(self, rows: Array) -> Array:
        """Rows in float32, each divided by the root of its mean square."""
        mean = jnp.mean(jnp.square(rows), axis=-1, keepdims=True)
        return rows * jax.lax.rsqrt(mean + self.norm_epsilon)

    def _experts(self, x: Array, weights: Array, ids: Array, implementation: str | None) -> Array:
        """Routed and shared experts of rows whose experts are chosen."""
        shared_activation = self.activation if self.shared_activation is None else self.shared_activation

        def experts(
            rows: Array,
            gate_up: MarlinWeights,
            down: MarlinWeights,
            w: Array,
            chosen: Array,
            activation: str | Activation = self.activation,
        ) -> Array:
            return fused_moe(rows, gate_up, down, w, chosen, activation=activation, implementation=implementation)

        if self.routing.apply_on_input:
            slots = (x[:, None].astype(jnp.float32) * weights[..., None]).astype(x.dtype)  # [tokens, top_k, H]
            flat = slots.reshape(-1, x.shape[1])
            ones = jnp.ones((flat.shape[0], 1), jnp.float32)
            y = experts(flat, self.gate_up, self.down, ones, ids.reshape(-1, 1))
            y = y.reshape(slots.shape).astype(jnp.float32).sum(1).astype(x.dtype)
        else:
            y = experts(x, self.gate_up, self.down, weights, ids)
        if self.routing.identity_experts:
            first = self.router.shape[-1] - self.routing.identity_experts
            kept = jnp.where(ids >= first, weights, 0).sum(-1, keepdims=True)
            y = (y.astype(jnp.float32) + x.astype(jnp.float32) * kept).astype(x.dtype)
        if self.shared is None:
            return y
        gate_up, down = self.shared.gate_up, self.shared.down
        if isinstance(gate_up, MarlinWeights) and isinstance(down, MarlinWeights):
            only = jnp.zeros((x.shape[0], 1), jnp.int32)
            extra = experts(x, gate_up, down, jnp.ones((x.shape[0], 1), jnp.float32), only, shared_activation)
        else:
            extra = self._dense_shared(x, shared_activation)
        if self.shared.gate is not None:
            logits = jnp.matmul(x, self.shared.gate.astype(x.dtype), preferred_element_type=jnp.float32)
            extra = (extra.astype(jnp.float32) * jax.nn.sigmoid(logits)).astype(x.dtype)
        return y + extra

    def _dense_shared(self, x: Array, activation: str | Activation) -> Array:
        assert self.shared is not None
        act = get_activation(activation)
        h = jnp.matmul(x, self.shared.gate_up.astype(x.dtype), preferred_element_type=jnp.float32)  # type: ignore[union-attr]
        a = act.apply(*jnp.split(h, 2, axis=1)) if act.gated else act.apply(h, None)
        down = self.shared.down.astype(x.dtype)  # type: ignore[union-attr]
        return jnp.matmul(a.astype(x.dtype), down, preferred_element_type=jnp.float32).astype(x.dtype)


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


jax.tree_util.register_dataclass(SharedExpert, data_fields=["gate_up", "down", "gate"], meta_fields=[])
# The fields of `MoELayer` that are static; all others are arrays, or pytrees of arrays.
STATIC = ("routing", "activation", "norm_epsilon", "shared_activation")
jax.tree_util.register_dataclass(
    MoELayer,
    data_fields=[field.name for field in dataclasses.fields(MoELayer) if field.name not in STATIC],
    meta_fields=list(STATIC),
)
