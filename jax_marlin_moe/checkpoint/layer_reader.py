"""Reads one layer of a checkpoint as its tool wrote it."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.checkpoint.expert_linears import expert_linears
from jax_marlin_moe.checkpoint.input_scales import input_scale_name, read_input_scales
from jax_marlin_moe.checkpoint.layer_tensors import LayerTensors
from jax_marlin_moe.checkpoint.matrix import Experts, find_matrix, load_matrix
from jax_marlin_moe.checkpoint.pre_quant_scales import scales_of_up, shared_input_scale
from jax_marlin_moe.checkpoint.schemes import BROKEN
from jax_marlin_moe.checkpoint.schemes.plain import Target
from jax_marlin_moe.checkpoint.schemes.w4afp8 import W4AFp8Storage
from jax_marlin_moe.checkpoint.sharded import Share, add_bias, cut_of, load_block, put_rest
from jax_marlin_moe.checkpoint.shared_tensors import in_one_launch, read_shared
from jax_marlin_moe.checkpoint.stated import stated_activation_dtype
from jax_marlin_moe.checkpoint.tensors import ShapeError
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.layer import MoELayer, check_layer
from jax_marlin_moe.progress import progress_bar
from jax_marlin_moe.sharding.moe_sharding import MoESharding
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class LayerReader:
    """Loads one layer of a checkpoint, and refuses what it does not know.

    Attributes:
        tensors: those of the layer.
        target: what plain experts become, None where they are refused.
        sharding: over whose devices the layer is, None for JAX's default one.
    """

    tensors: LayerTensors
    target: Target | None
    sharding: MoESharding | None = None

    def load(self) -> MoELayer:
        """The layer; errors as for `load_moe_layer`."""
        try:
            return self._load()
        except ShapeError as error:
            facts, wide = self.tensors.facts, self.tensors.facts.shared_size
            shared = "" if wide is None else f", intermediate size {wide} of the shared expert"
            raise ValueError(
                f"{error}; {self.tensors.source} says hidden size {facts.hidden}, intermediate size "
                f"{facts.size}{shared} and {facts.experts} experts"
            ) from None

    def activation_dtype(self) -> ByteDtype | None:
        """What the config says that the rows of the routed experts are quantised to, if it says so of all of them."""
        first, second = expert_linears(self.tensors)
        linears = list(itertools.chain(*first, *second))
        if all(W4AFp8Storage.holds(self.tensors.files, linear) for linear in linears):
            return W4AFp8Storage.activation_dtype
        quantization = self.tensors.quantization
        stated = {stated_activation_dtype(quantization, module) for module in {each.module for each in linears}}
        return stated.pop() if len(stated) == 1 else None

    def _load(self) -> MoELayer:
        tensors, files = self.tensors, self.tensors.files
        family, facts = tensors.family, tensors.facts
        hidden, size, experts = facts.hidden, facts.size, facts.experts
        for suffix, fault in BROKEN.items():
            if (name := f"{tensors.name(family.experts)}{suffix}") in files:
                raise files.fault(name, fault)
        first, second = expert_linears(tensors)
        x_scale, intermediate_scales = self._input_scales(first, second)
        expert_input_scale = shared_input_scale(files, first, hidden)
        matrices: tuple[Any, Any]
        if self.sharding is None:
            options: dict[str, Any] = {"biased": family.biased, "scaled_input": True, "activation": facts.activation}
            matrices = shapes = tensors.matrices(first, second, hidden, size, self.target, **options)
        else:
            matrices, shapes = self._sharded(self.sharding, first, second)
        routed = experts + facts.routing.identity_experts
        router = tensors.kernel(family.router, routed, hidden)
        assert router is not None, "every family has a router"
        token_experts = tensors.token_experts(facts.routing.top_k, experts)
        layer = MoELayer(
            gate_up=matrices[0],
            down=matrices[1],
            router=router,
            routing=facts.routing,
            activation=facts.activation,
            router_bias=tensors.vector(family.router_bias, (routed,)),
            correction_bias=None if token_experts is not None else tensors.correction_bias(routed),
            expert_scale=tensors.vector(family.expert_scale, (routed,)),
            router_input_scale=tensors.vector(family.input_scale, (hidden,)),
            token_experts=token_experts,
            shared=(shared := read_shared(tensors)),
            output_norm=tensors.vector(family.output_norm, (hidden,)),
            norm_epsilon=facts.norm_epsilon,
            shared_activation=None if shared is None else facts.shared_activation,
            x_scale=x_scale,
            intermediate_scales=intermediate_scales,
            expert_input_scale=expert_input_scale,
        )
        output_bias = tensors.vector(family.output_bias, (hidden,))
        if output_bias is not None:
            # The weights sum to 1, so that each expert may have it.
            bias = jnp.tile(output_bias.astype(jnp.float32), (experts, 1))
            if self.sharding is None:
                layer = dataclasses.replace(layer, down=dataclasses.replace(layer.down, bias=bias))
            else:
                layer = dataclasses.replace(layer, down=add_bias(layer.down, bias, self.sharding))
        tensors.refuse_unknown()
        files.drop_pages()
        if self.sharding is not None:
            check_layer(tensors.source, dataclasses.replace(layer, gate_up=shapes[0], down=shapes[1]))
            return put_rest(layer, self.sharding)
        if layer.shared is not None:
            layer = dataclasses.replace(layer, shared=in_one_launch(tensors, layer, layer.shared))
        check_layer(tensors.source, layer)
        return layer

    def _input_scales(self, first: Experts, second: Experts) -> tuple[Array | None, Array | None]:
        """The scales of e4m3 rows that the files fix: of x, and of the rows between the products by expert."""
        tensors, files = self.tensors, self.tensors.files
        hidden, size = tensors.facts.hidden, tensors.facts.size
        if not any(input_scale_name(files, linear) in files for linear in itertools.chain(*first, *second)):
            return None, None
        gate_up, down = (
            find_matrix(files, experts, k, n, tensors.quantization, self.target)
            for experts, k, n in ((first, hidden, size), (second, size, hidden))
        )
        return read_input_scales(files, gate_up, down, tensors.quantization)

    def _sharded(self, sharding: MoESharding, first: Experts, second: Experts) -> tuple[Any, Any]:
        """The routed experts over devices; each process reads the tensors of its experts, or its part of them.

        Returns:
            Both matrices, and the shapes of both for one rank's part of the intermediate dimension.
        """
        files, facts, quantization = self.tensors.files, self.tensors.facts, self.tensors.quantization
        hidden, size, biased = facts.hidden, facts.size, self.tensors.family.biased
        stored = find_matrix(files, first, hidden, size, quantization, self.target)
        down_stored = find_matrix(files, second, size, hidden, quantization, self.target)
        of_up = scales_of_up(files, second, size, stored.storage.weight_format, facts.activation)
        read: set[str] = set()

        def load(share: Share) -> tuple[MarlinWeights, MarlinWeights]:
            read.update(linear.module for rows in (first, second) for linear in rows[share.experts[0]])
            gate_up = load_matrix(
                files,
                stored,
                biased=biased,
                column_orders=down_stored.column_orders,
                column_scales=of_up,
                scaled_input=True,
                advance=bar.update,
                members=share.experts,
                cut=cut_of(share, hidden, down=False),
            )
            down = load_matrix(
                files,
                down_stored,
                biased=biased,
                scaled_input=True,
                advance=bar.update,
                members=share.experts,
                cut=cut_of(share, hidden, down=True),
            )
            return gate_up, dataclasses.replace(down, input_order=None)

        with progress_bar(f"layer {self.tensors.layer}", len(first) + len(second)) as bar:
            loaded = load_block(
                load,
                sharding,
                experts=len(first),
                size=size,
                row=get_format(down_stored.storage.weight_format),
                group_size=down_stored.storage.rows_per_group(size),
                activation=facts.activation,
            )
        # What was read of one expert is known of those that other processes read.
        suffixes = {
            name.removeprefix(module)
            for name in files.seen
            for module in read
            if name.startswith((f"{module}.", f"{module}_")) or name == module
        }
        for linear in itertools.chain(*first, *second):
            for suffix in suffixes:
                if linear.name(suffix) in files:
                    files.ignore(linear.name(suffix))
        return loaded
