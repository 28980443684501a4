"""The quantisation schemes that the loader knows, one file each, and which of them a linear is stored in.

A scheme's file has all of it: how its words are unpacked, how one linear is decoded, checks of values, the public
importer of stacks in memory, the reader of linears on disk, and the keys of its configs.
"""

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.schemes.awq import AwqStorage, from_awq
from jax_marlin_moe.checkpoint.schemes.compressed_tensors import PackQuantizedStorage, from_compressed_tensors
from jax_marlin_moe.checkpoint.schemes.fp4 import (
    Mxfp4Storage,
    Nvfp4Storage,
    from_mxfp4,
    from_nvfp4,
    from_tensorrt_nvfp4,
)
from jax_marlin_moe.checkpoint.schemes.fp8 import Fp8Storage, from_fp8
from jax_marlin_moe.checkpoint.schemes.gptq import GptqStorage, from_gptq
from jax_marlin_moe.checkpoint.schemes.hqq import HqqStorage, from_hqq
from jax_marlin_moe.checkpoint.schemes.int_quantized import IntQuantizedStorage, from_int_quantized
from jax_marlin_moe.checkpoint.schemes.modelopt_int import ModelOptAwqStorage, from_modelopt_awq
from jax_marlin_moe.checkpoint.schemes.plain import PlainStorage, Target, plain_suffix
from jax_marlin_moe.checkpoint.schemes.storage import Scheme, Storage
from jax_marlin_moe.checkpoint.schemes.w4afp8 import W4AFp8Storage, from_w4afp8
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.qarray import from_qarray

# The public importers, which the package exports as they are listed here.
__all__ = [
    "from_awq",
    "from_compressed_tensors",
    "from_fp8",
    "from_gptq",
    "from_hqq",
    "from_int_quantized",
    "from_modelopt_awq",
    "from_mxfp4",
    "from_nvfp4",
    "from_qarray",
    "from_tensorrt_nvfp4",
    "from_w4afp8",
]

# The tensors of a linear decide which scheme it is, so no two schemes may match the same tensors.
SCHEMES: tuple[type[Scheme], ...] = (
    AwqStorage,
    GptqStorage,
    PackQuantizedStorage,
    IntQuantizedStorage,
    ModelOptAwqStorage,
    Nvfp4Storage,
    Mxfp4Storage,
    Fp8Storage,
    W4AFp8Storage,
    HqqStorage,
)
METHODS = {method.name: method for scheme in SCHEMES for method in scheme.methods}
_WITH_PLAIN: tuple[type[Storage], ...] = (*SCHEMES, PlainStorage)
# `stacked`, `broken` and `marks` of all schemes.
STACKED_SUFFIXES = tuple(suffix for scheme in _WITH_PLAIN for suffix in scheme.stacked)
BROKEN = {suffix: fault for scheme in SCHEMES for suffix, fault in scheme.broken.items()}
MARKS = tuple({suffix: None for scheme in SCHEMES for suffix in scheme.marks})


def find_storage(
    files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization, target: Target | None
) -> Storage:
    """How a linear (k, n) is stored, decided by the tensors that exist.

    Raises:
        ValueError: it is plain and there is no target, or its tensors are of no known scheme.
    """
    if plain_suffix(files, linear) is not None:
        if target is None:
            name = linear.name(plain_suffix(files, linear) or "")
            raise files.fault(
                name,
                f"is plain {files.info(name).dtype}; say what becomes of it: pass quantize=, the name of a "
                "format ('bf16' and 'fp16' keep 16 bits); what is quantised stays as it is",
            )
        return PlainStorage.to(target, files, linear, k)
    for scheme in SCHEMES:
        storage = scheme.find(files, linear, k, n, quantization)
        if storage is not None:
            return storage
    found = sorted(name for name in files.names if name.startswith((f"{linear.module}.", f"{linear.module}_")))
    if not found:
        raise ValueError(f"{files.folder} has no tensor {linear.module}.*")
    described = ", ".join(f"{name} {files.info(name).dtype}" for name in found[:6])
    if linear.name(".B") in files:
        described = f"Marlin-format files, {described}"
    raise ValueError(
        f"{files.file_of(found[0])}: {linear.module} is stored in no way that the loader knows ({described}; "
        f"quant_method {quantization.method!r} in {quantization.source.name}); it knows {_supported()}"
    )


def _supported() -> str:
    return ", ".join(scheme.known_as for scheme in _WITH_PLAIN)
