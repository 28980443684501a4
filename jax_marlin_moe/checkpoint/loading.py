"""`load_moe_layer` and `load_moe_layers`: layers of a checkpoint, as its tool wrote it or as `convert` did."""

import dataclasses
import functools
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jax_marlin_moe.checkpoint import packed_form
from jax_marlin_moe.checkpoint.families import Family, Stacked, get_family, number_of_layers
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import Experts, find_matrix, load_matrix, read_dense
from jax_marlin_moe.checkpoint.model_facts import ModelFacts, read_facts
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_config import find_quantization
from jax_marlin_moe.checkpoint.schemes import BROKEN, MARKS, STACKED_SUFFIXES
from jax_marlin_moe.checkpoint.schemes.plain import Target, plain_suffix, read_plain
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder, read_json
from jax_marlin_moe.layer import MoELayer, SharedExpert, check_layer
from jax_marlin_moe.weights import MarlinWeights

_DIGITS = 9  # of the number of a layer or an expert
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_PROGRESS_AFTER = 2.0  # seconds before a progress bar appears


def load_moe_layer(
    path: str | os.PathLike,
    layer: int,
    *,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
) -> MoELayer:
    """Loads one mixture-of-experts layer of a checkpoint: bit for bit where it is quantised.

    Which layers have experts, and how they are stored, is decided by the tensors that exist; README lists the schemes
    and the model families. Float scales keep the dtype that they have on disk. Only this layer's tensors are read, one
    linear at a time, so the host needs little more memory than the packed layer. An act-order of the down matrices is
    folded into the columns of gate and up. Shared experts are packed where the file has them quantised, and stay dense
    arrays where it has not.

    Args:
        path: the folder with config.json and safetensors files, or one that `convert` wrote.
        layer: its number, from 0.
        quantize: for plain bfloat16, float16 or float32 experts, the format that they shall have. Layers that are
            quantised stay as they are, where others are plain; where none is, `quantize` is refused.
        group_size: for `quantize`, as in `jax_marlin_moe.quantize`.
        scale_dtype: likewise; by default the dtype of the file.

    Returns:
        The packed experts, on JAX's default device, and what routing needs.

    Raises:
        FileNotFoundError: no such folder, or files are missing in it.
        ValueError: the model, its quantisation or the layer is not supported, or a tensor is missing, not known, or
            does not fit the config. Messages name the file, the tensor, what was expected and what was found.
    """
    return Checkpoint(path, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype).load(layer)


def load_moe_layers(
    path: str | os.PathLike,
    *,
    quantize: str | None = None,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
) -> Iterator[tuple[int, MoELayer]]:
    """All mixture-of-experts layers in ascending order, each with its number; arguments as for `load_moe_layer`."""
    checkpoint = Checkpoint(path, quantize=quantize, group_size=group_size, scale_dtype=scale_dtype)
    for layer in checkpoint.layers:
        yield layer, checkpoint.load(layer)


class Checkpoint:
    """An opened checkpoint folder: its config and the layers that have experts.

    Args:
        path: the folder.
        quantize: as for `load_moe_layer`.
        group_size: likewise.
        scale_dtype: likewise.

    Attributes:
        layers: numbers of the layers with experts, ascending, without those for multi-token prediction.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        quantize: str | None = None,
        group_size: int | Literal["customary"] | None = "customary",
        scale_dtype: DTypeLike | None = None,
    ) -> None:
        _check_folder(path)
        self.folder = pathlib.Path(path)
        self.manifest = packed_form.read_manifest(self.folder)
        if self.manifest is not None:
            if quantize is not None:
                raise ValueError(f"{self.folder} is packed already; quantize={quantize!r} is for plain weights")
            self.layers = self.manifest.layers
            return
        self.source = self.folder / "config.json"
        if not self.source.is_file():
            raise FileNotFoundError(f"{self.folder} holds no config.json; pass the folder of a checkpoint")
        whole = read_json(self.source)
        self.family, self.model_type, self._keys = get_family(whole, self.source)
        self.quantization = find_quantization(self.folder, whole)
        scale_name = None if scale_dtype is None else jnp.dtype(scale_dtype).name
        self._target = None if quantize is None else Target(quantize, group_size, scale_name)
        self.files = TensorFolder(self.folder)
        self._prefixes = _layer_prefixes(self.files, self.family)
        last = number_of_layers(self._keys)
        self.layers = sorted(n for n in self._prefixes if last is None or n < last)

    def load(self, layer: int) -> MoELayer:
        """Loads one layer; arguments and errors as for `load_moe_layer`."""
        if layer not in self.layers:
            found = f"{self.layers[0]} to {self.layers[-1]}" if self.layers else "none"
            raise ValueError(f"{self.folder}: layer {layer} has no experts; layers with experts: {found}")
        if self.manifest is not None:
            return self.manifest.load(layer)
        return _LayerReader(self, layer).load()

    @functools.cached_property
    def facts(self) -> ModelFacts:
        """What the config says of all layers; raises ValueError where it says what the loader does not know."""
        return read_facts(self.family, self.model_type, self._keys)

    def target(self, layer: int) -> Target | None:
        """What plain experts of a layer become; None where it is quantised and others, which are plain, are meant."""
        if self._target is not None and not self._plain_layers:
            raise ValueError(
                f"{self.folder}: layer {layer} is quantised already; quantize={self._target.weight_format!r} is for "
                "plain weights: leave it out"
            )
        return self._target if layer in self._plain_layers else None

    @functools.cached_property
    def _plain_layers(self) -> frozenset[int]:
        pattern = self.family.layer_pattern()
        found = ((name, match) for name in self.files.names if (match := pattern.match(name)))
        return frozenset(
            int(match.group(2))
            for name, match in found
            if (name.endswith(".weight") or name == match.group()) and self.files.dtype(name) in FLOATS
        )

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return self._prefixes[layer]


@dataclasses.dataclass(frozen=True)
class _LayerReader:
    checkpoint: Checkpoint
    layer: int

    @property
    def files(self) -> TensorFolder:
        return self.checkpoint.files

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def facts(self) -> ModelFacts:
        return self.checkpoint.facts

    @property
    def quantization(self) -> Quantization:
        return self.checkpoint.quantization

    def name(self, template: str) -> str:
        return self.family.name(template, self.checkpoint.prefix(self.layer))

    def load(self) -> MoELayer:
        family, facts = self.family, self.facts
        hidden, size, experts = facts.hidden, facts.size, facts.experts
        for suffix, fault in BROKEN.items():
            if (name := f"{self.name(family.experts)}{suffix}") in self.files:
                raise self.files.fault(name, fault)
        first, second = self._linears(experts, hidden, size)
        gate_up, down = self._matrices(
            first, second, hidden, size, self.checkpoint.target(self.layer), biased=family.biased
        )
        router = self._kernel(family.router, experts, hidden)
        assert router is not None, "every family has a router"
        token_experts = self._token_experts(facts.routing.top_k, experts)
        layer = MoELayer(
            gate_up=gate_up,
            down=down,
            router=router,
            routing=facts.routing,
            activation=facts.activation,
            router_bias=self._vector(family.router_bias, (experts,)),
            correction_bias=None if token_experts is not None else self._vector(family.correction_bias, (experts,)),
            expert_scale=self._vector(family.expert_scale, (experts,)),
            router_input_scale=self._vector(family.input_scale, (hidden,)),
            token_experts=token_experts,
            shared=self._shared(hidden),
            norm_epsilon=facts.norm_epsilon,
        )
        self._refuse_unknown()
        self.files.drop_pages()
        check_layer(self.checkpoint.source, layer)
        return layer

    def _linears(self, experts: int, hidden: int, size: int) -> tuple[list[list[Linear]], list[list[Linear]]]:
        """The linears of gate and up, and of down, per expert."""
        family = self.family
        parts = [name for name in (family.gate, family.up) if name is not None]
        for row in family.stacked:
            module, down = self.name(row.gate_up), self.name(row.down)
            if not any(module + suffix in self.files for suffix in STACKED_SUFFIXES):
                continue
            self._check_stack(module, experts)
            transposed = self._transposed(row, experts, len(parts) * size, hidden, size)
            first = [
                [
                    Linear(
                        module,
                        e,
                        part=j,
                        parts=len(parts),
                        interleaved=row.interleaved,
                        num_experts=experts,
                        transposed=transposed,
                    )
                    for j in range(len(parts))
                ]
                for e in range(experts)
            ]
            return first, [[Linear(down, e, num_experts=experts, transposed=transposed)] for e in range(experts)]
        if family.numbered is not None:
            raise ValueError(
                f"{self.quantization.source}: the experts of {self.checkpoint.model_type} have tensors of their own "
                f"(quant_method {self.quantization.method!r}); {family.numbered}"
            )
        self._check_experts(experts)
        prefix = self.name(family.experts)

        def modules(*names: str) -> list[list[Linear]]:
            return [[Linear(f"{prefix}.{e}.{name}") for name in names] for e in range(experts)]

        return modules(*parts), modules(family.down)

    def _transposed(self, row: Stacked, experts: int, width: int, hidden: int, size: int) -> bool:
        """Whether plain stacked weights lie as [E, K, N]: a shape tells, the family where all are square."""
        for module, n, k in ((row.gate_up, width, hidden), (row.down, hidden, size)):
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
        bar = _Progress(f"layer {self.layer}", len(first) + len(second))
        try:
            gate_up = load_matrix(
                files,
                find_matrix(files, first, hidden, size, self.quantization, target),
                biased=biased,
                column_orders=down_stored.column_orders,
                advance=bar.advance,
            )
            down = load_matrix(files, down_stored, biased=biased, advance=bar.advance)
        finally:
            bar.close()
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
        family, files = self.family, self.files
        module = next(
            (m for m in map(self.name, family.shared) if any(name.startswith(f"{m}.") for name in files.names)), None
        )
        if module is None:
            if self.facts.promised is not None:
                key, value = self.facts.promised
                raise ValueError(
                    f"{files.folder} has no tensors {self.name(family.shared[0])}.* of a shared expert; "
                    f"{self.checkpoint.source} says {key} = {value}"
                )
            return None
        if self.facts.denied is not None:
            key, value = self.facts.denied
            raise ValueError(
                f"{files.folder} has tensors {module}.* of a shared expert; "
                f"{self.checkpoint.source} says {key} = {value}"
            )
        names = next(
            (
                names
                for names in family.shared_linears
                if any(name.startswith(f"{module}.{names[2]}.") for name in files.names)
            ),
            family.experts_linears,
        )
        gate_up = [Linear(f"{module}.{name}") for name in names[:2] if name is not None]
        down = Linear(f"{module}.{names[2]}")
        gate = self._kernel(family.shared_gate, 1, hidden)
        plain = next((part for part in (down, *gate_up) if plain_suffix(files, part) is not None), None)
        if plain is not None:
            name = plain.name(plain_suffix(files, plain) or "")
            shape = files.info(name).shape
            if self.facts.shared_size is None and len(shape) != 2:
                raise files.fault(name, f"has shape {shape}; it must have two dimensions")
            size = shape[plain is down] if self.facts.shared_size is None else self.facts.shared_size
            dense = [self._dense(part, hidden, size) for part in gate_up]
            last = self._dense(down, size, hidden)
            return SharedExpert(jnp.asarray(np.concatenate(dense, axis=1)), jnp.array(last, copy=True), gate)
        size = self.facts.shared_size or self.facts.usual_shared_size
        packed_gate_up, packed_down = self._matrices([gate_up], [[down]], hidden, size, None, biased=False)
        return SharedExpert(packed_gate_up, packed_down, gate)

    def _dense(self, linear: Linear, k: int, n: int) -> np.ndarray:
        """A linear that stays dense, [k, n], or becomes so; raises ValueError where it holds infinities or NaN."""
        suffix = plain_suffix(self.files, linear)
        if suffix is None:
            return read_dense(self.files, linear, k, n, self.quantization)
        value = read_plain(self.files, linear, suffix, k, n)
        if not np.isfinite(value.astype(np.float32, copy=False)).all():
            raise self.files.fault(linear.name(suffix), "holds infinities or NaN")
        return value.T

    def _check_experts(self, experts: int) -> None:
        """The experts that have tensors must be those that the config counts: before anything of that size is built."""
        pattern = re.compile(re.escape(self.name(self.family.experts)) + r"\.([0-9]+)\.")
        found: dict[int, str] = {}
        for name in sorted(self.files.names):
            match = pattern.match(name)
            if match is not None:
                _claim(found, self.files, name, match.group(1), match.group())
        if len(found) != experts or (found and max(found) != experts - 1):
            raise ValueError(
                f"{self.files.folder}: layer {self.layer} has tensors of {len(found)} experts; "
                f"config.json says {experts}"
            )

    def _check_stack(self, module: str, experts: int) -> None:
        """Likewise where one tensor holds them all: its first dimension."""
        name = next(module + suffix for suffix in STACKED_SUFFIXES if module + suffix in self.files)
        shape = self.files.info(name).shape
        if not shape or shape[0] != experts:
            raise self.files.fault(name, f"has shape {shape}; its first dimension must be the {experts} experts")

    def _refuse_unknown(self) -> None:
        """Every tensor of the block must have been read, or be known not to matter."""
        family = self.family
        for template in family.others:
            self.files.ignore(self.name(template))
        # Quantisers leave empty scales beside plain routers.
        self.files.ignore(self.name(f"{family.router_module}.input_scale"))
        owned = family.owned(self.checkpoint.prefix(self.layer))
        left = sorted(n for n in self.files.names - self.files.seen if n.startswith(owned))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise self.files.fault(left[0], f"is not known{more}; the layer would be loaded without it")


def _layer_prefixes(files: TensorFolder, family: Family) -> dict[int, str]:
    """What the names of each layer's tensors begin with; raises ValueError where two could be one layer."""
    pattern = family.layer_pattern()
    found: dict[int, str] = {}
    for name in sorted(files.names):
        match = pattern.match(name)
        if match is not None:
            _claim(found, files, name, match.group(2), match.group(1))
    return found


def _claim(found: dict[int, str], files: TensorFolder, name: str, number: str, prefix: str) -> None:
    """Enters the prefix of a layer or an expert under its number; raises ValueError where another prefix has it."""
    if len(number) > _DIGITS:
        raise files.fault(name, f"has a number of {len(number)} digits in its name; at most {_DIGITS} are allowed")
    other = found.setdefault(int(number), prefix)
    if other != prefix:
        raise ValueError(
            f"{files.folder} has tensors {other}* and {prefix}*, both of number {int(number)}; there must be one of "
            "them: remove the copy that does not count"
        )


def _check_folder(path: str | os.PathLike) -> None:
    """Raises an error, with advice, where a path is empty, or is no folder but looks like the id of a repository."""
    text = os.fspath(path)
    if not text:
        raise ValueError("path is empty; pass the folder of a checkpoint")
    if not os.path.exists(text) and isinstance(text, str) and _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"{text} is no folder here; it looks like the id of a Hugging Face repository, which must be downloaded "
            f"first: `hf download {text} --local-dir {text.split('/')[1]}`, then pass that folder"
        )


class _Progress:
    """A line on a terminal's stderr that follows a long load."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start, self._shown = time.monotonic(), False
        self._stream = sys.stderr

    def advance(self) -> None:
        self.done += 1
        if time.monotonic() - self._start < _PROGRESS_AFTER or not self._stream.isatty():
            return
        self._shown = True
        filled = 30 * self.done // self.total
        bar = "#" * filled + "." * (30 - filled)
        self._stream.write(f"\r{self.what} [{bar}] {self.done}/{self.total}")
        self._stream.flush()

    def close(self) -> None:
        if self._shown:
            self._stream.write("\n")
