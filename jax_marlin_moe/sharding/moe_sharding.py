"""`MoESharding`: which axes of a mesh cut the experts, and which the intermediate dimension."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.layer_slice import is_slice
from jax_marlin_moe.sharding.specs import Axes, as_axes, check_experts, is_spec, matrix_specs, spec
from jax_marlin_moe.sharding.tensor_parallel import check_block, shares_of, tensor_parallel
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.stacked_layer import StackedMoELayer
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class MoESharding:
    """Expert parallelism, tensor parallelism or both, over a mesh of any shape. Hashable.

    Attributes:
        mesh: of the devices.
        expert: axes over which the experts are, the first the outermost: `("hosts", "cards")` on a mesh of both. By
            default the axis "expert", where the mesh has one; `()` for none.
        tensor: axes over which the intermediate dimension is. By default the axis "tensor", where the mesh has one.
        pad: whether zeros fill the shares of the last ranks where the intermediate dimension has no equal ones.

    Raises:
        TypeError: `mesh` is not a mesh, or an axis is not a name.
        ValueError: the mesh has no such axis, or an axis is named twice.
    """

    mesh: Mesh | AbstractMesh
    expert: str | Axes | None = None
    tensor: str | Axes | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh has type {type(self.mesh).__name__}; it must be a jax.sharding.Mesh")
        for name in ("expert", "tensor"):
            axes = getattr(self, name)
            if axes is None:
                axes = (name,) if name in self.mesh.axis_names else ()
            axes = as_axes(name, axes)
            check_axes(name, axes, self.mesh)
            object.__setattr__(self, name, axes)
        both = [axis for axis in self.expert_axes if axis in self.tensor_axes]
        if both:
            raise ValueError(f"expert and tensor both name the axis {both[0]!r}; an axis cuts one of the two")

    @property
    def expert_axes(self) -> Axes:
        """`expert` as a tuple."""
        assert isinstance(self.expert, tuple)
        return self.expert

    @property
    def tensor_axes(self) -> Axes:
        """`tensor` as a tuple."""
        assert isinstance(self.tensor, tuple)
        return self.tensor

    @property
    def expert_ranks(self) -> int:
        """In how many parts the experts are."""
        return self.size(self.expert_axes)

    @property
    def tensor_ranks(self) -> int:
        """In how many parts the intermediate dimension is."""
        return self.size(self.tensor_axes)

    def size(self, axes: Axes) -> int:
        """Devices along axes of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def lay_out(self, layer: MoELayer) -> MoELayer:
        """The layer with gate and up in shares, where the intermediate dimension is cut; else as it is.

        Raises:
            ValueError: experts or the intermediate dimension do not fall into equal shares; the message names the
                nearest sizes that do.
        """
        check_experts(layer.gate_up.num_experts, self.expert_ranks)
        ranks = self.tensor_ranks
        if ranks == 1 or shares_of(layer.gate_up) == ranks:
            return layer
        gate_up, down = tensor_parallel(layer.gate_up, layer.down, ranks, activation=layer.activation, pad=self.pad)
        return self.lay_out_shared(dataclasses.replace(layer, gate_up=gate_up, down=down))

    def lay_out_shared(self, layer: MoELayer) -> MoELayer:
        """The layer with a packed shared expert in shares, padded where there are no equal ones."""
        shared, ranks = layer.shared, self.tensor_ranks
        if shared is None or not isinstance(shared.gate_up, MarlinWeights) or ranks == 1:
            return layer
        assert isinstance(shared.down, MarlinWeights)
        activation = layer.shared_activation or layer.activation
        matrices = tensor_parallel(shared.gate_up, shared.down, ranks, activation=activation, pad=True)
        return dataclasses.replace(layer, shared=SharedExpert(*matrices, shared.gate))

    def specs(self, layer: Any) -> Any:
        """A partition spec in the place of every leaf of a `MoELayer` or `StackedMoELayer` that is laid out.

        What is neither a routed expert nor packed is whole on every device: the router, a dense shared expert.

        Raises:
            ValueError: the layer is not laid out for this sharding, or does not fall into its shares.
        """
        if isinstance(layer, StackedMoELayer):
            inner = self.specs(layer.layers)
            return StackedMoELayer(jax.tree.map(lambda one: spec((), *_axes(one)), inner, is_leaf=is_spec))
        self.check(layer)
        whole = jax.tree.map(lambda leaf: spec(), layer, is_leaf=is_slice)
        matrices = {
            "gate_up": matrix_specs(layer.gate_up, self.expert_axes, self.tensor_axes),
            "down": matrix_specs(layer.down, self.expert_axes, (), self.tensor_axes),
        }
        shared = whole.shared
        if layer.shared is not None and isinstance(layer.shared.gate_up, MarlinWeights):
            shared = SharedExpert(
                matrix_specs(layer.shared.gate_up, (), self.tensor_axes),
                matrix_specs(layer.shared.down, (), (), self.tensor_axes),
                shared.gate,
            )
        return dataclasses.replace(whole, **matrices, shared=shared)

    def check(self, layer: MoELayer) -> None:
        """Raises ValueError unless a layer is laid out for this sharding and its experts fall into equal shares."""
        check_experts(layer.gate_up.num_experts, self.expert_ranks)
        found, wanted = shares_of(layer.gate_up), self.tensor_ranks
        if (found or 1) != wanted:
            if found is None:  # the sizes say more than that it is not laid out
                check_block(layer.gate_up, layer.down, wanted, activation=layer.activation, pad=self.pad)
            raise ValueError(
                f"layer.gate_up is laid out for {found or 1} ranks; the axes {self.tensor_axes} have {wanted}, and a "
                "cut elsewhere would part gate from up: place it with jax_marlin_moe.sharding.place"
            )

    def shardings(self, layer: Any) -> Any:
        """`NamedSharding`s in the place of every leaf; errors as for `specs`."""
        return jax.tree.map(lambda one: NamedSharding(self.mesh, one), self.specs(layer), is_leaf=is_spec)

    def abstract(self, layer: Any) -> Any:
        """A layer of `jax.ShapeDtypeStruct`s with their shardings, laid out: what a checkpoint is restored into.

        Args:
            layer: a `MoELayer` or `StackedMoELayer`, laid out; its leaves may be abstract.
        """
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            layer,
            self.shardings(layer),
        )


def check_axes(name: str, axes: Axes, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless the mesh has the axes, each once."""
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(f"{name} names the axis {axis!r}; the mesh has {', '.join(map(repr, mesh.axis_names))}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"{name} is {axes}; it must name each axis once")


def _axes(one: jax.sharding.PartitionSpec) -> list[Axes]:
    return [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in one]
