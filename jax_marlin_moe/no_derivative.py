"""What has no derivative says so where one is used, and not before.

JAX differentiates a call before it knows what becomes of the result. A rule that raised would refuse a frozen block
behind `jax.lax.stop_gradient` too. So it returns tangents that nothing can be made of: unused ones are dropped with all
others, and the use of one raises where it is transposed, lowered or computed.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec


class NoDerivative(Exception):
    """Raised by the `jvp` of an op that has no derivative here; `error` is what whoever uses one gets."""

    def __init__(self, error: TypeError | NotImplementedError) -> None:
        super().__init__(str(error))
        self.error = error


def refused_tangents(
    error: TypeError | NotImplementedError, results: Sequence[Any], moving: Sequence[jax.Array]
) -> list[Any]:
    """Tangents of results that raise `error` where they are used; `moving` are the tangents that they depend on."""
    types = [jax.typeof(result).to_tangent_aval() for result in results]
    floats = tuple(type_ for type_ in types if type_.dtype != jax.dtypes.float0)
    refused = iter(_refused_p.bind(*moving, kind=type(error), message=str(error), types=floats))
    return [ad.Zero(type_) if type_.dtype == jax.dtypes.float0 else next(refused) for type_ in types]


def _raise(*_: Any, kind: type[Exception], message: str, **__: Any) -> Any:
    raise kind(message)


def _transposed(cotangents, *tangents, **params):
    if any(not isinstance(cotangent, ad.Zero) for cotangent in cotangents):
        _raise(**params)
    return [None] * len(tangents)


def _differentiated(primals, tangents, **params):
    moving = [tangent for tangent in tangents if not isinstance(tangent, ad.Zero)]
    return _refused_p.bind(*primals, **params), _refused_p.bind(*moving, **params)


def _batched(leaves, dims, *, types, **params):
    size = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)
    batched = tuple(
        type_.update(
            shape=(size, *type_.shape),
            sharding=NamedSharding(type_.sharding.mesh, PartitionSpec(None, *type_.sharding.spec)),
        )
        for type_ in types
    )
    return _refused_p.bind(*leaves, types=batched, **params), [0] * len(types)


_refused_p = Primitive("no_derivative")
_refused_p.multiple_results = True
_refused_p.def_impl(_raise)
_refused_p.def_abstract_eval(lambda *_, types, **__: list(types))
mlir.register_lowering(_refused_p, lambda _, *tangents, **params: _raise(**params))
ad.primitive_jvps[_refused_p] = _differentiated
ad.primitive_transposes[_refused_p] = _transposed
batching.primitive_batchers[_refused_p] = _batched
