"""The weight formats: one row each, and the facts that the rest of the package reads from the row.

Nothing else switches on a format's name. Numerics are those of the project's format contract: a weight is
`(code - zero) * scale`, scaled in float32.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What the codes of a packed weight mean.

    Attributes:
        name: the name in the registry, also the `format` attribute of the custom calls.
        bits: width of a code.
        zero_point: the zero baked into the codes, or None when each group stores its own integer zero points.
        group_sizes: the rows of K that may share a scale; a single group over all of K is always allowed.
        scale_dtypes: the dtypes that scales may have.
    """

    name: str
    bits: int
    zero_point: int | None
    group_sizes: tuple[int, ...]
    scale_dtypes: tuple[str, ...]

    @property
    def codes_per_word(self) -> int:
        """Codes in one int32 word."""
        return 32 // self.bits

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def has_zero_points(self) -> bool:
        """Whether each group stores integer zero points."""
        return self.zero_point is None


_ROWS = (
    WeightFormat("int4", 4, 8, (16, 32, 64, 128), ("float16", "bfloat16")),
    WeightFormat("int4_zp", 4, None, (16, 32, 64, 128), ("float16", "bfloat16")),
)

FORMATS: dict[str, WeightFormat] = {row.name: row for row in _ROWS}

ACTIVATION_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def get_format(name: str) -> WeightFormat:
    """The registry row called `name`; raises ValueError with the known names otherwise."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
