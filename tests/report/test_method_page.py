"""The reference of the methods: complete, as the classes say, the same on the page and on the terminal."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest

from trimpoint.cli import main
from trimpoint.method import Bounds, Method, Stage, Traits, param
from trimpoint.registry import all_methods
from trimpoint.report.method_page import (
    HEADINGS,
    STAGES,
    method_data,
    method_markdown,
    method_text,
    methods_table,
    parameter_table,
    reference_page,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "methods.md"


@dataclass(frozen=True, kw_only=True)
class ShrinkThings(Method):
    """Shrink things, or a|b of them.

    A second paragraph
    of two lines.

    When it pays:
        Never, by
        design.
    What it costs:
        Nothing.
    Needs:
        Things.
    Leaves alone:
        All else.

    References:
        Nobody, "Nothing" (2020).
    """

    ratio: float = param(0.5, doc="share", bounds=Bounds(ge=0, lt=1), search=(0.25, 0.5))
    other: float = param(0.1, doc="never varied", search=(1, 2))
    kind: str = param("a", doc="a or b", choices=("a", "b"), reference=True)
    fast: bool = param(False, doc="whether")
    limit: int | None = param(None, doc="most")

    traits: ClassVar[Traits] = Traits(stage=Stage.STRUCTURE, acts_on="model", reduces=frozenset({"params"}))

    def apply(self, ctx):
        """Do nothing."""


def test_the_committed_page_is_what_the_classes_say():
    hint = "run `trimpoint methods --format markdown > docs/reference/methods.md`"
    assert PAGE.read_text(encoding="utf-8") == reference_page(all_methods()), hint


def test_the_verb_writes_the_page_and_one_method_of_it(capsys):
    assert main(["methods", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8")
    assert main(["methods", "drop-blocks", "--format", "markdown"]) == 0
    alone = capsys.readouterr().out
    assert alone == method_markdown(method_data(all_methods()["drop-blocks"]))
    assert f"##{alone}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(all_methods()))
def test_every_method_has_all_headings_and_says_the_same_in_both_places(name):
    data = method_data(all_methods()[name])
    page, terminal = method_markdown(data), method_text(data) + parameter_table(data).plain()
    for heading in HEADINGS:
        assert page.count(f"**{heading}.** ") == 1
        assert f"{heading}:\n" in terminal
    words = [" ".join(text.split()) for text in (page, terminal)]
    for line in (line.strip() for line in data["doc"].splitlines()):
        if line.rstrip(":") not in HEADINGS:
            assert all(" ".join(line.split()) in text for text in words)
    for value in (data["search"], *(p["doc"] for p in data["parameters"])):
        assert value in page
        assert value in terminal
    for field in fields(all_methods()[name]):
        assert f"| `{field.name}` |" in page


def test_stages_come_in_their_order_and_all_are_explained():
    assert set(STAGES) == set(Stage)
    assert list(STAGES) == sorted(Stage)
    rows = methods_table(all_methods()).rows
    assert [Stage[row[1].upper()] for row in rows] == sorted(Stage[row[1].upper()] for row in rows)
    assert re.findall(r"^### (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == [row[0] for row in rows]


def test_zeros_are_not_said_to_make_anything_faster():
    weights = method_data(all_methods()["prune-weights"])
    assert "Nothing gets faster" in weights["doc"]
    assert weights["reduces"] == ["coded_bytes"]
    assert "no runtime here gets faster" in STAGES[Stage.SPARSIFY]


def test_what_a_search_tries_is_what_variants_are_made_of():
    data = method_data(ShrinkThings)
    assert [method.ratio for method in ShrinkThings.variants((), ())] == [0.25, 0.5]
    assert {method.other for method in ShrinkThings.variants((), ())} == {0.1}
    assert data["search"] == "the values of `ratio` in the table"
    assert [p["search"] for p in data["parameters"]] == [[0.25, 0.5], None, None, None, None]
    blocks = method_data(all_methods()["drop-blocks"])
    assert blocks["search"].startswith("every combination of how many blocks")
    assert all(p["search"] is None for p in blocks["parameters"])
    for kind in all_methods().values():
        assert ("nothing" in method_data(kind)["search"]) == (
            kind.traits.status == "experimental" and kind.traits.stage is not Stage.RECOVER
        )


def test_a_page_in_full():
    assert method_markdown(method_data(ShrinkThings)) == (
        "# shrink-things\n"
        "\nShrink things, or a|b of them.\n"
        "\nA second paragraph of two lines.\n"
        "\n**When it pays.** Never, by design.\n"
        "\n**What it costs.** Nothing.\n"
        "\n**Needs.** Things.\n"
        "\n**Leaves alone.** All else.\n"
        '\n**References.** Nobody, "Nothing" (2020).\n'
        "\n| trait | value |\n| --- | --- |\n"
        "| stage | structure |\n| status | stable |\n| acts on | model |\n| requires | – |\n| removes | – |\n"
        "| reduces | params |\n| needs | – |\n| a search tries | the values of `ratio` in the table |\n"
        "\n| parameter | default | values | search tries | meaning |\n| --- | --- | --- | --- | --- |\n"
        "| `ratio` | 0.5 | [0, 1) | 0.25, 0.5 | share |\n"
        "| `other` | 0.1 | – | – | never varied |\n"
        "| `kind` | a | a, b, or a reference | – | a or b |\n"
        "| `fast` | false | true, false | – | whether |\n"
        "| `limit` | – | – | – | most |\n"
    )
    assert "or a\\|b of them" in reference_page({"shrink-things": ShrinkThings})
