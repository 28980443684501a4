"""Numbers of layers and experts in the names of tensors: each belongs to one prefix."""

from jax_marlin_moe.checkpoint.tensors import TensorFolder

_DIGITS = 9


def claim_number(found: dict[int, str], files: TensorFolder, name: str, number: str, prefix: str) -> None:
    """Enters the prefix of a layer or an expert under its number; raises ValueError where another prefix has it."""
    if len(number) > _DIGITS:
        raise files.fault(name, f"has a number of {len(number)} digits in its name; at most {_DIGITS} are allowed")
    other = found.setdefault(int(number), prefix)
    if other != prefix:
        raise ValueError(
            f"{files.folder} has tensors {other}* and {prefix}*, both of number {int(number)}; there must be one of "
            "them: remove the copy that does not count"
        )
