"""The documentation site: `sphinx-build -W docs build/site`, with the `docs` extra."""

import inspect
import pathlib
import re
import types

import jax_marlin_moe as jmm
import jax_marlin_moe.flax.linen
import jax_marlin_moe.flax.nnx
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.measure import autotune

ROOT = pathlib.Path(__file__).parents[1]

project = "jax_marlin_moe"
copyright = "the authors of jax_marlin_moe"
release = jmm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jax_marlin_moe {release}"
pygments_dark_style = "github-dark"  # the theme's own underlines every module that is imported
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "signature"  # shapes and dtypes of arrays, as jaxtyping has them
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_ivar = True
autodoc_mock_imports = ["qwix"]  # of an adapter
nitpicky = False
suppress_warnings = ["myst.header"]

# Modules with a page in the API reference beside jax_marlin_moe, and the first line of it.
API = {
    jmm.checkpoint: "Layers, tensors and whole folders from checkpoints on disk: {doc}`../guides/load`.",
    jmm.sharding: "Experts over the devices of a mesh: {doc}`../guides/shard`.",
    jmm.flax.nnx: "Layers for Flax NNX: {doc}`../layers`.",
    jmm.flax.linen: "Layers for Flax Linen: {doc}`../layers`.",
    autotune: "What the command `tune` calls, for layers of your own: {doc}`../guides/tune`.",
}
# By name: some import the framework that they adapt to, which need not be installed here.
ADAPTERS = ("levanter", "qwix", "sglang_jax", "tokamax", "tpu_inference")
DATA = {
    "FORMATS": "The formats of weights by name, as rows of type `WeightFormat`: {doc}`../support` lists them.",
    "CUSTOM_CALL_TARGETS": "Names of the custom calls, which `jax.export` must be told of: {doc}`../guides/export`.",
    "FAMILIES": "The model families that the loader knows: {doc}`../extending` says how to add one.",
}

_OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "_generated/changelog.md"}
_OUTSIDE["CONTRIBUTING.md"] = "_generated/contributing.md"
_GENERATED = ROOT / "docs" / "_generated"


def site_links(app, name, source):
    """Links of a page that leave docs/ lead to their copies in the site, or become the name of the file."""
    folder = (ROOT / "docs" / name).parent

    def replaced(match):
        text, target = match.groups()
        path = target.partition("#")[0]
        if re.match(r"\w+:", target) or not path:
            return match.group()
        linked = (folder / path).resolve()
        if linked.is_relative_to(ROOT / "docs"):  # a page named by its file is named by its title
            return f"[]({target})" if text in (path, f"docs/{path}") else match.group()
        if not linked.exists():
            return match.group()
        name = linked.relative_to(ROOT).as_posix()
        up = "../" * len(pathlib.PurePosixPath(name).parent.parts)
        inside = _OUTSIDE.get(linked.name)
        if inside:
            return f"[{text}]({up}{inside})"
        return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"

    source[0] = re.sub(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s]+)\)", replaced, source[0])


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are in Markdown's manner: `code` in single backticks, code blocks behind a colon and a blank line."""
    # reStructuredText wants something between code and a letter behind it.
    text = re.sub(
        r"(?<!`)`((?:[^`\n]|\n(?!\s*\n))+)`(?!`)(\w?)",
        lambda match: f"``{match[1]}``" + (f"\\ {match[2]}" if match[2] else ""),
        "\n".join(lines),
    )
    lines[:] = text.split("\n")
    for number, line in enumerate(lines):
        ahead = next((other for other in lines[number + 2 :] if other.strip()), "")
        blank = number + 1 < len(lines) and not lines[number + 1].strip()
        if line.endswith(":") and blank and ahead.startswith("    "):
            line += ":"
        lines[number] = line


def included(name):
    """A document of the repository's root, as a page whose links are those of a page in docs/_generated."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](../", text)
    return re.sub(r"\]\((?=benchmarks/|README|CHANGELOG|CONTRIBUTING)", "](../../", text)


def public_names(module):
    """The names that a module is imported for: of a package all that it imports or lists, of a file its own."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (hasattr(module, "__path__") or getattr(value, "__module__", None) == module.__name__)
    ]


def documented(module, names):
    """A directive for each of these names, by which the reader imports them."""
    for name in names:
        value = getattr(module, name)
        options = ["   :members:", "   :special-members: __call__"] if inspect.isclass(value) else []
        kind = "autoclass" if options else "autofunction"
        yield from ("```{eval-rst}", f".. {kind}:: {module.__name__}.{name}", *options, "```", "")


def tables_of(module, names):
    """A directive for each of these names of data."""
    for name in names:
        yield from ("```{eval-rst}", f".. py:data:: {module.__name__}.{name}", "", f"   {DATA[name]}", "```", "")


def api_pages():
    """The public names in groups, each with its docstring."""
    names = public_names(jmm)
    data = [name for name in names if name in DATA]
    classes = [name for name in names if inspect.isclass(getattr(jmm, name))]
    functions = [name for name in names if name not in {*data, *classes}]
    importers = [name for name in functions if name.startswith("from_")]
    lines = ["# jax_marlin_moe", "", "The names of `import jax_marlin_moe as jmm`.", ""]
    for title, group in (
        ("Functions", [name for name in functions if name not in importers]),
        ("Importers", importers),
        ("Classes", classes),
    ):
        lines += [f"## {title}", "", *documented(jmm, sorted(group))]
    yield "api", "\n".join([*lines, "## Tables", "", *tables_of(jmm, data)])
    for module, about in API.items():
        names = [name for name in public_names(module) if getattr(jmm, name, None) is not getattr(module, name)]
        data = [name for name in names if name in DATA]
        lines = [f"# {module.__name__}", "", about, "", *documented(module, [n for n in names if n not in data])]
        name = module.__name__.removeprefix("jax_marlin_moe.").replace(".", "_")
        yield f"api_{name}", "\n".join([*lines, *tables_of(module, data)])
    lines = ["# jax_marlin_moe.adapters", "", "Calls with other frameworks' signatures: {doc}`../guides/adapters`.", ""]
    for name in ADAPTERS:
        lines += [f"## {name}", "", "```{eval-rst}", f".. automodule:: jax_marlin_moe.adapters.{name}"]
        lines += ["   :members:", "   :special-members: __call__", "```", ""]
    yield "api_adapters", "\n".join(lines)


def recipes():
    """A recipe per family, from the registry of families."""
    lines = [
        "# Recipes by family", "",
        "Families differ in the names of their tensors, in their routing rules and in what surrounds the experts. The",
        "loader knows all of that by the `model_type` of config.json, so most families are called alike:", "",
        "```python", "from jax_marlin_moe.checkpoint import load_moe_layer, load_moe_layers", "",
        'layer = load_moe_layer("path/to/checkpoint", layer=4)  # of plain weights: quantize="int4"',
        "y = layer(x)  # x: [..., hidden]", "",
        'stacked = load_moe_layers("path/to/checkpoint", stacked=True)  # all layers, if they are alike', "```", "",
        "{doc}`../families` has the error of each beside the module of transformers, and {doc}`../examples` whole",
        "decoders of Qwen3-MoE, gpt-oss and DeepSeek-V3.", "",
    ]  # fmt: skip
    for family in FAMILIES:
        facts = [f"experts in `{family.name(family.experts, '')}`", f"router in `{family.name(family.router, '')}`"]
        if family.shared:
            facts.append("a shared expert, which `layer(x)` adds")
        if family.correction_bias:
            facts.append("a bias that takes part in the choice of experts and not in their weights")
        call = "y = layer(x)"
        if family.hash_table:
            facts.append("experts chosen by token in the first layers, which need the ids of the tokens")
            call = "y = layer(x, token_ids)  # int32, in the shape of x without its last dimension"
        elif family.input_scale:
            facts.append("a router whose rows may be normalised apart from those of the experts")
            call = "y = layer(x, router_input=h)  # or layer(x), where they are the same"
        lines += [f"## {next(iter(family.model_types))}", ""]
        if len(family.model_types) > 1:
            lines += ["Also " + ", ".join(f"`{name}`" for name in list(family.model_types)[1:]) + ".", ""]
        lines += [*(f"* {fact[0].upper()}{fact[1:]}" for fact in facts), "", "```python", call, "```", ""]
    yield "recipes", "\n".join(lines)


def generate(app):
    """Writes the pages that follow from the code."""
    _GENERATED.mkdir(exist_ok=True)
    for name, text in (*api_pages(), *recipes()):
        (_GENERATED / f"{name}.md").write_text(text, encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        (_GENERATED / name.lower()).write_text(included(name), encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    app.connect("builder-inited", generate)
    app.connect("source-read", site_links)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
