"""The tensors of one layer of a checkpoint, by what its family calls them."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.checkpoint.family import Family
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import Experts, find_matrix, load_matrix, read_dense
from jax_marlin_moe.checkpoint.model_facts import ModelFacts
from jax_marlin_moe.checkpoint.pre_quant_scales import scales_of_up
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.schemes import MARKS
from jax_marlin_moe.checkpoint.schemes.plain import Target
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.progress import progress_bar
from jax_marlin_moe.weights import MarlinWeights


@dataclasses.dataclass(frozen=True)
class LayerTensors:
    """Reads what a layer has beside its experts, and matrices of experts that are found.

    Attributes:
        files: the checkpoint.
        layer: its number, or its name.
        prefix: what the names of its tensors begin with.
        family: how they go on.
        facts: what the config says of all layers.
        quantization: what it says of its quantisation.
        source: the config, for errors.
        model_type: likewise.
    """

    files: TensorFolder
    layer: int | str
    prefix: str
    family: Family
    facts: ModelFacts
    quantization: Quantization
    source: pathlib.Path
    model_type: str

    def name(self, template: str) -> str:
        """A name of the family's row, spelt out for this layer."""
        return self.family.name(template, self.prefix)

    def kernel(self, template: str | None, n: int, k: int) -> Array | None:
        """A router or the gate of a shared expert, [k, n]: dequantised where the file has it quantised."""
        module = None if template is None else self.name(template.removesuffix(".weight"))
        if (
            module is not None
            and any(f"{module}{suffix}" in self.files for suffix in MARKS)
            and self.files.dtype(f"{module}.weight") not in FLOATS
        ):
            return jnp.asarray(read_dense(self.files, Linear(module), k, n, self.quantization))
        if template == self.family.router and self.family.router_transposed:
            return self.vector(template, (k, n))
        value = self.vector(template, (n, k))
        return None if value is None else value.T

    def vector(self, template: str | None, shape: tuple[int, ...]) -> Array | None:
        """A small tensor of the layer, None where the family has none; raises ValueError where files lack it."""
        if template is None:
            return None
        name = self.name(template)
        value = self.files.read(name, shape, FLOATS)
        if not np.isfinite(value.astype(np.float32)).all():
            raise self.files.fault(name, "holds infinities or NaN; every value must be finite")
        return jnp.array(value, copy=True)

    def correction_bias(self, experts: int) -> Array | None:
        """[E], also where it is the first row of several; raises ValueError where the config denies or promises it."""
        template, stated = self.family.correction_bias, self.facts.correction
        if template is None:
            return None
        there = self.name(template) in self.files
        if stated is not None and there != stated[1]:
            found = "has a tensor" if there else "has no tensor"
            raise ValueError(
                f"{self.files.folder} {found} {self.name(template)}; {self.source} says {stated[0]} = {stated[1]}"
            )
        if not there and stated is not None:
            return None
        shape = self.files.info(self.name(template)).shape if there else (experts,)
        value = self.vector(template, (self.family.modalities, experts) if len(shape) == 2 else (experts,))
        return value if value is None or value.ndim == 1 else value[0]

    def token_experts(self, top_k: int, experts: int) -> Array | None:
        """Which experts each token of the vocabulary chooses, [V, top_k], where the layer has such a table."""
        template = self.family.hash_table
        if template is None or self.name(template) not in self.files:
            return None
        name = self.name(template)
        rows = self.files.info(name).shape[0]
        table = self.files.read(name, (rows, top_k), ("I64", "I32"))
        if rows and not (table.min() >= 0 and table.max() < experts):
            raise self.files.fault(name, f"holds {table.min()} to {table.max()}; experts lie in [0, {experts})")
        return jnp.asarray(table.astype(np.int32))

    def matrices(
        self,
        first: Experts,
        second: Experts,
        hidden: int,
        size: int,
        target: Target | None,
        *,
        biased: bool,
        scaled_input: bool | str,
        activation: str | Activation,
    ) -> tuple[MarlinWeights, MarlinWeights]:
        """Both matrices of some experts; an order or factors of the second's input are in the columns of the first."""
        files = self.files
        down_stored = find_matrix(files, second, size, hidden, self.quantization, target)
        stored = find_matrix(files, first, hidden, size, self.quantization, target)
        with progress_bar(f"layer {self.layer}", len(first) + len(second)) as bar:
            gate_up = load_matrix(
                files,
                stored,
                biased=biased,
                column_orders=down_stored.column_orders,
                column_scales=scales_of_up(files, second, size, stored.storage.weight_format, activation),
                scaled_input=scaled_input,
                advance=bar.update,
            )
            down = load_matrix(files, down_stored, biased=biased, scaled_input=True, advance=bar.update)
        return gate_up, dataclasses.replace(down, input_order=None)

    def refuse_unknown(self) -> None:
        """Every tensor of the block must have been read, or be known not to matter."""
        family = self.family
        for template in family.others:
            self.files.ignore(self.name(template))
        # Quantisers leave empty scales beside plain routers.
        self.files.ignore(self.name(f"{family.router_module}.input_scale"))
        owned = family.owned(self.prefix)
        left = sorted(n for n in self.files.names - self.files.seen if n.startswith(owned))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise self.files.fault(left[0], f"is not known{more}; the layer would be loaded without it")
