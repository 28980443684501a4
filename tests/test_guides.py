"""The Python of the guides runs, page by page, on small genuine checkpoints; tables of variables are complete."""

import ast
import importlib.util
import pathlib
import re

import jax.numpy as jnp
import pytest

import jax_marlin_moe as jmm

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "start.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
DATA = ROOT / "tests" / "data"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code_of(page):
    """All Python blocks of a page, lines where they are on the page, with paths of checkpoints that there are."""
    text, code = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        code += [""] * (text[: match.start(1)].count("\n") - len(code)) + match.group(1).splitlines()
    joined = "\n".join(code).replace('"path/to/plain/checkpoint"', repr(str(DATA / "ck_q3")))
    return re.sub(r'"path/to/[^"]+"', repr(str(DATA / "ck_llmc_W4A16")), joined)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_code_of_a_guide_runs(page, capsys):
    exec(compile(code_of(page), str(page), "exec"), {"__name__": page.stem})


def test_every_variable_is_in_the_table():
    used = set()
    for path in (ROOT / "jax_marlin_moe").rglob("*.py"):
        used |= set(re.findall(r'"(JAX_MARLIN_MOE_\w+)"', path.read_text(encoding="utf-8")))
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert len(used) >= 3
    assert set(re.findall(r"^\| `(JAX_MARLIN_MOE_\w+)`", page, re.MULTILINE)) == used


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"^([\w/]+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("_generated/")} - {"index"} <= listed


def test_messages_of_the_error_glossary_are_those_of_the_package():
    texts = set()
    for path in (ROOT / "jax_marlin_moe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 8:
                texts.add(" ".join(node.value.split()))

    def is_said(part):
        """Whether one text has it, or most of it consists of texts between which a message puts what it found."""
        said = [text for text in texts if text in part]
        return any(part in text for text in texts) or sum(map(len, said)) > 0.6 * len(part)

    glossary = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", glossary, re.MULTILINE)
    assert len(messages) > 25
    of_others = {"RESOURCE_EXHAUSTED"}  # XLA's
    parts = {part for message in messages for part in re.split(r"\s*\.\.\.\s*", message) if len(part) > 8}
    assert {part for part in parts if not is_said(part)} == of_others


@pytest.fixture(scope="module")
def conf():
    """docs/conf.py, which writes pages of the site."""
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_have_every_model_type_and_call_layers_as_they_can_be_called(conf):
    ((_, text),) = conf.recipes()
    named = set(re.findall(r"^## (\S+)$", text, re.MULTILINE))
    named |= {name for line in re.findall(r"^Also (.*)\.$", text, re.MULTILINE) for name in re.findall("`(.*?)`", line)}
    assert named == {name for family in jmm.checkpoint.FAMILIES for name in family.model_types}
    names = {"layer": jmm.checkpoint.load_moe_layer(DATA / "ck_llmc_W4A16", layer=0), "token_ids": None}
    names["x"] = names["h"] = jnp.ones((1, 128), jnp.bfloat16)
    calls = set(re.findall(r"^y = .*$", text, re.MULTILINE))
    assert len(calls) >= 3
    for call in calls:
        exec(call, names)


def test_every_public_name_is_in_the_api_reference(conf):
    pages = dict(conf.api_pages())
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert all(f"\n_generated/{page}\n" in listed for page in pages)
    found = set(re.findall(r"^\.\. (?:auto|py:)(?:function|class|data):: (\S+)$", "\n".join(pages.values()), re.M))

    def imported_with_as(module):
        tree = ast.parse(pathlib.Path(module.__file__).read_text(encoding="utf-8"))
        aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        return {alias.name for alias in aliases if alias.asname == alias.name}

    importers = {name for name in vars(jmm) if name.startswith("from_")}
    public = {f"jax_marlin_moe.{name}" for name in (imported_with_as(jmm) | importers) - {"checkpoint", "sharding"}}
    public |= {f"jax_marlin_moe.sharding.{name}" for name in imported_with_as(jmm.sharding)}
    elsewhere = {name for name in jmm.checkpoint.__all__ if hasattr(jmm, name)}
    public |= {f"jax_marlin_moe.checkpoint.{name}" for name in {*jmm.checkpoint.__all__} - elsewhere}
    public |= {f"jax_marlin_moe.flax.{kind}.MarlinMoE" for kind in ("nnx", "linen")}
    assert len(public) > 60
    assert public <= found
    adapters = {path.stem for path in (ROOT / "jax_marlin_moe" / "adapters").glob("*.py")} - {"__init__", "names"}
    assert adapters == set(conf.ADAPTERS)


def test_code_in_docstrings_is_code_on_the_site(conf):
    lines = ["Of `a_b` alone, with `c` and `d`s."]
    conf.as_rst(None, "function", "name", None, None, lines)
    assert lines == ["Of ``a_b`` alone, with ``c`` and ``d``\\ s."]
