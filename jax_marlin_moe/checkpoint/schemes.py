"""The quantisation schemes that the loader knows, and which of them a linear is stored in."""

from jax_marlin_moe.checkpoint.awq import AwqStorage
from jax_marlin_moe.checkpoint.compressed_tensors import PackQuantizedStorage
from jax_marlin_moe.checkpoint.fp4 import Mxfp4Storage, Nvfp4Storage
from jax_marlin_moe.checkpoint.fp8 import Fp8Storage
from jax_marlin_moe.checkpoint.gptq import GptqStorage
from jax_marlin_moe.checkpoint.hqq import HqqStorage
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.plain import PlainStorage, Target, plain_suffix
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.storage import Storage
from jax_marlin_moe.checkpoint.tensors import TensorFolder

# The tensors decide which one it is, so no two of them know the same tensors.
SCHEMES: tuple[type[Storage], ...] = (
    AwqStorage,
    GptqStorage,
    PackQuantizedStorage,
    Nvfp4Storage,
    Mxfp4Storage,
    Fp8Storage,
    HqqStorage,
)

_SUPPORTED = (
    "AutoAWQ gemm, GPTQ, compressed-tensors (pack-quantized, nvfp4-pack, mxfp4-pack, FP8), ModelOpt NVFP4 and FP8, "
    "MXFP4, FP8 (blocks, channels, tensor), MXFP8, HQQ, and plain weights with quantize="
)


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
                f"is plain {files.info(name).dtype}; the loader needs quantised experts: pass quantize=, the name of a "
                "format for what is plain; what is quantised stays as it is",
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
        f"quant_method {quantization.method!r} in {quantization.source.name}); it knows {_SUPPORTED}"
    )
