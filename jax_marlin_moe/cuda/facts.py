"""What Python tells a kernel at compile time, by name: facts, and the buffers that its members point to.

A fact `list_length` is `kListLength` in C++, a type `element` is `Element`: each kernel of csrc/cuda takes its facts as
one struct, and reads what it needs by these names. A name that one side lacks does not compile.
"""

import dataclasses
from collections.abc import Mapping

# What a kernel is compiled with: constants, and types by their C++ spelling.
Facts = dict[str, bool | int | str]

# Of the elements of arrays, as facts name them.
ELEMENT_TYPES = {
    "float16": "jmm::Half",
    "bfloat16": "jmm::BFloat",
    "float32": "jmm::Float",
    "float8_e4m3fn": "jmm::Fp8",
    "int8": "jmm::Signed8",
}

# Of a buffer's elements; a pointer to another type does not compile.
_ELEMENTS = {
    "int32": "int32_t",
    "uint8": "unsigned char",
    "float32": "float",
    "float16": "jmm::Half",
    "bfloat16": "jmm::BFloat",
    "float8_e4m3fn": "jmm::Fp8",
    "int8": "jmm::Signed8",
}


@dataclasses.dataclass(frozen=True)
class LayerOffset:
    """Where the array of one layer begins in a stack of them.

    Attributes:
        index: the buffer with the number of the layer, one int32; clamped to the layers there are.
        layers: of the stack.
        elements: of one layer.
    """

    index: int
    layers: int
    elements: int


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What a member of a kernel points to.

    Attributes:
        buffer: its place among the call's buffers (operands, then results).
        dtype: of its elements.
        written: whether the kernel writes there.
        element: the kernel's name for the type of the elements, where the member points to their bytes.
        layer: where the buffer is a stack, which of its layers the member points to.
        offset: bytes of the buffer, or of each layer, that lie before what the member points to.
    """

    buffer: int
    dtype: str
    written: bool = False
    element: str = ""
    layer: LayerOffset | None = None
    offset: int = 0

    @property
    def cpp(self) -> str:
        """The C++ type of the pointer."""
        return f"{'' if self.written else 'const '}{'unsigned char' if self.element else self.cpp_element}*"

    @property
    def cpp_element(self) -> str:
        """The C++ type of the elements."""
        return _ELEMENTS[self.dtype]


@dataclasses.dataclass(frozen=True)
class TokenCount:
    """A member that holds, by value, how many tokens a call has; it may be fewer than the kernel was compiled for."""

    cpp = "int64_t"
    layer = None


Bound = Pointer | TokenCount | None  # what a member is initialised with


def token_count(is_counted: bool) -> dict[str, Bound]:
    """The member `count` of kernels that may take it (token_count.cuh), where it is not a constant."""
    return {"count": TokenCount()} if is_counted else {}


def optional(buffer: int | None, dtype: str) -> Pointer | None:
    """A pointer to read from, or None where there is no buffer."""
    return None if buffer is None else Pointer(buffer, dtype)


def nested(member: str, pointers: Mapping[str, Bound]) -> dict[str, Bound]:
    """The pointers of a member that is a struct."""
    return {f"{member}.{name}": pointer for name, pointer in pointers.items()}


def constant(name: str) -> str:
    """The C++ constant of a fact: `kListLength` for "list_length"."""
    return f"k{_camel_case(name)}"


def render_struct(name: str, facts: Facts) -> str:
    """A C++ struct of the facts: constants for truth values and integers, types for strings."""
    lines = [f"struct {name} {{"]
    for fact, value in facts.items():
        if isinstance(value, str):
            lines.append(f"  using {_camel_case(fact)} = {value};")
        elif isinstance(value, bool):
            lines.append(f"  static constexpr bool {constant(fact)} = {str(value).lower()};")
        else:
            kind = "int" if -(2**31) <= value < 2**31 else "int64_t"
            lines.append(f"  static constexpr {kind} {constant(fact)} = {value};")
    return "\n".join([*lines, "};"])


def render_members(pointers: Mapping[str, Bound]) -> str:
    """The initialiser of a kernel, member by member in their order: "epilogue.out" is the member `out` of `epilogue`.

    Each pointer is bound to the parameter of `parameter_name`; one that is None, to nothing.
    """
    members: dict[str, list[str]] = {}
    for path, pointer in pointers.items():
        outer, _, inner = path.rpartition(".")
        value = "nullptr" if pointer is None else parameter_name(path)
        members.setdefault(outer or inner, []).append(f".{inner} = {value}")
    nested = [
        bound[0] if bound[0].startswith(f".{name} ") else f".{name} = {{{', '.join(bound)}}}"
        for name, bound in members.items()
    ]
    return f"{{{', '.join(nested)}}}"


def parameter_name(path: str) -> str:
    """The parameter of the entry point that a member is bound to."""
    return path.replace(".", "_")


def _camel_case(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))
