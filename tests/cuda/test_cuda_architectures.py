"""Which architecture a call is lowered for: the card's, or the one that the environment names."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from abstract_calls import CALL, abstract_block, needs_nvrtc, planned_block

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import cache, compiler
from jax_marlin_moe.cuda.kernels.align import plan_align


def device_of(capability):
    return lambda backend: [SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [("7.5", "sm_75"), ("8.0", "sm_80"), ("8.9", "sm_89"), ("9.0", "sm_90a"), ("10.0", "sm_100a"), ("12.0", "sm_120a")],
)
def test_the_device_names_the_architecture(monkeypatch, capability, architecture):
    monkeypatch.delenv(compiler.ARCHITECTURE_VARIABLE, raising=False)
    monkeypatch.setattr(jax, "local_devices", device_of(capability))
    assert compiler.target_architecture() == architecture
    assert compiler.compute_capability(architecture) == int(capability.replace(".", ""))


@pytest.mark.parametrize(
    ("named", "architecture"),
    [
        ("sm_80", "sm_80"),
        ("sm_90", "sm_90a"),
        ("sm_120a", "sm_120a"),
        ("compute_75", "compute_75"),
        ("compute_89", "compute_89"),
        ("compute_90", "compute_90a"),
        ("compute_100f", "compute_100f"),
    ],
)
def test_the_environment_names_the_architecture(monkeypatch, named, architecture):
    monkeypatch.setattr(jax, "local_devices", device_of("9.0"))
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, named)
    assert compiler.target_architecture() == architecture
    assert str(compiler.compute_capability(architecture)) in named
    assert compiler.is_virtual(architecture) == named.startswith("compute")


@pytest.mark.parametrize("capability", ["7.0", "99.9"])
def test_a_device_that_the_kernels_are_not_made_for_is_an_error(monkeypatch, lower, capability):
    monkeypatch.setattr(jax, "local_devices", device_of(capability))
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    message = rf"device has compute capability {capability}; it must be one of sm_75, .* set JAX_MARLIN_MOE_CUDA"
    with pytest.raises(ValueError, match=message):
        lower("", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


def test_no_device_and_no_architecture_is_an_error(monkeypatch, lower):
    def no_devices(backend):
        raise RuntimeError("no cuda")

    monkeypatch.setattr(jax, "local_devices", no_devices)
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=r"JAX_MARLIN_MOE_CUDA_ARCH is not set; .* such as sm_90a"):
        lower("", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        *(
            (name, "it must look like sm_90a, or compute_80 for PTX")
            for name in ("90a", "sm_90b", "sm_9", "compute", "compute_", "lto_90", "sm_90 ", "SM_80", "sm_9.0")
        ),
        *((name, "it must be one of sm_75, .*, sm_121, or compute_ in") for name in ("sm_42", "compute_70", "sm_999")),
    ],
)
def test_a_name_that_is_no_architecture_is_an_error(monkeypatch, lower, named, message):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=f"JAX_MARLIN_MOE_CUDA_ARCH is '{named}'; {message}"):
        lower(named, jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "target"), [("compute_75", "sm_75"), ("compute_89", "sm_89"), ("compute_90a", "sm_90a")]
)
def test_a_virtual_architecture_gives_ptx(monkeypatch, architecture, target):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    source = plan_align(12, 5, 8, False, architecture).source
    ptx = compiler.compile_cubin.__wrapped__(source, architecture)
    text = ptx.decode()
    assert text.count("\0") == 1
    assert text.endswith("\0")  # the driver reads up to there
    assert f".target {target}\n" in text
    assert ".entry " in text


@needs_nvrtc
def test_a_block_for_a_virtual_architecture_has_its_tiles(lower):
    """As for the card's own architecture: the same kernels, in a custom call of ours."""
    arguments = abstract_block(33, 2, 256, 128, 8, jnp.float16, scale_dtype=jnp.float16)
    assert lower("compute_86", jmm.fused_moe, *arguments).count(CALL) == 1
    x, gate_up, down, *_ = arguments
    own, virtual = (
        planned_block(x, gate_up, down, top_k=2, architecture=name).source for name in ("sm_86", "compute_86")
    )
    assert own == virtual


@needs_nvrtc
def test_turing_has_no_bfloat16_as_ptx_either(lower):
    with pytest.raises(ValueError, match="x has dtype bfloat16, which compute capability 75 lacks; pass float16"):
        lower("compute_75", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.bfloat16))
