"""Builds the fuzzer of the CPU handlers under sanitizers.

    python cpu_handlers_fuzz.py SANITIZERS FOLDER

builds it with -fsanitize=SANITIZERS, kernels of every instruction set included, and prints the path of the program.
"""

import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
HANDLERS = ("align_cpu", "moe_gemm_cpu", "fused_moe_cpu", "matrix_operands")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
INSTRUCTION_SETS = {
    "gemm_avx2": ("-mavx2", "-mfma", "-mf16c"),
    "gemm_avx512": AVX512,
    "gemm_avx512bf16": (*AVX512, "-mavx512bf16"),
}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(sanitizers: str, folder: pathlib.Path, *, csrc: pathlib.Path = CSRC, only_portable: bool = False):
    """Compiles the handlers of `csrc` and the fuzzer into `folder`; returns the program's path."""
    jaxlib = importlib.util.find_spec("jaxlib")
    assert jaxlib is not None
    assert jaxlib.origin is not None
    include = pathlib.Path(jaxlib.origin).parent / "include"
    flags = ["-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    flags += [f"-fsanitize={sanitizers}", f"-I{csrc}", "-isystem", str(include), "-pthread"]
    sources = [HERE / "cpu_handlers_fuzz.cc", *(csrc / "ffi" / f"{name}.cc" for name in HANDLERS)]
    sources += [path for path in sorted((csrc / "cpu").glob("*.cc")) if path.stem not in INSTRUCTION_SETS]
    if only_portable:
        sources.append(HERE / "portable_panels.cc")
    elif platform.machine() in ("x86_64", "AMD64"):
        sources += [csrc / "cpu" / f"{name}.cc" for name in INSTRUCTION_SETS]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: pathlib.Path) -> str:
        target = folder / f"{source.stem}.o"
        extra = () if only_portable else INSTRUCTION_SETS.get(source.stem, ())
        command = [str(compiler()), *flags, *extra, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "cpu_handlers_fuzz"
    subprocess.run([str(compiler()), *flags, *objects, "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    print(build(sys.argv[1], pathlib.Path(sys.argv[2])))
