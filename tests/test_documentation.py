"""The documents agree with the code: formulas, tables, links, citations and the files that they name."""

import functools
import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import layout, reference
from jax_marlin_moe.activations import ACTIVATIONS, PARAMETERS
from jax_marlin_moe.checkpoint import loading
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.checkpoint.schemes import METHODS, SCHEMES
from jax_marlin_moe.checkpoint.schemes.awq import unpack_awq
from jax_marlin_moe.checkpoint.schemes.words import unpack_along_k
from jax_marlin_moe.formats import FLOAT_SCALES, FORMATS

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(
            path
            for folder in ("docs", "benchmarks", "tests")
            for path in (ROOT / folder).rglob("*.md")
            if "_generated" not in path.parts  # of the site, where it was built here
        ),
    ],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
SOURCES = sorted(
    path
    for folder in ("csrc", "jax_marlin_moe", "tests", "benchmarks")
    for suffix in ("*.py", "*.cc", "*.h", "*.cuh")
    for path in (ROOT / folder).rglob(suffix)
)
BITS = pytest.mark.parametrize("bits", [4, 8])
README, SUPPORT, FORMATS_PAGE, CHECKPOINTS_PAGE, KERNELS_PAGE, FAMILIES_PAGE = (
    ROOT / name
    for name in (
        "README.md",
        "docs/support.md",
        "docs/formats.md",
        "docs/checkpoints.md",
        "docs/kernels.md",
        "docs/families.md",
    )
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# docs/formats.md, "Marlin layout" and "Padding"
_CITATION = re.compile(r'(docs/[\w-]+\.md|CONTRIBUTING\.md|README\.md|NOTES\.md), ("[^"]+"(?:(?:,| and) "[^"]+")*)')
_FORMER_NAMES = re.compile(r"\b(FORMATS|CHECKPOINTS|KERNELS|FFI|DESIGN|HOUSE)(\.md|,? sections?| gives)\b")
# Of the list in CONTRIBUTING.md, what is never right; and American spellings.
_UNWANTED = re.compile(
    r"\b(mended|blocks? of (?:threads|tokens)|left out|had better|is no whole number"
    r"|(?<!-)(?:quanti|normali|initiali|organi|speciali)z\w+|behaviors?|neighbors?|artifacts?)\b",
    re.IGNORECASE,
)
_PATH = re.compile(r"(?<![\w./-])((?:\.\.\.|jax_marlin_moe|csrc|tests|benchmarks|docs|\.ci)/[\w./-]*[\w/])")


def name_of(path):
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def code_blocks(path, language):
    return [body for found, body in _FENCE.findall(path.read_text(encoding="utf-8")) if found == language]


@functools.cache
def headings(path):
    """Titles of a document's headings, as they are written."""
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [match.group(1).strip() for match in re.finditer(r"^#+ (.+)$", prose, re.MULTILINE)]


def titles(path):
    """The same without their numbers: what a citation names."""
    return {re.sub(r"^\d+(\.\d+)*\.? ", "", heading) for heading in headings(path)}


def anchors(path):
    """What a link behind `#` may name, as GitHub derives it."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(path)}


def flowing(text):
    """Comments and docstrings with their line breaks undone."""
    return re.sub(r"\s*\n\s*(?://|#)?\s*", " ", text)


def table(path, *columns):
    """Rows, by column, of the one table of a document that begins with these columns."""
    found = []
    rows = None
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            rows = None
        elif rows is None:
            rows = []
            if tuple(cells[: len(columns)]) == columns:
                found.append((cells, rows))
        elif not set(line) <= set("|-: "):
            rows.append(cells)
    assert len(found) == 1, f"{name_of(path)} has {len(found)} tables with the columns {columns}"
    header, rows = found[0]
    return [dict(zip(header, row, strict=True)) for row in rows]


def names_in(cell):
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def formulas():
    module = types.ModuleType("formats_page")
    for block in code_blocks(FORMATS_PAGE, "python"):
        exec(compile(block, name_of(FORMATS_PAGE), "exec"), vars(module))
    return module


def packed_by(position, codes, bits):
    """The words that a formula of the page gives for one matrix."""
    words = np.zeros(codes.size * bits // 32, np.uint32)
    for k, n in np.ndindex(codes.shape):
        word, shift = position(k, n, codes.shape[1], bits)
        words[word] |= np.uint32(codes[k, n]) << np.uint32(shift)
    return words.view(np.int32)


def random_codes(bits, shape):
    return np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint8)


@BITS
def test_the_formula_of_the_marlin_layout_is_what_pack_does(bits):
    codes = random_codes(bits, (32, 128))
    expected = packed_by(formulas().marlin_position, codes, bits)
    np.testing.assert_array_equal(np.asarray(layout.pack(codes, bits=bits)).ravel(), expected)


@BITS
def test_the_formulas_of_source_packings_are_what_the_importers_unpack(bits):
    codes = random_codes(bits, (32, 64))
    awq = packed_by(formulas().awq_position, codes, bits).reshape(32, -1)
    np.testing.assert_array_equal(unpack_awq(jnp.asarray(awq), bits=bits), codes)
    gptq = packed_by(formulas().gptq_position, codes, bits).reshape(-1, 64)
    np.testing.assert_array_equal(unpack_along_k(jnp.asarray(gptq), bits=bits), codes)


@BITS
def test_the_formula_of_zero_points_is_what_pack_zeros_does(bits):
    zeros = random_codes(bits, (1, 128))
    expected = packed_by(lambda _, n, columns, bits: formulas().zero_position(n, bits), zeros, bits)
    np.testing.assert_array_equal(layout.pack_zeros(zeros[0], bits=bits), expected)


def test_the_formulas_of_scales_are_what_the_permutations_do():
    scales = np.arange(128, dtype=np.float32)
    for permute, position in (
        (layout.permute_scales, formulas().scale_position),
        # No engine of ours has this order: pairs of columns, as a 4 x 4 transposition of each 32.
        (lambda s: s.reshape(-1, 4, 4, 2).swapaxes(1, 2).ravel(), formulas().channel_position),
    ):
        expected = np.empty_like(scales)
        expected[[position(n) for n in range(128)]] = scales
        np.testing.assert_array_equal(permute(jnp.asarray(scales)), expected)


def test_the_drawing_of_a_word_shows_the_marlin_layout():
    drawing = next(block for block in code_blocks(FORMATS_PAGE, "") if "i (code)" in block)

    def cells(label):
        line = next(line for line in drawing.splitlines() if line.partition("|")[0].strip() == label)
        return [cell.strip() for cell in line.split("|")[1:-1]]

    drawn = zip(cells("i (code)"), cells("row"), cells("column"), strict=True)
    for nibble, (i, row, column) in zip(range(7, -1, -1), drawn, strict=True):
        for t in range(4):
            k = 2 * t + int(row.removeprefix("2t") or 0)
            word, shift = formulas().marlin_position(k, int(column), 64, 4)
            assert (word, shift) == (4 * t, 4 * nibble), f"nibble {nibble} of the drawing"
        assert formulas().PAIR_ORDER[4][int(i)] == nibble


def test_the_drawing_of_a_fragment_shows_the_marlin_layout():
    drawing = next(block for block in code_blocks(KERNELS_PAGE, "") if "A0 = a0, a1" in block)
    word = re.search(r"\|(d1\|[^ ]+)\|", drawing).group(1).split("|")[::-1]  # from the lowest nibble
    for nibble, (letter, pair) in enumerate(word):
        for t in range(4):
            k, column = 2 * t + int(pair) + 8 * (letter in "cd"), 8 * (letter in "bd")
            assert formulas().marlin_position(k, column, 64, 4) == (4 * t, 4 * nibble)
    masks = re.findall(r"word( >> 8)? +& 0x([0-9A-F]{8}) --> A\d = (\w)0, \w1", drawing)
    assert len(masks) == 4
    for shifted, mask, letter in masks:
        taken = int(mask, 16) << (8 if shifted else 0)
        nibbles = [nibble for nibble in range(8) if taken >> 4 * nibble & 15]
        assert [word[nibble] for nibble in nibbles] == [f"{letter}0", f"{letter}1"]


def test_the_page_sizes_and_lists_aligned_slots_as_the_reference_does():
    for numel, experts, block_size in ((12, 5, 4), (3, 8, 16), (64, 64, 8), (1, 1, 8)):
        expected = reference.padded_size(numel, experts, block_size)
        assert formulas().padded_size(numel, experts, block_size) == expected
    text = flowing(FORMATS_PAGE.read_text(encoding="utf-8"))
    match = re.search(r"`topk_ids = (\[\[.*?\]\])`, E = (\d+) and B = (\d+) the list begins with `([\d |]+)`", text)
    ids = [[int(e) for e in re.findall(r"\d+", row)] for row in match.group(1).split("],")]
    listed, _, count = reference.moe_align_block_size(
        jnp.asarray(ids, jnp.int32), None, block_size=int(match.group(3)), num_experts=int(match.group(2))
    )
    assert listed[: int(count[0])].tolist() == [int(slot) for slot in match.group(4).replace("|", " ").split()]


def test_both_tables_of_formats_are_the_registry():
    rows = {names_in(row["format"])[0]: row for row in table(FORMATS_PAGE, "format", "code")}
    assert list(rows) == list(FORMATS)
    for name, row in rows.items():
        fmt = FORMATS[name]
        assert row["code"] == fmt.code.name, name
        assert row["zero point"] == (fmt.zeros or str(fmt.zero_point)), name
        assert row["scale"] == fmt.scale.name, name
        assert row["group sizes"] == ", ".join(map(str, fmt.group_sizes)), name
        assert (row["one group"], row["global scale"]) == tuple(
            "yes" if fact else "no" for fact in (fmt.per_channel, fmt.has_global_scales)
        ), name

    rows = {names_in(row["weights"])[0]: row for row in table(SUPPORT, "weights", "codes")}
    assert list(rows) == list(FORMATS)
    for name, row in rows.items():
        fmt = FORMATS[name]
        assert row["codes"] == fmt.code.name, name
        stored = f"{fmt.zeros} per group" if fmt.zeros else str(fmt.zero_point or "")
        assert row["zero point"].removesuffix(" (HQQ)") == stored, name
        scales = ", ".join(fmt.scale_dtypes) if fmt.scale == FLOAT_SCALES else fmt.scale.name
        scales += ", times a float32 per 64 columns" if fmt.has_global_scales else ""
        assert row["scales"] == scales, name
        assert row["group sizes"] == ", ".join([*map(str, fmt.group_sizes), *(["K"] if fmt.per_channel else [])]), name


@pytest.mark.parametrize("path", [SUPPORT, FORMATS_PAGE], ids=name_of)
def test_tables_of_activations_are_the_registry(path):
    found = {names_in(row["activation"])[0]: row["gated"] for row in table(path, "activation", "gated")}
    made = (jmm.swiglu(), jmm.swiglu_step(7), jmm.situ(4))
    known = {activation.name: activation for activation in (*ACTIVATIONS.values(), *made)}
    assert known.keys() == PARAMETERS.keys()
    assert found == {name: "yes" if activation.gated else "no" for name, activation in known.items()}


def test_the_table_of_schemes_is_the_registry():
    rows = table(CHECKPOINTS_PAGE, "scheme", "tensors of an expert linear")
    assert [names_in(row["scheme"])[0] for row in rows] == [scheme.__name__ for scheme in SCHEMES]
    becomes = {name for row in rows for name in re.findall(r"\b(?:int|fp|nvfp|mxfp)\d(?:_\w+)?", row["becomes"])}
    assert becomes == {name for name, row in FORMATS.items() if row.code.is_scaled}


def test_quant_methods_in_the_documents_are_those_that_the_loader_takes():
    listed = [name for row in table(SUPPORT, "scheme", "`quant_method`") for name in names_in(row["`quant_method`"])]
    assert sorted(listed) == sorted(METHODS)
    sentence = re.search(
        r"`quant_method` values are ([^.]+)\.", flowing(CHECKPOINTS_PAGE.read_text(encoding="utf-8"))
    ).group(1)
    assert names_in(sentence) == list(METHODS)


# Parts of whole models, which the table of parity has in place of them.
IN_WHOLE_MODELS = {
    "step3p5": "step3p7", "ernie4_5_vl_moe_text": "ernie4_5_vl_moe", "hy_v4_vl_text": "hy_v4_vl",
    "minimax_m3_vl_text": "minimax_m3_vl",
}  # fmt: skip


def test_the_table_of_parity_has_every_model_type_within_its_limit():
    text = FAMILIES_PAGE.read_text(encoding="utf-8")
    errors = dict(re.findall(r"^\| `([\w-]+)` \| [^|]* \| ([\d.e-]+) \|$", text, re.M))
    without_a_class = names_in(re.search(r"^Without a class there, .*$", text, re.M).group())
    refused = re.findall(r"^\| `([\w-]+)` \| [^|]+ \|$", text, re.M)
    known = {name for family in FAMILIES for name in family.model_types}
    compared = known - set(without_a_class)
    assert {IN_WHOLE_MODELS.get(name, name) for name in compared} <= errors.keys()
    assert all(float(error) <= 5e-4 for error in errors.values())
    assert refused
    assert not known & set(refused)


def test_the_table_of_models_lists_every_model_type():
    listed = [name for row in table(SUPPORT, "models", "`model_type`") for name in names_in(row["`model_type`"])]
    assert sorted(listed) == sorted(name for family in FAMILIES for name in family.model_types)


def test_the_first_snippet_of_the_readme_runs():
    snippet = code_blocks(README, "python")[0]
    demo = pathlib.Path(loading.__file__).parents[1] / "cli" / "demo_checkpoint"
    replaced, count = re.subn(r'"path/to/[^"]+"', repr(str(demo)), snippet)
    assert count == 1
    names = {}
    exec(compile(replaced, "README.md", "exec"), names)
    x = jnp.ones((3, names["layer"].router.shape[0]), jnp.bfloat16)
    np.testing.assert_array_equal(names["moe"](names["layer"], x), names["layer"](x))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_of_documents_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{name_of(path)}: {target} names no heading of {linked.name}"


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.parent.name == "docs" or p.name == "CONTRIBUTING.md"], ids=name_of
)
def test_files_that_documents_name_exist(path):
    named = set(_PATH.findall(path.read_text(encoding="utf-8")))
    missing = sorted(n for n in named if not (ROOT / n.replace("...", "jax_marlin_moe")).exists())
    assert not [name for name in missing if not name.startswith("benchmarks/results/CARD")]


def citations(path):
    for document, cited in _CITATION.findall(flowing(path.read_text(encoding="utf-8"))):
        yield from ((document, title) for title in re.findall(r'"([^"]+)"', cited))


@pytest.mark.parametrize("path", [p for p in (*SOURCES, *DOCUMENTS) if any(citations(p))], ids=name_of)
def test_citations_name_a_heading(path):
    for document, title in citations(path):
        cited = ROOT / "benchmarks" / document if document == "NOTES.md" else ROOT / document
        assert cited.is_file(), f"{name_of(path)} cites {document}"
        assert title in titles(cited), f"{name_of(path)} cites {document}, {title!r}"


def test_no_file_cites_a_document_that_is_not_here():
    found = [
        f"{name_of(path)}: {match.group()}"
        for path in (*SOURCES, *DOCUMENTS)
        for match in _FORMER_NAMES.finditer(flowing(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_documents_keep_to_the_list_of_words(path):
    prose = re.sub(r"`[^`]+`", "", _FENCE.sub("", path.read_text(encoding="utf-8")))
    if path.name == "CONTRIBUTING.md":  # its table says what not to write
        prose = re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE)
    assert not [match.group() for match in _UNWANTED.finditer(flowing(prose))]


def test_the_checks_of_documents_see_mistakes(tmp_path):
    cited = "docs/" + "formats.md"  # apart, or this file would cite it
    page = tmp_path / "page.md"
    page.write_text(f'# 1. One\n\n| a | b |\n|---|---|\n| `x` | 1 |\n\nAs {cited}, "One" and\n"Two" say.\n')
    assert titles(page) == {"One"}
    assert anchors(page) == {"1-one"}
    assert table(page, "a", "b") == [{"a": "`x`", "b": "1"}]
    with pytest.raises(AssertionError, match="0 tables"):
        table(page, "a", "c")
    assert list(citations(page)) == [(cited, "One"), (cited, "Two")]
    comment = tmp_path / "comment.h"
    comment.write_text(f'// Nibbles as {cited},\n// "Marlin\n// layout" has them.\n')
    assert list(citations(comment)) == [(cited, "Marlin layout")]
    assert _PATH.findall("`csrc/cpu/gemm.h`, see .../cuda/plan.py.") == ["csrc/cpu/gemm.h", ".../cuda/plan.py"]
    assert _FORMER_NAMES.search("FORMATS" + " sections 2 and 4")
    assert not _FORMER_NAMES.search("a row of jax_marlin_moe.FORMATS; sections of a page")
    assert _UNWANTED.search("Mended")
    assert _UNWANTED.search("a quantized linear")
    assert not _UNWANTED.search("a quantised linear, pack-quantized")
