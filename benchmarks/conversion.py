"""Time and peak memory of converting and loading a checkpoint of real size.

python -m benchmarks.conversion --out benchmarks/results/cpu/conversion.json

Writes a synthetic compressed-tensors checkpoint with the expert shapes of Qwen3-30B-A3B (128 experts, H 2048, I 768,
4 bit, groups of 128) into a scratch folder, converts it and loads it both ways, each in a process of its own. "peak" is
the largest resident memory above that of the process with JAX started, over the bytes of one packed layer.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.record import current_commit, recorded_command

EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 128, 2048, 768, 128
_CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
    "num_experts_per_tok": 8, "norm_topk_prob": True,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}}},
    },
}  # fmt: skip


def write_checkpoint(folder: pathlib.Path, layers: int) -> None:
    """One file per layer and an index, as published models have them."""
    rng = np.random.default_rng(0)
    weight_map = {}
    for layer in range(layers):
        block, tensors = f"model.layers.{layer}.mlp", {}
        for e in range(EXPERTS):
            for name, n, k in (
                ("gate_proj", INTERMEDIATE, HIDDEN),
                ("up_proj", INTERMEDIATE, HIDDEN),
                ("down_proj", HIDDEN, INTERMEDIATE),
            ):
                module = f"{block}.experts.{e}.{name}"
                words = rng.integers(-(2**31), 2**31, (n, k // 8), dtype=np.int32)
                tensors[f"{module}.weight_packed"] = words
                tensors[f"{module}.weight_scale"] = np.full((n, k // GROUP), 0.01, ml_dtypes.bfloat16)
                tensors[f"{module}.weight_shape"] = np.asarray([n, k])
        tensors[f"{block}.gate.weight"] = np.zeros((EXPERTS, HIDDEN), ml_dtypes.bfloat16)
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _status(field: str) -> int:
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def measure(task: str, source: str, destination: str) -> dict[str, float]:
    """Runs one task in this process: seconds, peak bytes above the start, bytes of a packed layer."""
    import jax

    from jax_marlin_moe.checkpoint import convert, load_moe_layer

    jax.block_until_ready(jax.numpy.ones(8) + 1)
    start_bytes = _status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    if task == "convert":
        convert(source, destination)
        seconds = time.perf_counter() - start
        peak = _status("VmHWM") - start_bytes
        layer = load_moe_layer(destination, 0)
    else:
        layer = load_moe_layer(destination if task == "load packed" else source, 0)
        jax.block_until_ready(layer)
        seconds = time.perf_counter() - start
        peak = _status("VmHWM") - start_bytes
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer))
    return {"seconds": round(seconds, 2), "peak_bytes": peak, "layer_bytes": size, "peak": round(peak / size, 3)}


def main() -> None:
    """Measures all tasks and writes the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(options.task, *options.folders)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        source, destination = pathlib.Path(scratch, "source"), pathlib.Path(scratch, "packed")
        source.mkdir()
        write_checkpoint(source, options.layers)
        for task in ("load source", "convert", "load packed"):
            command = [sys.executable, "-m", "benchmarks.conversion", "--out", str(options.out), "--task", task,
                       "--folders", str(source), str(destination)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[task] = json.loads(done.stdout.splitlines()[-1])
            print(task, results[task], flush=True)
    record = {
        "command": recorded_command("benchmarks.conversion"),
        "commit": current_commit(),
        "shape": {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "layers": options.layers},
        "format": f"compressed-tensors int4, groups of {GROUP}",
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
