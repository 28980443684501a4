"""Builds the fuzzer of the CPU handlers under sanitizers.

    PYTHONPATH=tests python -m native.cpu_handlers_fuzz SANITIZERS FOLDER

builds it with -fsanitize=SANITIZERS, with the kernels of every instruction set that this processor runs, and prints
the path of the program.
"""

import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from native.processor import runs

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
FLAGS = {
    "gemm_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "gemm_avx512": AVX512,
    "gemm_avx512bf16": (*AVX512, "-mavx512bf16"),
    "transposed_avx2": ("-mavx2", "-mfma"),
    "transposed_avx512": AVX512,
}
KERNELS = {
    "avx2": ("gemm_avx2", "transposed_avx2"),
    "avx512": ("gemm_avx512", "transposed_avx512"),
    "avx512bf16": ("gemm_avx512bf16",),
}
# Half a minute of compiling for each of those that no call would reach.
COMPILED = tuple(kernel for kernel in KERNELS if platform.machine() in ("x86_64", "AMD64") and runs(kernel))


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def sources(folder: pathlib.Path, kernels: Sequence[str] = COMPILED) -> list[pathlib.Path]:
    """The fuzzer, the handlers and what they call, with `kernels` beside the portable ones; writes into `folder`."""
    # The handlers instantiate the same templates: as one translation unit they compile in less than half the time.
    folder.mkdir(parents=True, exist_ok=True)
    handlers = folder / "handlers.cc"
    handlers.write_text("".join(f'#include "{path}"\n' for path in sorted((CSRC / "ffi").glob("*_cpu.cc"))))
    found = [handlers, HERE / "cpu_handlers_fuzz.cc", CSRC / "ffi" / "matrix_operands.cc"]
    found += [path for path in sorted((CSRC / "cpu").glob("*.cc")) if path.stem not in FLAGS]
    found += [CSRC / "cpu" / f"{name}.cc" for kernel in kernels for name in KERNELS[kernel]]
    return [*found, HERE / "portable_panels.cc"]


def _flags(sanitizers: str) -> list[str]:
    jaxlib = importlib.util.find_spec("jaxlib")
    assert jaxlib is not None
    assert jaxlib.origin is not None
    include = pathlib.Path(jaxlib.origin).parent / "include"
    # -Og: the FFI's templates compile twice as fast as with -O1.
    flags = ["-std=c++17", "-Og", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    return [*flags, f"-fsanitize={sanitizers}", f"-I{CSRC}", "-isystem", str(include), "-pthread"]


def compile_objects(
    sanitizers: str, folder: pathlib.Path, files: Sequence[pathlib.Path], kernels: Sequence[str] = COMPILED
) -> dict[str, pathlib.Path]:
    """Compiles `files` into `folder`; returns the object of each file's stem."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = FLAGS | {"portable_panels": tuple(f"-DWITH_{kernel.upper()}" for kernel in kernels)}

    def compiled(source: pathlib.Path) -> pathlib.Path:
        target = folder / f"{source.stem}.o"
        extra = flags.get(source.stem, ())
        command = [str(compiler()), *_flags(sanitizers), *extra, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((file.stem for file in files), pool.map(compiled, files), strict=True))


def link(sanitizers: str, program: pathlib.Path, objects: Iterable[pathlib.Path]) -> pathlib.Path:
    """Links the fuzzer; returns its path."""
    command = [str(compiler()), *_flags(sanitizers), *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def main(sanitizers: str, folder: pathlib.Path) -> None:
    objects = compile_objects(sanitizers, folder, sources(folder))
    print(link(sanitizers, folder / "cpu_handlers_fuzz", objects.values()))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
