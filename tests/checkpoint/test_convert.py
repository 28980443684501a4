"""`convert` stopped at every write, killed, interrupted and started twice: what it leaves is never taken for whole."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import checkpoint_files as files
import jax
import numpy as np
import pytest
from stopped_writes import Steps

from jax_marlin_moe.checkpoint import Checkpoint, convert, load_moe_layer, packed_form
from jax_marlin_moe.checkpoint.whole_files import locked_folder, whole_file
from jax_marlin_moe.cli.main import main

DATA = pathlib.Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint with few tensors beside its experts: each is a write more."""
    folder = tmp_path_factory.mktemp("source")
    tensors = files.read(DATA / "ck_llmc_W4A16" / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".mlp." in name or name == "model.norm.weight"}
    files.write(folder / "model.safetensors", kept)
    shutil.copy(DATA / "ck_llmc_W4A16" / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def layers(source):
    """The layers of the source, as numpy arrays: loading is not what these tests are about."""
    checkpoint = Checkpoint(source)
    return {number: jax.tree.map(np.asarray, checkpoint.load(number)) for number in checkpoint.layers}


@pytest.fixture(autouse=True)
def loaded(layers, monkeypatch):
    """The numbers of the layers that were asked for."""
    asked = []

    def load(self, number):
        asked.append(number)
        return layers[number]

    monkeypatch.setattr(Checkpoint, "load", load)
    return asked


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path, source):
    """What an undisturbed run writes."""
    convert(source, tmp_path / "whole")
    return contents(tmp_path / "whole")


def assert_not_taken_for_whole(folder: pathlib.Path) -> None:
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"this conversion was not finished; run convert again|no config"
    ):
        load_moe_layer(folder, 0)


@pytest.mark.parametrize("stopped_by", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_stopped_at_every_write(tmp_path, monkeypatch, whole, stopped_by, source):
    def stop():
        raise stopped_by

    finished, number = 0, 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        steps = Steps(number, stop)
        raised = None
        try:
            with monkeypatch.context() as patch:
                steps.patch(lambda *a: patch.setattr(*a, raising=False))
                convert(source, folder)
        except (KeyboardInterrupt, OSError) as error:
            raised = error
        if isinstance(raised, OSError):
            assert raised.errno == errno.ENOSPC
            assert str(folder) in str(raised.filename)
        if steps.count < number:
            break
        if (
            folder.exists() and (folder / packed_form.MANIFEST).exists()
        ):  # a folder that cannot be flushed is no failure
            finished += 1
        elif folder.exists():
            names = sorted(contents(folder))
            record = json.loads((folder / packed_form.UNFINISHED).read_text())
            # Files that are finished and the record of them, nothing else.
            layers = [entry["file"] for entry in record["layers"].values()]
            assert names == sorted([packed_form.UNFINISHED, *layers, *record["others"]])
            assert record["layers"]
            assert_not_taken_for_whole(folder)
        if not (folder / packed_form.MANIFEST).exists():
            convert(source, folder)
        assert contents(folder) == whole
    assert number > 40
    assert finished <= 2 * (len(whole) - 1) + 2  # each file, each record of it, the first one and the folder
    assert contents(folder) == whole


_KILL = """
import os, pathlib, shutil, signal, sys
import jax, numpy as np
from stopped_writes import Steps
from jax_marlin_moe.checkpoint import Checkpoint, convert, packed_form
source, scratch = sys.argv[1], pathlib.Path(sys.argv[2])
checkpoint = Checkpoint(source)
layers = {number: jax.tree.map(np.asarray, checkpoint.load(number)) for number in checkpoint.layers}
Checkpoint.load = lambda self, number: layers[number]
contents = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
convert(source, scratch / "whole")
whole, kills, refused, number = contents(scratch / "whole"), 0, 0, 0
while True:
    number += 1
    folder = scratch / str(number)
    child = os.fork()
    if child == 0:
        Steps(number, lambda: os.kill(os.getpid(), signal.SIGKILL)).patch(setattr)
        convert(source, folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    kills += 1
    if not (folder / packed_form.MANIFEST).exists():
        try:
            assert packed_form.read_manifest(folder) is None and not any(folder.iterdir())
        except ValueError as error:
            assert "was not finished; run convert again" in str(error)
            refused += 1
        convert(source, folder)
    assert contents(folder) == whole, (number, sorted(contents(folder)))
    shutil.rmtree(folder)
print(kills, refused)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_killed_at_every_write(tmp_path, source):
    paths = [
        str(pathlib.Path(__file__).parents[1]),
        os.environ.get("PYTHONPATH"),
    ]  # the package may be found through it
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-P", "-c", _KILL, str(source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    kills, refused = map(int, done.stdout.split())
    assert kills > 40
    assert kills - refused <= 3  # before the first write, and behind the last one


def stop_after_first_layer(number, size):
    raise KeyboardInterrupt


def test_a_second_run_adopts_finished_layers(tmp_path, loaded, whole, source):
    folder = tmp_path / "packed"
    loaded.clear()
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, report=stop_after_first_layer)
    assert_not_taken_for_whole(folder)
    assert main(["inspect", str(folder)]) == 1
    reported = []
    convert(source, folder, report=lambda *line: reported.append(line))
    assert loaded == [0, 1]  # each once
    assert [number for number, _ in reported] == [0, 1]
    assert contents(folder) == whole


def test_a_finished_layer_that_is_damaged_is_converted_again(tmp_path, loaded, whole, source):
    folder = tmp_path / "packed"
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, report=stop_after_first_layer)
    path = folder / packed_form.file_of(0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loaded.clear()
    convert(source, folder)
    assert loaded == [0, 1]
    assert contents(folder) == whole


def test_another_conversion_is_not_mixed_in(tmp_path, source):
    edited, folder = tmp_path / "source", tmp_path / "packed"
    shutil.copytree(source, edited)
    with pytest.raises(KeyboardInterrupt):
        convert(edited, folder, report=stop_after_first_layer)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="unfinished conversion whose quantize is None, not 'int4'; delete the"):
        convert(edited, folder, quantize="int4")
    (edited / "config.json").write_text((edited / "config.json").read_text() + " ")
    with pytest.raises(FileExistsError, match="unfinished conversion whose source_files is"):
        convert(edited, folder)
    assert contents(folder) == before


def test_a_refused_source_leaves_nothing(tmp_path, monkeypatch, layers, source):
    def load(self, number):
        if number == 1:
            raise ValueError("model.safetensors: tensor x is not known")
        return layers[number]

    monkeypatch.setattr(Checkpoint, "load", load)
    with pytest.raises(ValueError, match="tensor x is not known"):
        convert(source, tmp_path / "a" / "b" / "packed")
    assert list(tmp_path.iterdir()) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="tensor x is not known"):
        convert(source, empty)
    assert list(tmp_path.iterdir()) == [empty]
    assert list(empty.iterdir()) == []


def test_what_is_in_the_way_stays(tmp_path, source):
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; pass a new folder"):
        convert(source, folder)
    assert sorted(contents(folder)) == ["notes.txt"]
    convert(source, tmp_path / "other")
    with pytest.raises(FileExistsError, match="holds a finished conversion; pass a new folder"):
        convert(source, tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        convert(source, tmp_path / "file")
    for arguments in (("", tmp_path / "x"), (source, "")):
        with pytest.raises(ValueError, match=r"(source|destination) is ''; it must be a folder"):
            convert(*arguments)


def test_two_at_once_are_told_apart(tmp_path, capsys, source):
    folder = tmp_path / "packed"
    folder.mkdir()
    pytest.importorskip("fcntl")
    with locked_folder(folder):
        with pytest.raises(BlockingIOError, match=r"another process is converting into .*packed; wait for it"):
            convert(source, folder)
        assert main(["convert", str(source), str(folder)]) == 1
    assert "cannot convert: another process is converting into" in capsys.readouterr().err
    convert(source, folder)
    assert packed_form.read_manifest(folder).layers == [0, 1]


def test_the_command_names_the_full_disk_and_survives_a_full_output(tmp_path, capsys, monkeypatch, whole, source):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        Steps(7, full).patch(lambda *a: patch.setattr(*a, raising=False))
        assert main(["convert", str(source), str(tmp_path / "packed")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"cannot convert: \[Errno 28\] No space left on device: '.*\.part'", error)
    with monkeypatch.context() as patch:
        Steps(30, lambda: (_ for _ in ()).throw(KeyboardInterrupt)).patch(lambda *a: patch.setattr(*a, raising=False))
        assert main(["convert", str(source), str(tmp_path / "packed")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; finished layers are kept")
    assert main(["convert", str(source), str(tmp_path / "packed")]) == 0
    assert contents(tmp_path / "packed") == whole


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "name"
    path.write_text("before")

    def stopped():
        with whole_file(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert contents(tmp_path) == {"name": b"before"}
    with whole_file(path) as file:
        file.write(b"after")
    assert contents(tmp_path) == {"name": b"after"}
