"""Compiled programs: the record that the handler reads, and what the handler says to one that lies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler, program
from jax_marlin_moe.cuda.facts import Pointer, TokenCount
from jax_marlin_moe.cuda.kernels.align import plan_align

KERNEL = program.Kernel(
    name="jmm_body_m3",
    headers=("b.cuh",),
    body="Body<Facts>",
    structs={"Facts": {"list_length": 2**31, "experts": 3, "mapped": True, "element": "jmm::Half"}},
    constants={"Facts::kExperts": 3},
    pointers={"ids": Pointer(0, "int32"), "bias": None, "epilogue.out": Pointer(2, "float32", written=True)},
    threads=64,
    shared_bytes=0,
    max_ctas=7,
    ctas_per_sm=2,
    overlaps_predecessor=True,
)
BUFFERS = [
    jax.ShapeDtypeStruct((5, 6), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.float16),
    jax.ShapeDtypeStruct((0,), jnp.float32),
]


def test_the_contract_is_the_documented_record():
    later = Pointer(0, "int32", offset=24)
    other = dataclasses.replace(KERNEL, shared_bytes=1024, ctas_per_sm=0, cluster=4)
    other = dataclasses.replace(other, pointers=KERNEL.pointers | {"ids": later})
    fields = program._contract(BUFFERS, [KERNEL, other], None)
    assert fields.dtype == np.int64
    assert fields.tolist() == [
        *(5, 3, 2),  # version, buffers, kernels
        *(4, 2, 0, 5, 6),  # int32 [5, 6]
        *(10, 0, 0),  # float16 []
        *(11, 1, 0, 0),  # float32 [0]
        *(64, 0, 7, 2, 1, 1, 2, 0, 0, 2, 0),
        *(64, 1024, 7, 0, 4, 1, 2, 0, 24, 2, 0),
    ]


def test_launches_of_one_kernel_are_one_entry_point():
    later = dataclasses.replace(KERNEL, pointers=KERNEL.pointers | {"ids": Pointer(0, "int32", offset=24)})
    assert program.render([KERNEL, later]) == program.render([KERNEL])
    with pytest.raises(AssertionError, match="two kernels have the name jmm_body_m3"):
        program.render([KERNEL, dataclasses.replace(KERNEL, threads=128)])


def test_the_contract_of_counted_rows_has_their_most_and_who_takes_the_number():
    pointers = {**KERNEL.pointers, "count": TokenCount()}
    counting = dataclasses.replace(KERNEL, pointers=pointers)
    fields = program._contract(BUFFERS, [counting], program.CountedRows(tokens=5, most=8, rows_of_token={0: 1, 2: 3}))
    assert fields.tolist() == [
        *(5, 3, 1),
        *(4, 2, 1, 8, 6),  # int32 [tokens, 6], of 8 tokens at most
        *(10, 0, 0),
        *(11, 1, 3, 24),  # float32 [3 * tokens]
        *(64, 0, 7, 2, 1, 1, 3, 0, 0, 2, 0, 3, 0),  # the last parameter is the number of tokens
    ]
    source = program.render([counting])
    assert "jmm_body_m3(const int32_t* ids, float* epilogue_out, int64_t count)" in source
    assert ".epilogue = {.out = epilogue_out}, .count = count}.run();" in source


def test_grids_are_whole_clusters():
    assert KERNEL.ctas(132) == 7
    assert KERNEL.ctas(3) == 6
    pairs = dataclasses.replace(KERNEL, max_ctas=1000, cluster=4)
    assert pairs.ctas(57) == 112
    assert "__cluster_dims__(4, 1, 1) jmm_body_m3(" in program.render([pairs])


def test_the_source_has_an_entry_point_for_each_kernel():
    shared = dataclasses.replace(KERNEL, name="jmm_other", headers=("b.cuh", "a.cuh"), shared_bytes=1024)
    source = program.render([KERNEL, shared], "struct Extra {};")
    assert source.startswith('#include "a.cuh"\n#include "b.cuh"\nstruct Extra {};\n')
    assert "jmm_body_m3(const int32_t* ids, float* epilogue_out)" in source
    assert "__launch_bounds__(64, 2) jmm_other(" in source
    members = "{.ids = ids, .bias = nullptr, .epilogue = {.out = epilogue_out}}"
    assert f"of_jmm_body_m3::Kernel{members}.run();" in source
    assert f"of_jmm_other::Kernel{members}.run(shared_bytes);" in source


def test_facts_and_what_follows_from_them_are_named_in_the_source():
    source = program.render([dataclasses.replace(KERNEL, shared_bytes=1024)])
    facts = (
        "struct Facts {\n"
        "  static constexpr int64_t kListLength = 2147483648;\n"
        "  static constexpr int kExperts = 3;\n"
        "  static constexpr bool kMapped = true;\n"
        "  using Element = jmm::Half;\n"
        "};\n"
        "using Kernel = jmm::Body<Facts>;\n"
    )
    assert facts in source
    for what, value in {
        "Kernel::kThreads": 64,
        "Kernel::kMaxCtas": 7,
        "Kernel::kSharedBytes": 1024,
        "Kernel::kCtasPerSm": 2,
        "Kernel::kCluster": 1,
        "Facts::kExperts": 3,
        "sizeof(Kernel) / sizeof(void*)": 3,
    }.items():
        assert f'static_assert({what} == {value}, "{what} of the plan");' in source


def test_a_contract_names_the_pointer_that_was_planned_for_another_buffer():
    other = dataclasses.replace(KERNEL, pointers=KERNEL.pointers | {"ids": Pointer(1, "int32")})
    with pytest.raises(RuntimeError, match="ids of jmm_body_m3 is buffer 1, which has dtype float16; it must be int32"):
        program._contract(BUFFERS, [other], None)
    with pytest.raises(RuntimeError, match="ids of jmm_body_m3 is buffer 0, which the call does not have"):
        program._contract([None, *BUFFERS[1:]], [KERNEL], None)


@pytest.mark.parametrize(
    ("image", "contract", "kernels"),
    [(b"", b"", ""), (b"a", b"bc", "jmm_d"), (bytes(range(256)), b"\0" * 16, "jmm_align_m8 jmm_combine_m1")],
)
def test_the_fingerprint_is_fnv_1a_over_all_three(image, contract, kernels):
    value = 0xCBF29CE484222325
    for byte in image + contract + kernels.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    assert native.fingerprint(image, contract, kernels) % 2**64 == value


# The handler, on a device.

IDS = np.asarray([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], np.int32)
LIST_LENGTH, BLOCKS = 12 + 5 * 7, 6
RESULTS = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((LIST_LENGTH,), (BLOCKS,), (1,))]


def alignment_program(architecture=None):
    """A small real program: operands, machine code and contract."""
    operands = [jnp.asarray(IDS), jnp.zeros(0, jnp.int32)]
    architecture = architecture or compiler.target_architecture()
    plan = plan_align(IDS.size, 5, 8, False, architecture)
    cubin = compiler.compile_cubin(plan.source, architecture)
    return (
        operands,
        np.frombuffer(cubin, np.uint8),
        program._contract([*operands, *RESULTS], plan.kernels, plan.counted),
    )


def attributes_of(cubin, contract, kernels="jmm_align_m8"):
    """Those of a call, with the fingerprint of what is passed."""
    fingerprint = np.int64(native.fingerprint(cubin.tobytes(), contract.tobytes(), kernels))
    return {"cubin": cubin, "contract": contract, "kernels": kernels, "fingerprint": fingerprint}


def execute(operands, results=RESULTS, **attributes):
    call = jax.ffi.ffi_call(native.TARGETS["program", "cuda"], results, vmap_method=None)
    with jax.default_device(jax.devices("cuda")[0]):
        return jax.block_until_ready(jax.jit(lambda *arrays: call(*arrays, **attributes))(*operands))


@pytest.mark.gpu
def test_a_program_that_agrees_runs():
    operands, cubin, contract = alignment_program()
    outputs = execute(operands, **attributes_of(cubin, contract))
    assert outputs[1].tolist() == [1, 2, 3, 4, -1, -1]
    assert outputs[2].tolist() == [32]


@pytest.mark.gpu
@pytest.mark.parametrize("corrupted", ["cubin", "contract", "kernels", "fingerprint"])
def test_a_corrupted_program_is_refused(corrupted):
    """Also where the undamaged one, whose fingerprint it bears, is loaded."""
    operands, cubin, contract = alignment_program()
    attributes = attributes_of(cubin, contract)
    execute(operands, **attributes)
    if corrupted == "fingerprint":
        attributes[corrupted] = attributes[corrupted] ^ np.int64(1)
    elif corrupted == "kernels":
        attributes[corrupted] = "jmm_align_m9"
    else:
        attributes[corrupted] = attributes[corrupted].copy()
        attributes[corrupted][-1] ^= 1
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*do not match their fingerprint"):
        execute(operands, **attributes)


def at(index, value):
    def change(contract):
        contract = contract.copy()
        contract[index] = value
        return contract

    return change


MALFORMED = {
    "another version": at(0, program._CONTRACT_VERSION + 1),
    "no buffers": at(1, 0),
    "too many buffers": at(1, 65),
    "one buffer more": at(1, 6),
    "no kernels": at(2, 0),
    "too many kernels": at(2, 17),
    "a type that is none": at(3, -1),
    "a rank past all": at(4, 9),
    "a negative number of rows": at(5, -1),
    "a negative extent": at(6, -1),
    "a kernel more": at(2, 2),
    "empty": lambda contract: contract[:0],
    "cut short": lambda contract: contract[:-1],
    "too long": lambda contract: np.append(contract, 0),
    "a parameter past the buffers": at(-2, 5),
    "a negative parameter": at(-2, -1),
    "a parameter past its buffer": at(-1, 4),
    "a parameter before its buffer": at(-1, -1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_contract_is_refused(case):
    operands, cubin, contract = alignment_program()
    contract = MALFORMED[case](contract)
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*contract is malformed or of another version"
    ):
        execute(operands, **attributes_of(cubin, contract))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 1024, "was compiled for 256 threads, the contract asks for 1024"),
        (0, 128, "was compiled for 256 threads, the contract asks for 128"),
        (1, 1 << 20, "asks for 1048576 bytes of shared memory, a block of this device has at most"),
        (4, 2, "has fewer blocks on this device than a cluster, 2"),
    ],
)
def test_a_launch_for_which_the_kernel_was_not_compiled_is_refused(field, value, message):
    operands, cubin, contract = alignment_program()
    first = len(contract) - 8 - 7  # four parameters of two fields; seven fields precede them
    assert contract[first] == 256
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*kernel jmm_align_m8 {message}"):
        execute(operands, **attributes_of(cubin, at(first + field, value)(contract)))


@pytest.mark.gpu
def test_parameters_are_counted():
    operands, cubin, contract = alignment_program()
    fewer = contract[:-2].copy()
    fewer[-7] = 3  # of three that are left
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*has 4 parameters, the contract lists 3"):
        execute(operands, **attributes_of(cubin, fewer))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["", "jmm_align_m8 ", "jmm_align_m8 jmm_align_m8", "jmm-align"])
def test_kernels_must_be_one_symbol_each(kernels):
    operands, cubin, contract = alignment_program()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*it must be 1 symbols"):
        execute(operands, **attributes_of(cubin, contract, kernels))


@pytest.mark.gpu
def test_what_is_no_machine_code_is_refused():
    operands, _, contract = alignment_program()
    garbage = np.arange(4096, dtype=np.int64).astype(np.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*cannot be loaded on this device"):
        execute(operands, **attributes_of(garbage, contract))


@pytest.mark.gpu
def test_machine_code_of_another_architecture_is_refused():
    other = "sm_75" if compiler.target_architecture() != "sm_75" else "sm_90a"
    operands, cubin, contract = alignment_program(other)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*compiled for another architecture"):
        execute(operands, **attributes_of(cubin, contract))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ([np.zeros((5, 3), np.int32), np.zeros(0, np.int32)], r"buffer 0 is dtype code 4 \[5, 3\].* \[4, 3\]"),
        ([np.zeros((4, 3), np.float32), np.zeros(0, np.int32)], r"buffer 0 is dtype code 11"),
        ([np.zeros(12, np.int32), np.zeros(0, np.int32)], r"buffer 0 is dtype code 4 \[12\]"),
        ([np.zeros((4, 3), np.int32)], "the call has 4 buffers, its kernels were compiled for 5"),
        ([np.zeros((4, 3), np.int32)] + 2 * [np.zeros(0, np.int32)], "the call has 6 buffers"),
    ],
)
def test_operands_that_disagree_are_refused(operands, message):
    _, cubin, contract = alignment_program()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        execute(operands, **attributes_of(cubin, contract))


@pytest.mark.gpu
def test_results_that_disagree_are_refused():
    operands, cubin, contract = alignment_program()
    results = [jax.ShapeDtypeStruct((LIST_LENGTH - 8,), jnp.int32), *RESULTS[1:]]
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*buffer 2"):
        execute(operands, results, **attributes_of(cubin, contract))


@pytest.mark.gpu
@pytest.mark.parametrize("missing", ["cubin", "contract", "kernels", "fingerprint"])
def test_attributes_that_are_missing_are_an_error(missing):
    operands, cubin, contract = alignment_program()
    attributes = attributes_of(cubin, contract)
    del attributes[missing]
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{missing}|attributes"):
        execute(operands, **attributes)


@pytest.mark.gpu
def test_one_program_serves_many_calls():
    """In a command buffer too: a chain of calls, which XLA captures and replays."""
    operands, cubin, contract = alignment_program()
    attributes = attributes_of(cubin, contract)
    call = jax.ffi.ffi_call(native.TARGETS["program", "cuda"], RESULTS, vmap_method=None)

    @jax.jit
    def chain(ids, absent):
        for _ in range(8):
            owners = call(ids, absent, **attributes)[1]
            ids = (ids + owners[0]) % 5
        return ids

    with jax.default_device(jax.devices("cuda")[0]):
        for _ in range(3):
            ids = IDS
            for _ in range(8):
                ids = (ids + ids.min()) % 5  # the first block's expert is the least that was chosen
            np.testing.assert_array_equal(chain(*operands), ids)
