"""The search for the fastest scheme: times what is proposed, and what the times suggest."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.samples import (
    Measurement,
    fastest_block,
    fastest_pairs,
    rivals,
    winner,
    with_and_without_overlap,
)


class Timer(Protocol):
    """What times a scheme."""

    def compiled(self, schemes: Sequence[BlockScheme]) -> list[BlockScheme]:
        """Those of the schemes that compile, in their order."""

    def measure(self, scheme: BlockScheme) -> Measurement:
        """A few samples of the block and of each product."""

    def rested_block_us(self, scheme: BlockScheme) -> float:
        """Microseconds of the block, from samples good enough to decide by."""


def search(groups: Sequence[Sequence[BlockScheme]], known: BlockScheme | None, timer: Timer) -> Measurement | None:
    """The fastest scheme.

    Args:
        groups: what is proposed, in groups of the same way to find slots and the same token tile.
        known: a scheme that competes with the groups' winners.
        timer: of the card.

    Returns:
        The winner and its times; None where nothing is known and nothing proposed compiles.
    """
    finalists = [] if known is None else timer.compiled([known])
    for group in groups:
        measured = [timer.measure(scheme) for scheme in timer.compiled(group)]
        if measured:
            finalists += [*timer.compiled(fastest_pairs(measured)), fastest_block(measured)]
    if not finalists:
        return None
    block_us = {scheme: timer.rested_block_us(scheme) for scheme in with_and_without_overlap(finalists)}
    block_us |= {scheme: timer.rested_block_us(scheme) for scheme in rivals(winner(block_us))}
    best = winner(block_us)
    return dataclasses.replace(timer.measure(best), block_us=block_us[best])
