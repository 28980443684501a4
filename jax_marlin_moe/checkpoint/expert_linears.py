"""Where the routed experts of a layer lie: each linear in tensors of its own, or all of them in one stack."""

import functools
import re

from jax_marlin_moe.checkpoint.family import StackedNames
from jax_marlin_moe.checkpoint.layer_tensors import LayerTensors
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.numbering import claim_number
from jax_marlin_moe.checkpoint.schemes import STACKED_SUFFIXES


def expert_linears(tensors: LayerTensors) -> tuple[list[list[Linear]], list[list[Linear]]]:
    """The linears of gate and up, and of down, per expert.

    Raises:
        ValueError: there are more or fewer experts than the config says, or the files have them in a way in which the
            family does not.
    """
    family, facts = tensors.family, tensors.facts
    experts, hidden, size = facts.experts, facts.hidden, facts.size
    *names, last = family.linears
    parts = [name for name in names if name is not None]
    for row in family.stacked:
        apart = not isinstance(row.gate_up, str)
        modules = [tensors.name(module) for module in ((row.gate_up,) if isinstance(row.gate_up, str) else row.gate_up)]
        down = tensors.name(row.down)
        if not any(module + suffix in tensors.files for module in modules for suffix in STACKED_SUFFIXES):
            continue
        for module in modules:
            _check_stack(tensors, module, experts, experts * size if row.flat else experts)
        transposed = _is_transposed(tensors, row, experts, (1 if apart else len(parts)) * size, hidden, size)
        make = functools.partial(
            Linear, num_experts=experts, flat=row.flat, interleaved=row.interleaved, transposed=transposed
        )
        if apart:
            first = [[make(module, e) for module in modules] for e in range(experts)]
        else:
            first = [[make(modules[0], e, part=j, parts=len(parts)) for j in range(len(parts))] for e in range(experts)]
        # Of experts one below the other, all three linears lie as [I, H].
        make = functools.partial(Linear, num_experts=experts, flat=row.flat, transposed=row.flat or transposed)
        return first, [[make(down, e)] for e in range(experts)]
    if family.numbered is not None:
        raise ValueError(
            f"{tensors.quantization.source}: the experts of {tensors.model_type} have tensors of their own "
            f"(quant_method {tensors.quantization.method!r}); {family.numbered}"
        )
    _check_experts(tensors, experts, facts.routing.identity_experts + experts * (family.modalities - 1))
    prefix = tensors.name(family.experts)

    def linears(*names: str) -> list[list[Linear]]:
        return [[Linear(f"{prefix}.{e}.{name}") for name in names] for e in range(experts)]

    return linears(*parts), linears(last)


def _is_transposed(tensors: LayerTensors, row: StackedNames, experts: int, width: int, hidden: int, size: int) -> bool:
    """Whether plain stacked weights lie as [E, K, N]: a shape tells, the family where all are square."""
    if row.flat:
        return False
    first = row.gate_up if isinstance(row.gate_up, str) else row.gate_up[0]
    for module, n, k in ((first, width, hidden), (row.down, hidden, size)):
        suffix = next((s for s in ("", ".weight") if tensors.name(module) + s in tensors.files), None)
        if suffix is not None and n != k:
            shape = tensors.files.info(tensors.name(module) + suffix).shape
            if shape in ((experts, n, k), (experts, k, n)):
                return shape == (experts, k, n)
    return row.transposed


def _check_experts(tensors: LayerTensors, experts: int, further: int) -> None:
    """The experts that have tensors must be those that the config counts: before anything of that size is built.

    The `further` ones behind them are not read: those of other modalities, and identity experts, of which
    transformers saves tensors that it does not use.
    """
    pattern = re.compile(re.escape(tensors.name(tensors.family.experts)) + r"\.([0-9]+)\.")
    found: dict[int, str] = {}
    for name in sorted(tensors.files.names):
        match = pattern.match(name)
        if match is not None:
            if further and len(match.group(1)) < 6 and experts <= int(match.group(1)) < experts + further:
                tensors.files.ignore(name)
            else:
                claim_number(found, tensors.files, name, match.group(1), match.group())
    if len(found) != experts or (found and max(found) != experts - 1):
        raise ValueError(
            f"{tensors.files.folder}: layer {tensors.layer} has tensors of {len(found)} experts; "
            f"config.json says {experts}"
        )


def _check_stack(tensors: LayerTensors, module: str, experts: int, rows: int) -> None:
    """Likewise where one tensor holds them all: its first dimension, which is `rows`."""
    name = next(module + suffix for suffix in STACKED_SUFFIXES if module + suffix in tensors.files)
    shape = tensors.files.info(name).shape
    if not shape or shape[0] != rows:
        must = f"{rows}, the rows of the {experts} experts" if rows != experts else f"the {experts} experts"
        raise tensors.files.fault(name, f"has shape {shape}; its first dimension must be {must}")
