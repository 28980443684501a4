"""Reads one layer of a checkpoint as its tool wrote it."""

import dataclasses
import functools
import logging
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.checkpoint.family import Family, StackedNames
from jax_marlin_moe.checkpoint.input_scales import read_input_scales
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import Experts, find_matrix, load_matrix, read_dense
from jax_marlin_moe.checkpoint.model_facts import ModelFacts
from jax_marlin_moe.checkpoint.numbering import claim_number
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.schemes import BROKEN, MARKS, STACKED_SUFFIXES
from jax_marlin_moe.checkpoint.schemes.plain import Target, plain_suffix, read_plain
from jax_marlin_moe.checkpoint.sharded import Share, add_bias, cut_of, load_block, put_rest
from jax_marlin_moe.checkpoint.stated import stated_activation_dtype
from jax_marlin_moe.checkpoint.tensors import FLOATS, ShapeError, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.layer import MoELayer, check_layer
from jax_marlin_moe.progress import progress_bar
from jax_marlin_moe.sharding.moe_sharding import MoESharding
from jax_marlin_moe.shared_expert import SharedExpert, split_like
from jax_marlin_moe.weights import MarlinWeights

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LayerReader:
    """One layer of a checkpoint: finds its tensors, loads them, and refuses what it does not know.

    Attributes:
        files: the checkpoint.
        layer: its number, or its name.
        prefix: what the names of its tensors begin with.
        family: how they go on.
        facts: what the config says of all layers.
        quantization: what it says of its quantisation.
        source: the config, for errors.
        model_type: likewise.
        target: what plain experts become, None where they are refused.
        sharding: over whose devices the layer is, None for JAX's default one.
    """

    files: TensorFolder
    layer: int | str
    prefix: str
    family: Family
    facts: ModelFacts
    quantization: Quantization
    source: pathlib.Path
    model_type: str
    target: Target | None
    sharding: MoESharding | None = None

    def name(self, template: str) -> str:
        """A name of the family's row, spelt out for this layer."""
        return self.family.name(template, self.prefix)

    def load(self) -> MoELayer:
        """The layer; errors as for `load_moe_layer`."""
        try:
            return self._load()
        except ShapeError as error:
            facts = self.facts
            shared = (
                "" if facts.shared_size is None else f", intermediate size {facts.shared_size} of the shared expert"
            )
            raise ValueError(
                f"{error}; {self.source} says hidden size {facts.hidden}, intermediate size {facts.size}{shared} and "
                f"{facts.experts} experts"
            ) from None

    def activation_dtype(self) -> ByteDtype | None:
        """What the config says that the rows of the routed experts are quantised to, if it says so of all of them."""
        first, second = self._linears(self.facts.experts, self.facts.hidden, self.facts.size)
        linears = (linear for expert in (*first, *second) for linear in expert)
        stated = {stated_activation_dtype(self.quantization, module) for module in {each.module for each in linears}}
        return stated.pop() if len(stated) == 1 else None

    def _load(self) -> MoELayer:
        family, facts = self.family, self.facts
        hidden, size, experts = facts.hidden, facts.size, facts.experts
        for suffix, fault in BROKEN.items():
            if (name := f"{self.name(family.experts)}{suffix}") in self.files:
                raise self.files.fault(name, fault)
        first, second = self._linears(experts, hidden, size)
        x_scale, intermediate_scales = self._input_scales(first, second, hidden, size)
        matrices: tuple[Any, Any]
        if self.sharding is None:
            matrices = shapes = self._matrices(first, second, hidden, size, self.target, biased=family.biased)
        else:
            matrices, shapes = self._sharded(self.sharding, first, second, hidden, size)
        routed = experts + facts.routing.identity_experts
        router = self._kernel(family.router, routed, hidden)
        assert router is not None, "every family has a router"
        token_experts = self._token_experts(facts.routing.top_k, experts)
        layer = MoELayer(
            gate_up=matrices[0],
            down=matrices[1],
            router=router,
            routing=facts.routing,
            activation=facts.activation,
            router_bias=self._vector(family.router_bias, (routed,)),
            correction_bias=None if token_experts is not None else self._correction_bias(routed),
            expert_scale=self._vector(family.expert_scale, (routed,)),
            router_input_scale=self._vector(family.input_scale, (hidden,)),
            token_experts=token_experts,
            shared=(shared := self._shared(hidden)),
            output_norm=self._vector(family.output_norm, (hidden,)),
            norm_epsilon=facts.norm_epsilon,
            shared_activation=None if shared is None else facts.shared_activation,
            x_scale=x_scale,
            intermediate_scales=intermediate_scales,
        )
        output_bias = self._vector(family.output_bias, (hidden,))
        if output_bias is not None:
            # The weights sum to 1, so that each expert may have it.
            bias = jnp.tile(output_bias.astype(jnp.float32), (experts, 1))
            if self.sharding is None:
                layer = dataclasses.replace(layer, down=dataclasses.replace(layer.down, bias=bias))
            else:
                layer = dataclasses.replace(layer, down=add_bias(layer.down, bias, self.sharding))
        self._refuse_unknown()
        self.files.drop_pages()
        if self.sharding is not None:
            check_layer(self.source, dataclasses.replace(layer, gate_up=shapes[0], down=shapes[1]))
            return put_rest(layer, self.sharding)
        if layer.shared is not None:
            layer = dataclasses.replace(layer, shared=self._in_one_launch(layer, layer.shared))
        check_layer(self.source, layer)
        return layer

    def _input_scales(
        self, first: Experts, second: Experts, hidden: int, size: int
    ) -> tuple[Array | None, Array | None]:
        """Those of e4m3 rows that the files fix."""
        names = (linear.name(".input_scale") for expert in (*first, *second) for linear in expert)
        if not any(name in self.files for name in names):
            return None, None
        gate_up, down = (
            find_matrix(self.files, experts, k, n, self.quantization, self.target)
            for experts, k, n in ((first, hidden, size), (second, size, hidden))
        )
        return read_input_scales(self.files, gate_up, down, self.quantization)

    def _sharded(
        self, sharding: MoESharding, first: Experts, second: Experts, hidden: int, size: int
    ) -> tuple[Any, Any]:
        """The routed experts over devices; each process reads the tensors of its experts, or its part of them.

        Returns:
            Both matrices, and the shapes of both for one rank's part of the intermediate dimension.
        """
        files, biased = self.files, self.family.biased
        stored = find_matrix(files, first, hidden, size, self.quantization, self.target)
        down_stored = find_matrix(files, second, size, hidden, self.quantization, self.target)
        read: set[str] = set()

        def load(share: Share) -> tuple[MarlinWeights, MarlinWeights]:
            read.update(linear.module for rows in (first, second) for linear in rows[share.experts[0]])
            gate_up = load_matrix(
                files,
                stored,
                biased=biased,
                column_orders=down_stored.column_orders,
                advance=bar.update,
                members=share.experts,
                cut=cut_of(share, hidden, down=False),
            )
            down = load_matrix(
                files,
                down_stored,
                biased=biased,
                advance=bar.update,
                members=share.experts,
                cut=cut_of(share, hidden, down=True),
            )
            return gate_up, dataclasses.replace(down, input_order=None)

        with progress_bar(f"layer {self.layer}", len(first) + len(second)) as bar:
            loaded = load_block(
                load,
                sharding,
                experts=len(first),
                size=size,
                row=get_format(down_stored.storage.weight_format),
                group_size=down_stored.storage.rows_per_group(size),
                activation=self.facts.activation,
            )
        # What was read of one expert is known of those that other processes read.
        suffixes = {
            name.removeprefix(module)
            for name in files.seen
            for module in read
            if name.startswith((f"{module}.", f"{module}_")) or name == module
        }
        for linear in (linear for expert in (*first, *second) for linear in expert):
            for suffix in suffixes:
                if linear.name(suffix) in files:
                    files.ignore(linear.name(suffix))
        return loaded

    def _linears(self, experts: int, hidden: int, size: int) -> tuple[list[list[Linear]], list[list[Linear]]]:
        """The linears of gate and up, and of down, per expert."""
        family = self.family
        *names, last = family.linears
        parts = [name for name in names if name is not None]
        for row in family.stacked:
            apart = not isinstance(row.gate_up, str)
            modules = [
                self.name(module) for module in ((row.gate_up,) if isinstance(row.gate_up, str) else row.gate_up)
            ]
            down = self.name(row.down)
            if not any(module + suffix in self.files for module in modules for suffix in STACKED_SUFFIXES):
                continue
            for module in modules:
                self._check_stack(module, experts, experts * size if row.flat else experts)
            transposed = self._transposed(row, experts, (1 if apart else len(parts)) * size, hidden, size)
            make = functools.partial(
                Linear, num_experts=experts, flat=row.flat, interleaved=row.interleaved, transposed=transposed
            )
            if apart:
                first = [[make(module, e) for module in modules] for e in range(experts)]
            else:
                first = [
                    [make(modules[0], e, part=j, parts=len(parts)) for j in range(len(parts))] for e in range(experts)
                ]
            # Of experts one below the other, all three linears lie as [I, H].
            make = functools.partial(Linear, num_experts=experts, flat=row.flat, transposed=row.flat or transposed)
            return first, [[make(down, e)] for e in range(experts)]
        if family.numbered is not None:
            raise ValueError(
                f"{self.quantization.source}: the experts of {self.model_type} have tensors of their own "
                f"(quant_method {self.quantization.method!r}); {family.numbered}"
            )
        self._check_experts(experts, self.facts.routing.identity_experts + experts * (family.modalities - 1))
        prefix = self.name(family.experts)

        def linears(*names: str) -> list[list[Linear]]:
            return [[Linear(f"{prefix}.{e}.{name}") for name in names] for e in range(experts)]

        return linears(*parts), linears(last)

    def _transposed(self, row: StackedNames, experts: int, width: int, hidden: int, size: int) -> bool:
        """Whether plain stacked weights lie as [E, K, N]: a shape tells, the family where all are square."""
        if row.flat:
            return False
        first = row.gate_up if isinstance(row.gate_up, str) else row.gate_up[0]
        for module, n, k in ((first, width, hidden), (row.down, hidden, size)):
            suffix = next((s for s in ("", ".weight") if self.name(module) + s in self.files), None)
            if suffix is not None and n != k:
                shape = self.files.info(self.name(module) + suffix).shape
                if shape in ((experts, n, k), (experts, k, n)):
                    return shape == (experts, k, n)
        return row.transposed

    def _matrices(
        self, first: Experts, second: Experts, hidden: int, size: int, target: Target | None, *, biased: bool
    ) -> tuple[MarlinWeights, MarlinWeights]:
        """Both matrices of some experts; a row order of the second is folded into the columns of the first."""
        files = self.files
        down_stored = find_matrix(files, second, size, hidden, self.quantization, target)
        with progress_bar(f"layer {self.layer}", len(first) + len(second)) as bar:
            gate_up = load_matrix(
                files,
                find_matrix(files, first, hidden, size, self.quantization, target),
                biased=biased,
                column_orders=down_stored.column_orders,
                advance=bar.update,
            )
            down = load_matrix(files, down_stored, biased=biased, advance=bar.update)
        return gate_up, dataclasses.replace(down, input_order=None)

    def _kernel(self, template: str | None, n: int, k: int) -> Array | None:
        """A router or the gate of a shared expert, [k, n]: dequantised where the file has it quantised."""
        module = None if template is None else self.name(template.removesuffix(".weight"))
        if (
            module is not None
            and any(f"{module}{suffix}" in self.files for suffix in MARKS)
            and self.files.dtype(f"{module}.weight") not in FLOATS
        ):
            return jnp.asarray(read_dense(self.files, Linear(module), k, n, self.quantization))
        if template == self.family.router and self.family.router_transposed:
            return self._vector(template, (k, n))
        value = self._vector(template, (n, k))
        return None if value is None else value.T

    def _vector(self, template: str | None, shape: tuple[int, ...]) -> Array | None:
        """A small tensor of the layer, None where the family has none; raises ValueError where files lack it."""
        if template is None:
            return None
        name = self.name(template)
        value = self.files.read(name, shape, FLOATS)
        if not np.isfinite(value.astype(np.float32)).all():
            raise self.files.fault(name, "holds infinities or NaN")
        return jnp.array(value, copy=True)

    def _correction_bias(self, experts: int) -> Array | None:
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
        value = self._vector(template, (self.family.modalities, experts) if len(shape) == 2 else (experts,))
        return value if value is None or value.ndim == 1 else value[0]

    def _token_experts(self, top_k: int, experts: int) -> Array | None:
        template = self.family.hash_table
        if template is None or self.name(template) not in self.files:
            return None
        name = self.name(template)
        rows = self.files.info(name).shape[0]
        table = self.files.read(name, (rows, top_k), ("I64", "I32"))
        if rows and not (table.min() >= 0 and table.max() < experts):
            raise self.files.fault(name, f"holds {table.min()} to {table.max()}; experts lie in [0, {experts})")
        return jnp.asarray(table.astype(np.int32))

    def _shared(self, hidden: int) -> SharedExpert | None:
        module = self._shared_module()
        if module is None:
            return None
        gate_up, down = self._shared_linears(module)
        gate = self._kernel(self.family.shared_gate, 1, hidden)
        if any(plain_suffix(self.files, part) is not None for part in (down, *gate_up)):
            return SharedExpert(*self._dense_block(gate_up, down, hidden), gate)
        if self.facts.shared_scale != 1:
            raise ValueError(
                f"{self.files.folder}: the shared expert {module} counts {self.facts.shared_scale} times and is "
                "quantised; such a factor is supported for plain shared experts alone"
            )
        size = self.facts.shared_size or self.facts.usual_shared_size
        return SharedExpert(*self._matrices([gate_up], [[down]], hidden, size, None, biased=False), gate)

    def _shared_module(self) -> str | None:
        """Where the shared expert's tensors are; raises ValueError where the config denies or promises it."""
        files, facts = self.files, self.facts
        modules = map(self.name, self.family.shared)
        module = next((m for m in modules if any(name.startswith(f"{m}.") for name in files.names)), None)
        if module is None and facts.promised is not None:
            key, value = facts.promised
            raise ValueError(
                f"{files.folder} has no tensors {self.name(self.family.shared[0])}.* of a shared expert; "
                f"{self.source} says {key} = {value}"
            )
        if module is not None and facts.denied is not None:
            key, value = facts.denied
            raise ValueError(
                f"{files.folder} has tensors {module}.* of a shared expert; {self.source} says {key} = {value}"
            )
        return module

    def _shared_linears(self, module: str) -> tuple[list[Linear], Linear]:
        """The linears of gate and up, and of down, of the shared expert, by the first names that the files have."""
        family, files = self.family, self.files
        found = (
            names
            for names in family.shared_linears
            if any(name.startswith(f"{module}.{names[2]}.") for name in files.names)
        )
        gate, up, down = next(found, family.linears)
        if gate == up:
            gate_up = [Linear(f"{module}.{up}", part=part, parts=2) for part in range(2)]
        else:
            gate_up = [Linear(f"{module}.{name}") for name in (gate, up) if name is not None]
        return gate_up, Linear(f"{module}.{down}")

    def _dense_block(self, gate_up: list[Linear], down: Linear, hidden: int) -> tuple[Array, Array]:
        """Both matrices of a shared expert of which a linear is plain; its size is the config's, or that linear's."""
        files, size, scale = self.files, self.facts.shared_size, self.facts.shared_scale
        if size is None:
            plain = next(part for part in (down, *gate_up) if plain_suffix(files, part) is not None)
            name = plain.name(plain_suffix(files, plain) or "")
            shape = files.info(name).shape
            if len(shape) != 2:
                raise files.fault(name, f"has shape {shape}; it must have two dimensions")
            size = shape[plain is down] // plain.parts
        dense = [self._dense(part, hidden, size) for part in gate_up]
        last = self._dense(down, size, hidden)
        last = last if scale == 1 else (last.astype(np.float32) * scale).astype(last.dtype)
        return jnp.asarray(np.concatenate(dense, axis=1)), jnp.array(last, copy=True)

    def _in_one_launch(self, layer: MoELayer, shared: SharedExpert) -> SharedExpert:
        """The shared expert as experts like the others, where the kernels can then run all of them at once."""
        if layer.shared_activation not in (None, layer.activation):
            reason: str | None = (
                f"its activation is {layer.shared_activation!r}, that of the others {layer.activation!r}"
            )
        else:
            shared, reason = split_like(shared, layer.gate_up, layer.down)
        if reason is not None:
            _LOGGER.info(
                "layer %s of %s: the shared expert is not in the launch of the others: %s",
                self.layer,
                self.files.folder,
                reason,
            )
        return shared

    def _dense(self, linear: Linear, k: int, n: int) -> np.ndarray:
        """A linear that stays dense, [k, n], or becomes so; raises ValueError where it holds infinities or NaN."""
        suffix = plain_suffix(self.files, linear)
        if suffix is None:
            return read_dense(self.files, linear, k, n, self.quantization)
        value = read_plain(self.files, linear, suffix, k, n)
        if not np.isfinite(value.astype(np.float32, copy=False)).all():
            raise self.files.fault(linear.name(suffix), "holds infinities or NaN")
        return value.T

    def _check_experts(self, experts: int, further: int) -> None:
        """The experts that have tensors must be those that the config counts: before anything of that size is built.

        The `further` ones behind them are not read: those of other modalities, and identity experts, of which
        transformers saves tensors that it does not use.
        """
        pattern = re.compile(re.escape(self.name(self.family.experts)) + r"\.([0-9]+)\.")
        found: dict[int, str] = {}
        for name in sorted(self.files.names):
            match = pattern.match(name)
            if match is not None:
                if further and len(match.group(1)) < 6 and experts <= int(match.group(1)) < experts + further:
                    self.files.ignore(name)
                else:
                    claim_number(found, self.files, name, match.group(1), match.group())
        if len(found) != experts or (found and max(found) != experts - 1):
            raise ValueError(
                f"{self.files.folder}: layer {self.layer} has tensors of {len(found)} experts; "
                f"config.json says {experts}"
            )

    def _check_stack(self, module: str, experts: int, rows: int) -> None:
        """Likewise where one tensor holds them all: its first dimension, which is `rows`."""
        name = next(module + suffix for suffix in STACKED_SUFFIXES if module + suffix in self.files)
        shape = self.files.info(name).shape
        if not shape or shape[0] != rows:
            must = f"{rows}, the rows of the {experts} experts" if rows != experts else f"the {experts} experts"
            raise self.files.fault(name, f"has shape {shape}; its first dimension must be {must}")

    def _refuse_unknown(self) -> None:
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
