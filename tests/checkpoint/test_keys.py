"""Values of JSON configs: what each reader takes, and that errors name file, key, value and what is allowed."""

import json
import os

import pytest

from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.tensors import read_json

EVERY_KIND = {
    "a string": "x",
    "an empty string": "",
    "text of a boolean": "false",
    "text of a number": "4",
    "null": None,
    "a list": [],
    "strings": ["a", "b"],
    "mixed": ["a", 1],
    "an object": {"a": 1},
    "true": True,
    "false": False,
    "zero": 0,
    "four": 4,
    "minus one": -1,
    "four as float": 4.0,
    "half": 0.5,
    "huge integer": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
}


def read(value, reader, *args, **options):
    return getattr(Keys({"key": value}, "dir/config.json"), reader)("key", *args, **options)


@pytest.mark.parametrize(
    ("reader", "args", "taken"),
    [
        ("boolean", (), {"true", "false"}),
        ("integer", (), {"zero", "four", "minus one", "huge integer"}),
        ("number", (), {"zero", "four", "minus one", "four as float", "half"}),
        ("text", (), {"a string", "text of a boolean", "text of a number"}),
        ("choice", (("x", "4"),), {"a string", "text of a number"}),
        ("object", (), {"an object"}),
        ("texts", (), {"a list", "strings"}),
    ],
)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_each_reader_takes_its_kind_alone(reader, args, taken, name):
    value = EVERY_KIND[name]
    if name in taken:
        found = read(value, reader, *args)
        assert (found.values if reader == "object" else found) == value
    else:
        with pytest.raises(ValueError, match=r"^dir/config\.json: key is .+; it must be ."):
            read(value, reader, *args)


@pytest.mark.parametrize("reader", ["boolean", "integer", "number", "text", "object", "texts"])
def test_a_default_stands_for_a_missing_key_and_for_null_only_where_said(reader):
    keys = Keys({"null": None}, "config.json")
    assert getattr(keys, reader)("missing", None) is None
    assert getattr(keys, reader)("missing", "default") == "default"
    assert getattr(keys, reader)("null", "default", null=True) == "default"
    with pytest.raises(ValueError, match=r"^config\.json: null is None; it must be"):
        getattr(keys, reader)("null", "default")
    with pytest.raises(ValueError, match=r"^config\.json: missing is missing; it must be"):
        getattr(keys, reader)("missing")
    with pytest.raises(ValueError, match=r"^config\.json: null is null; it must be"):
        getattr(keys, reader)("null", null=True)


@pytest.mark.parametrize(
    ("reader", "bounds", "taken", "refused", "text"),
    [
        ("integer", dict(low=1), 1, 0, "an integer of at least 1"),
        ("integer", dict(high=8), 8, 9, "an integer of at most 8"),
        ("integer", dict(low=1, high=8), 8, 9, "an integer from 1 to 8"),
        ("number", dict(low=0), 0, -0.5, "a finite number of at least 0"),
        ("number", dict(above=0), 0.5, 0, "a finite number greater than 0"),
        ("number", dict(above=0, high=1), 1, 1.5, "a finite number greater than 0 and at most 1"),
    ],
)
def test_bounds_are_checked_and_told(reader, bounds, taken, refused, text):
    assert read(taken, reader, **bounds) == taken
    with pytest.raises(ValueError, match=rf"key is {refused}; it must be {text}$"):
        read(refused, reader, **bounds)


def test_a_number_is_a_float_also_where_the_file_has_an_integer():
    assert type(read(2, "number")) is float


def test_a_key_of_an_inner_object_is_named_with_its_path():
    inner = Keys({"outer": {"inner": {"bits": "4"}}}, "config.json").object("outer").object("inner")
    with pytest.raises(ValueError, match=r"^config\.json: outer\.inner\.bits is '4'; it must be an integer$"):
        inner.integer("bits")
    with pytest.raises(ValueError, match=r"^config\.json: outer\.inner\.size is missing; it must be an integer$"):
        inner.integer("size")


def test_a_choice_tells_the_options():
    with pytest.raises(ValueError, match=r"key is 'z'; it must be one of 'x', 'y'$"):
        read("z", "choice", ("x", "y"))
    with pytest.raises(ValueError, match=r"key is 'z'; it must be 'x'$"):
        read("z", "choice", ("x",))


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**5)}, 10**4000])
def test_an_error_about_a_long_value_stays_short(value):
    with pytest.raises(ValueError, match="it must be true or false") as error:
        read(value, "boolean")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nest too deep"),
        ('{"a":' * 100_000, "nest too deep"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' more than once"),
        ('{"a": "\xff"}', "is not valid JSON"),
        ("[1]", "holds a JSON list; it must hold an object"),
        ("", "is not valid JSON"),
    ],
)
def test_json_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_json_beyond_the_limit_of_size_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(20 * 2**30)  # sparse
    with pytest.raises(ValueError, match=rf"{path} has {20 * 2**30} bytes; .* must have at most 100000000"):
        read_json(path)


def test_json_is_read_from_regular_files_alone(tmp_path):
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=rf"{pipe} is not a regular file"):
        read_json(pipe)
    with pytest.raises(ValueError, match="is not a regular file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"quant\.json"):
        read_json(tmp_path / "quant.json")


def test_json_behind_a_link_is_read(tmp_path):
    (tmp_path / "blob").write_text(json.dumps({"a": 1}))
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}
