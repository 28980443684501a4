"""The tensors of a model beside its experts: any tensor by name, and linears that may be quantised."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.matrix import find_matrix, load_matrix
from jax_marlin_moe.checkpoint.pre_quant_scales import SUFFIX
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.schemes import SCHEMES, STACKED_SUFFIXES
from jax_marlin_moe.checkpoint.schemes.plain import plain_suffix, read_plain
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.weights import MarlinWeights

# What safetensors files have as bit patterns for the decoders is a number to everybody else.
_MEANING = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@dataclasses.dataclass(frozen=True)
class ModelTensors:
    """Reads tensors and linears.

    Attributes:
        files: the tensors.
        quantization: what the config says of the quantisation of linears.
    """

    files: TensorFolder
    quantization: Quantization

    def tensor(self, name: str) -> jax.Array:
        """One tensor; as for `Checkpoint.tensor`."""
        self._check_name(name)
        found = self.files.info(name)
        value = self.files.read(name, found.shape, (found.dtype,))
        value = value.view(_MEANING[found.dtype]) if found.dtype in _MEANING else value
        kept = jax.dtypes.canonicalize_dtype(value.dtype)
        if kept != value.dtype:
            narrow = value.astype(kept)
            if kept.kind == "f" or not np.array_equal(narrow, value):
                raise self.files.fault(
                    name, f"has dtype {value.dtype}, which JAX would make {kept}: set jax_enable_x64 to read it"
                )
            value = narrow
        result = jax.block_until_ready(jnp.array(value, copy=True))
        self.files.drop_pages()
        return result

    def linear(self, name: str, *, scaled_input: bool = False) -> MarlinWeights | jax.Array:
        """One linear; as for `Checkpoint.linear`."""
        files, linear = self.files, Linear(name)
        suffix = plain_suffix(files, linear)
        if suffix == ".weight":
            shape = files.info(linear.name(suffix)).shape
            if len(shape) != 2:
                raise files.fault(linear.name(suffix), f"has shape {shape}; that of a linear has two dimensions")
            n, k = shape
            dense = jax.block_until_ready(jnp.array(read_plain(files, linear, suffix, k, n), copy=True)).T
            files.drop_pages()
            return dense
        k, n = self._size(linear)
        matrix = find_matrix(files, [[linear]], k, n, self.quantization, None)
        advice = f"multiply x by tensor({linear.name(SUFFIX)!r}) and pass scaled_input=True"
        return load_matrix(files, matrix, biased=True, scaled_input=True if scaled_input else advice)

    def _size(self, linear: Linear) -> tuple[int, int]:
        """Input and output features of a quantised linear, from its tensors."""
        files = self.files
        for scheme in SCHEMES:
            size = scheme.size(files, linear, self.quantization)
            if size is None or scheme.find(files, linear, *size, self.quantization) is None:
                continue
            if min(size) < 1:
                raise ValueError(f"{files.folder}: {linear.module} has (K, N) = {size}; both must be positive")
            return size
        stacked = next((linear.name(s) for s in STACKED_SUFFIXES if linear.name(s) in files), None)
        if stacked is not None and len(files.info(stacked).shape) > 2:
            raise files.fault(stacked, "holds a stack of experts; load it with load_moe_layer")
        found = sorted(name for name in files.names if name.startswith(f"{linear.module}."))
        if found:
            described = ", ".join(f"{name} {files.info(name).dtype}" for name in found[:6])
            raise ValueError(
                f"{files.file_of(found[0])}: {linear.module} is stored in no way that the loader knows ({described}; "
                f"quant_method {self.quantization.method!r} in {self.quantization.source.name})"
            )
        self._check_name(linear.module)
        raise files.fault(linear.module, f"is a tensor, not a linear; read it as tensor({linear.module!r})")

    def _check_name(self, name: str) -> None:
        """Raises ValueError, with similar names, where there is no such tensor."""
        if name in self.files:
            return
        module = name.rpartition(".")[0] or name
        near = sorted(other for other in self.files.names if other.startswith(f"{name}.") or other.endswith(f".{name}"))
        near = near or sorted(other for other in self.files.names if other.startswith(f"{module}."))
        advice = f"; there are {', '.join(near[:4])}" if near else "; `tensor_names` lists all"
        raise ValueError(f"{self.files.folder} has no tensor {name}{advice}")
