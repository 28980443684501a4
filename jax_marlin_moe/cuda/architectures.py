"""GPU architectures, one row each: what the kernels are compiled for, what a multiprocessor holds, what a card does.

Rates are those of one card per architecture, for the cost model: measured on an H200 for 9.0, and from the vendor's
specifications elsewhere. They say which tiles come first, not how fast a call is.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A compute capability.

    Attributes:
        capability: times ten.
        target: what a card of it is compiled for, with all of its instructions.
        shared_kib: shared memory of a multiprocessor (CUDA C++ programming guide, technical specifications).
        most_shared_kib: the most that one CTA may have; 1 KiB of each CTA is the system's.
        kernels: the GEMM kernels that it has, by the names of their tiles.
        card: the one that the rates are of.
        multiprocessors: of the card.
        cycles_per_microsecond: of its multiprocessors.
        bytes_per_microsecond: that it reads from memory.
        mma_bytes: types of rows of 8 bits that its mma.sync multiplies by an instruction of its own. (ptxas makes e4m3
            products of 16-bit ones for 9.0, 10.0, 10.3 and 11.0.)
        has_clusters: whether CTAs may share K of a tile through each other's shared memory.
    """

    capability: int
    target: str
    shared_kib: int
    most_shared_kib: int
    kernels: tuple[str, ...]
    card: str
    multiprocessors: int
    cycles_per_microsecond: int
    bytes_per_microsecond: float
    mma_bytes: tuple[str, ...] = ()
    has_clusters: bool = False

    @property
    def bytes_per_cycle(self) -> float:
        """A multiprocessor's part of the memory."""
        return self.bytes_per_microsecond / self.multiprocessors / self.cycles_per_microsecond

    def fits_shared_memory(self, size: int, ctas: int) -> bool:
        """Whether a multiprocessor holds that many CTAs of that many bytes; the system takes 1024 more for each."""
        return size <= self.most_shared_kib * 1024 and (size + 1024) * ctas <= self.shared_kib * 1024

    def padding(self, size: int, ctas: int) -> int:
        """Bytes that must be added to a CTA's shared memory so that a multiprocessor holds no more than that many."""
        least = self.shared_kib * 1024 // (ctas + 1) - 1024 + 16
        return max(0, min(least, self.most_shared_kib * 1024) - size)


_MMA = ("mma",)
_BYTES = ("mma", "mma_bytes")
_INT8, _BOTH = ("int8",), ("int8", "float8_e4m3fn")
_ROWS = (
    Architecture(75, "sm_75", 64, 64, _MMA, "T4", 40, 1590, 0.32e6),
    Architecture(80, "sm_80", 164, 163, _BYTES, "A100 80 GB", 108, 1410, 2.0e6, _INT8),
    Architecture(86, "sm_86", 100, 99, _BYTES, "RTX 3090", 82, 1695, 0.94e6, _INT8),
    Architecture(87, "sm_87", 164, 163, _BYTES, "Jetson AGX Orin", 16, 1300, 0.2e6, _INT8),
    Architecture(89, "sm_89", 100, 99, _BYTES, "RTX 4090", 128, 2520, 1.0e6, _BOTH),
    Architecture(90, "sm_90a", 228, 227, ("mma", "wgmma", "wgmma_bytes"), "H200", 132, 1900, 4.65e6, has_clusters=True),
    Architecture(100, "sm_100a", 228, 227, _BYTES, "B200", 148, 1965, 8.0e6, _INT8),
    Architecture(103, "sm_103a", 228, 227, _BYTES, "B300", 148, 1920, 8.0e6, _INT8),
    Architecture(110, "sm_110", 228, 227, _BYTES, "Jetson Thor", 20, 1575, 0.27e6, _INT8),
    Architecture(120, "sm_120a", 100, 99, _BYTES, "RTX 5090", 170, 2407, 1.79e6, _BOTH),
    Architecture(121, "sm_121a", 100, 99, _BYTES, "GB10", 48, 2418, 0.27e6, _BOTH),
)

ARCHITECTURES = {row.capability: row for row in _ROWS}


@functools.cache
def get_architecture(capability: int) -> Architecture:
    """The row of a compute capability, times ten, or of the latest known one before it."""
    known = max((known for known in ARCHITECTURES if known <= capability), default=min(ARCHITECTURES))
    return ARCHITECTURES[known]
