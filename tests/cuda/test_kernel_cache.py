"""The kernel cache and the tables of measured schemes under attack: damaged, foreign, in odd places, by odd users."""

import dataclasses
import json
import os
import sys
import warnings

import pytest

from jax_marlin_moe.cuda import cache, compiler, tables
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme

CODE = b"\x7fELF" + bytes(range(256)) * 40


@pytest.fixture
def compilations(monkeypatch):
    """Replaces NVRTC by a recorder: what is compiled, in order."""
    compiled = []

    def record(source, architecture):
        compiled.append((source, architecture))
        return CODE

    monkeypatch.setattr(compiler, "_compile", record)
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return compiled


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No variable names a folder; the working directory is empty."""
    for name in (cache.ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def compile_anew():
    """As a new process would: nothing is remembered but the disk."""
    return compiler.compile_cubin.__wrapped__("source", "sm_90a")


def entry_of(folder):
    (entry,) = folder.glob("*.cubin")
    return entry


# The entry.


def flipped(position):
    def flip(entry):
        changed = bytearray(entry)
        changed[position] ^= 4
        return bytes(changed)

    return flip


DAMAGES = {
    "cut in half": lambda entry: entry[: len(entry) // 2],
    "without its last byte": lambda entry: entry[:-1],
    "header alone": lambda entry: entry[:48],
    "cut within the header": lambda entry: entry[:20],
    "empty": lambda entry: b"",
    "a byte more": lambda entry: entry + b"\0",
    "twice": lambda entry: entry * 2,
    "text": lambda entry: b"#!/bin/sh\necho hi\n",
    "machine code without a header": lambda entry: CODE,
    "zeros": lambda entry: bytes(len(entry)),
    "larger than any": lambda entry: bytes(cache._MOST_BYTES + 1),
    "a bit of the magic": flipped(0),
    "a bit of the length": flipped(9),
    "a bit of the digest": flipped(20),
    "the first bit of the code": flipped(48),
    "a bit in the middle": flipped(5000),
    "the last bit": flipped(-1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again_and_stored(folder, compilations, damage):
    assert compile_anew() == CODE
    entry = entry_of(folder)
    good = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](good))
    with pytest.warns(UserWarning, match=r"kernel cache entry .*\.cubin .* compiled again"):
        assert compile_anew() == CODE
    assert entry.read_bytes() == good
    assert len(compilations) == 2
    assert compile_anew() == CODE
    assert len(compilations) == 2


def replace_by_pipe(entry):
    os.mkfifo(entry)


def replace_by_link_to_zeros(entry):
    entry.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [replace_by_pipe, replace_by_link_to_zeros])
def test_what_is_no_regular_file_is_never_read(folder, compilations, replace):
    compile_anew()
    entry = entry_of(folder)
    good = entry.read_bytes()
    entry.unlink()
    replace(entry)
    with pytest.warns(UserWarning, match="is not a regular file"):
        assert compile_anew() == CODE
    assert not entry.is_symlink()
    assert entry.read_bytes() == good


def test_a_folder_in_an_entrys_place_costs_a_compilation(folder, compilations):
    compile_anew()
    entry = entry_of(folder)
    entry.unlink()
    entry.mkdir()
    with pytest.warns(UserWarning, match="is not a regular file"):
        assert compile_anew() == CODE
    assert entry.is_dir()
    assert [file.name for file in folder.iterdir()] == [entry.name]


def test_a_link_that_leads_nowhere_is_replaced(folder, compilations):
    compile_anew()
    entry = entry_of(folder)
    entry.unlink()
    entry.symlink_to(folder / "absent")
    assert compile_anew() == CODE
    assert compile_anew() == CODE
    assert len(compilations) == 2


# The place.


def test_without_home_and_passwd_entry_there_is_no_cache(monkeypatch, homeless, tmp_path, compilations):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache.directory() is None
    compile_anew()
    compile_anew()
    assert len(compilations) == 2
    assert tables.user_path("sm_90a") is None
    assert not list(tmp_path.iterdir())


def test_without_platformdirs_there_is_no_cache_that_is_not_named(monkeypatch, homeless, tmp_path):
    """As after `pip install --no-deps`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert cache.directory() is None
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    assert cache.directory() == tmp_path


def test_a_named_folder_whose_home_is_unknown_is_no_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "~no_such_user_of_this_machine/kernels")
    with pytest.warns(UserWarning, match="JAX_MARLIN_MOE_CACHE_DIR is '~no_such_user.*home is not known"):
        assert cache.directory() is None


def test_a_named_folder_may_begin_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "~/kernels")
    assert cache.directory() == tmp_path / "kernels"


def test_a_relative_cache_home_is_ignored(monkeypatch, homeless, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "jax_marlin_moe"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_default_folder_that_others_can_write_is_refused(monkeypatch, homeless, tmp_path, compilations, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = tmp_path / "jax_marlin_moe"
    default.mkdir()
    default.chmod(mode)
    with pytest.warns(UserWarning, match="can be written by others .*chmod go-w.* set JAX_MARLIN_MOE_CACHE_DIR"):
        compile_anew()
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        compile_anew()
    assert len(compilations) == 2
    assert not list(default.iterdir())
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(default))  # asked for by name
    compile_anew()
    assert len(list(default.iterdir())) == 1


def test_a_default_folder_of_another_user_is_refused(monkeypatch, homeless, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jax_marlin_moe").mkdir(mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path / "jax_marlin_moe", 12345, -1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert cache.directory() is None


def test_default_entries_are_the_users_own(monkeypatch, homeless, tmp_path, compilations):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_anew()
    default = tmp_path / "jax_marlin_moe"
    assert default.stat().st_mode & 0o777 == 0o700
    assert entry_of(default).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("mode", "expected"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_entries_of_a_shared_folder_can_be_read_by_its_readers(folder, compilations, mode, expected):
    folder.mkdir()
    folder.chmod(mode)
    compile_anew()
    assert entry_of(folder).stat().st_mode & 0o777 == expected


# The table of measured schemes.

KEY = tables.BlockKey(8, 2, 256, 128, 128, ("int4", "int4"))
ROW = {"routing": "direct", "gate_up": ["mma", 8, 2, 1, 1, 64, 2, 2, 1], "down": ["mma", 8, 1, 1, 1, 64, 2, 2, 1]}
ROW["overlaps"] = False
SCHEME = BlockScheme("direct", MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(8, 1, 1, 1, 64, 2, 2), overlaps=False)


def with_tile(*fields):
    return {str(KEY): {"4": ROW | {"gate_up": list(fields)}}}


def with_row(row):
    return {str(KEY): {"4": row}}


ODD_TABLES = {
    "not JSON": "{",
    "empty": "",
    "no text": b"\xff\xfe\xfd",
    "a list": [],
    "null": None,
    "a number": 3,
    "nested deep": "[" * 100_000,
    "a number of many digits": '{"a": ' + "9" * 5000 + "}",
    "rows a list": {str(KEY): []},
    "rows null": {str(KEY): None},
    "another block's rows null": {"E9": None},
    "a row null": with_row(None),
    "a row a number": with_row(3),
    "a row a string": with_row("routing"),
    "a row a list": with_row([1]),
    "tokens no number": {str(KEY): {"x": ROW}},
    "tokens zero": {str(KEY): {"0": ROW}},
    "tokens negative": {str(KEY): {"-4": ROW}},
    "tokens huge": {str(KEY): {"9" * 400: ROW}},
    "tokens of another script": {str(KEY): {"\u0664": ROW}},
    "gate_up missing": with_row({name: value for name, value in ROW.items() if name != "gate_up"}),
    "overlaps missing": with_row({name: value for name, value in ROW.items() if name != "overlaps"}),
    "a field of a newer version": with_row(ROW | {"speed": 1}),
    "an empty tile": with_tile(),
    "a tile null": with_row(ROW | {"down": None}),
    "a tile of an unknown kind": with_tile("tcgen05", 8, 2, 1, 1, 64, 2, 2, 1),
    "a number more": with_tile("mma", 8, 2, 1, 1, 64, 2, 2, 1, 7),
    "a number less": with_tile("mma", 8, 2, 1, 1, 64, 2, 2),
    "the other kind's fields": with_tile("wgmma", 8, 2, 1, 1, 64, 2, 2, 1),
    "strings": with_tile("mma", *map(str, (8, 2, 1, 1, 64, 2, 2, 1))),
    "fractions": with_tile("mma", 8.0, 2, 1, 1, 64, 2, 2, 1),
    "booleans": with_tile("mma", True, 2, 1, 1, 64, 2, 2, 1),
    "zeros": with_tile("mma", *[0] * 8),
    "negative": with_tile("mma", 8, -1, 1, 1, 64, 2, 2, 1),
    "huge": with_tile("mma", 2**40, 2, 1, 1, 64, 2, 2, 1),
    "C++ in a field": with_tile("mma", '1>{}; extern "C" __global__ void evil(){} //', 2, 1, 1, 64, 2, 2, 1),
    "a boolean alone": with_tile(True),
    "routing a string": with_row(ROW | {"routing": "x"}),
    "routing a number": with_row(ROW | {"routing": 7}),
    "routing null": with_row(ROW | {"routing": None}),
    "routing a list": with_row(ROW | {"routing": ["direct"]}),
    "overlaps a number": with_row(ROW | {"overlaps": 1}),
    "a newer version": {"version": 3, str(KEY): {"4": ROW}},
    "a version that is none": {"version": "2", str(KEY): {"4": ROW}},
}


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = table if isinstance(table, str | bytes) else json.dumps(table)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def table(folder):
    folder.mkdir()
    return folder / "tuned-sm_90a.json"


@pytest.mark.parametrize("case", ODD_TABLES)
def test_what_is_not_understood_is_skipped_with_one_warning(table, case):
    write(table, ODD_TABLES[case])
    with pytest.warns(UserWarning, match=r"tuned-sm_90a\.json: skipped what is not understood: ") as warned:
        assert tables.lookup(KEY, 4, "sm_90a") is None
    assert len(warned) == 1
    assert tables.lookup(KEY, 4, "sm_90a") is None  # without another one


@pytest.mark.parametrize("case", [name for name, odd in ODD_TABLES.items() if isinstance(odd, dict)])
def test_good_rows_beside_odd_ones_count(table, case):
    odd = {name: value for name, value in ODD_TABLES[case].items() if name != "version"}
    rows = odd.get(str(KEY))
    write(table, odd | {str(KEY): (rows if isinstance(rows, dict) else {}) | {"64": ROW}, "E9": 3})
    with pytest.warns(UserWarning, match="skipped what is not understood"):
        assert tables.lookup(KEY, 64, "sm_90a") == SCHEME


def test_rows_of_version_1_are_read(table):
    old = {"routing": "aligned", "gate_up": [16, 2, 2, 1, 64, 4, 1, False], "down": [16, 1, 2, 1, 64, 2, 2]}
    write(table, {str(KEY): {"4": old | {"overlaps": True}}})
    assert tables.lookup(KEY, 4, "sm_90a") == BlockScheme(
        "aligned", WgmmaTile(16, 2, 2, 1, 64, 4, 1, False), MmaTile(16, 1, 2, 1, 64, 2, 2)
    )


def test_a_pipe_is_no_table(table):
    os.mkfifo(table)
    with pytest.warns(UserWarning, match="is not a regular file"):
        assert tables.lookup(KEY, 4, "sm_90a") is None


@pytest.mark.parametrize(
    "odd", [{"E9": None, "E8": [1, {"a": 2.5}]}, {str(KEY): {"x": 1, "8": ROW | {"speed": 1}, "16": [ROW]}}]
)
def test_what_is_not_understood_survives_a_record(table, odd):
    write(table, odd)
    tables.record(KEY, 4, "sm_90a", SCHEME)
    stored = json.loads(table.read_text())
    assert stored.pop("version") == 2
    assert stored[str(KEY)].pop("4") == ROW
    assert {name: rows for name, rows in stored.items() if rows != {}} == odd


def test_a_record_replaces_the_row_and_keeps_the_order(table):
    for tokens in (16, 4, 128):
        tables.record(KEY, tokens, "sm_90a", SCHEME)
    tables.record(KEY, 16, "sm_90a", dataclasses.replace(SCHEME, overlaps=True))
    assert list(json.loads(table.read_text())[str(KEY)]) == ["4", "16", "128"]
    assert tables.lookup(KEY, 16, "sm_90a") == dataclasses.replace(SCHEME, overlaps=True)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_what_is_no_table_is_moved_aside_by_a_record(table, content):
    write(table, content)
    with pytest.warns(UserWarning, match=r"it is now .*\.unreadable"):
        tables.record(KEY, 4, "sm_90a", SCHEME)
    assert table.with_name(table.name + ".unreadable").read_text() == content
    assert tables.lookup(KEY, 4, "sm_90a") == SCHEME


def test_a_table_of_a_newer_version_is_left_alone(table):
    write(table, {"version": 3, "blocks": []})
    with pytest.warns(
        UserWarning, match="version is 3; it must be at most 2: update jax_marlin_moe; nothing is stored"
    ):
        tables.record(KEY, 4, "sm_90a", SCHEME)
    assert json.loads(table.read_text()) == {"version": 3, "blocks": []}


def test_a_record_that_fails_leaves_nothing_behind(monkeypatch, table):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    tables.record(KEY, 4, "sm_90a", SCHEME)
    assert not list(table.parent.iterdir())
