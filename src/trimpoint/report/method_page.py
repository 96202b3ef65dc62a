"""The reference of the methods, derived from their classes: nothing here is written twice."""

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimpoint.method import Bounds, Fact, Method, Stage
from trimpoint.report.table import Table

HEADINGS = ("When it pays", "What it costs", "Needs", "Leaves alone", "References")
STAGES = {
    Stage.STRUCTURE: "Parts of the model go: blocks, channels, heads, hidden units, rows. What is left is dense.",
    Stage.FACTORIZE: "Layers become products of thinner ones.",
    Stage.SPARSIFY: "Single weights are held at zero. Shapes stay as they are, so no runtime here gets faster by it, "
    "and the file that it loads is as large as before; only the compressed file, in a download or an archive, is "
    "smaller.",
    Stage.QUANTIZE: "Numbers of fewer bits, which the target's runtime realises.",
    Stage.RECOVER: "Training that brings quality back. It may stand anywhere in a plan; all others stand in the order "
    "of the stages on this page.",
}
_FACTS = dict(re.findall(r"^ +([A-Z_]+): (.+)\.$", Fact.__doc__ or "", flags=re.MULTILINE))
_SEARCHED = (Stage.STRUCTURE, Stage.FACTORIZE, Stage.QUANTIZE)
_PREAMBLE = """\
# Methods

Made by `trimpoint methods --format markdown > docs/reference/methods.md`; do not edit. `trimpoint methods NAME` shows
the same of one method.

A *stable* method is part of the default search. An *experimental* one has no committed benchmark yet that shows its
gain: it can be used in plans, and a search leaves it out. What a method *reduces* is claimed of the exported file.
None of it is time: a network with half of the multiplications may be no faster, so measure. What it *requires* and
*removes* are facts about a module, by which methods keep out of each other's way:
"""


def method_data(kind: type[Method]) -> dict[str, Any]:
    """Return everything a method declares as JSON data.

    Returns:
        `name`, `summary`, `doc`, the traits (`stage`, `status`, `acts_on`, `targets`, `requires`, `removes`, `reduces`,
        `needs`), `search` (what a search tries, in words), and `parameters`, each with `name`, `default`, `doc`,
        `range`, `choices`, `reference` (whether it may name an object of the user's own) and `search`.
    """
    traits, doc = kind.traits, inspect.cleandoc(kind.__doc__ or "")
    varied, tried = _search(kind)
    return {
        "name": kind.method_name(),
        "summary": doc.split("\n\n")[0].replace("\n", " "),
        "doc": doc,
        "stage": traits.stage.name.lower(),
        "status": traits.status,
        "acts_on": traits.acts_on,
        "targets": list(traits.targets),
        "requires": _facts(traits.requires),
        "removes": _facts(traits.removes),
        "reduces": sorted(traits.reduces),
        "needs": sorted(traits.needs),
        "search": tried,
        "parameters": [_parameter(field, field.name == varied) for field in dataclasses.fields(kind)],
    }


def _facts(facts: Fact) -> list[str]:
    return [str(fact.name).lower() for fact in Fact if fact.value and fact in facts]


def _search(kind: type[Method]) -> tuple[str, str]:
    """Return the parameter that a search varies, empty where none is, and what a search tries in words."""
    if kind.traits.stage is Stage.RECOVER:
        return "", "its length, where it is the recovery that the search was given or takes by default"
    if kind.traits.stage not in _SEARCHED:
        return "", "nothing: methods of this stage are for plans alone"
    if vars(kind).get("variants") is not None:
        text = inspect.cleandoc(kind.variants.__doc__ or "").split("\n")[0]
        varied, tried = "", text.removeprefix("Return ").rstrip(".")
    else:
        varied = next((f.name for f in dataclasses.fields(kind) if f.metadata.get("search")), "")
        tried = f"the values of `{varied}` in the table" if varied else "its defaults"
    return varied, f"nothing while it is experimental, then {tried}" if kind.traits.status == "experimental" else tried


def _parameter(field: "dataclasses.Field[Any]", varied: bool) -> dict[str, Any]:
    bounds = field.metadata.get("bounds")
    return {
        "name": field.name,
        "default": _plain(field.default),
        "doc": field.metadata.get("doc", ""),
        "range": str(bounds) if isinstance(bounds, Bounds) else None,
        "choices": _plain(field.metadata.get("choices")),
        "reference": bool(field.metadata.get("reference")),
        "search": _plain(tuple(field.metadata["search"])) if varied else None,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def methods_table(kinds: Mapping[str, type[Method]]) -> Table:
    """Return one row for each method, by stage."""
    return Table(
        columns=("method", "stage", "status", "reduces", "needs", "what it does"),
        rows=tuple(_row(method_data(kind)) for kind in _by_stage(kinds)),
        notes=("", *_legend(), "", "`trimpoint methods NAME` shows one with its parameters."),
    )


def _legend() -> list[str]:
    """Return what the names of facts mean, one to a line."""
    return [f"{name.lower()}: {words}" for name, words in _FACTS.items()]


def _by_stage(kinds: Mapping[str, type[Method]]) -> list[type[Method]]:
    return sorted(kinds.values(), key=lambda kind: (kind.traits.stage, kind.method_name()))


def _row(data: Mapping[str, Any]) -> tuple[str, ...]:
    listed = (", ".join(data[key]) or "–" for key in ("reduces", "needs"))
    return (data["name"], data["stage"], data["status"], *listed, data["summary"])


def method_text(data: Mapping[str, Any]) -> str:
    """Return the head of a method's page: its name, its documentation and its traits."""
    lines = [f"{name:15}{value}" for name, value in _traits(data)]
    return "\n".join([data["name"], "=" * len(data["name"]), "", data["doc"], "", *lines]) + "\n"


def _traits(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {name: ", ".join(data[name]) or "–" for name in ("requires", "removes", "reduces", "needs")}
    acts_on = ", ".join(data["targets"]) or data["acts_on"]
    return [
        ("stage", data["stage"]),
        ("status", data["status"]),
        ("acts on", acts_on),
        *named.items(),
        ("a search tries", data["search"]),
    ]


def parameter_table(data: Mapping[str, Any]) -> Table:
    """Return the parameters of a method: default, values, what a search tries, meaning."""
    rows = [(p["name"], _cell(p["default"]), _values(p), _cell(p["search"]), p["doc"]) for p in data["parameters"]]
    return Table(columns=("parameter", "default", "values", "search tries", "meaning"), rows=tuple(rows))


def _values(parameter: Mapping[str, Any]) -> str:
    """Return what a parameter may be: a range, words, or what its default tells."""
    found = [parameter["range"] or _cell(parameter["choices"])]
    if found == ["–"]:
        found = ["true, false"] if isinstance(parameter["default"], bool) else found
    return ", ".join([*found, *(["or a reference"] if parameter["reference"] else [])])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def reference_page(kinds: Mapping[str, type[Method]]) -> str:
    """Return the page of all methods in Markdown: a table of them, then each by its stage."""
    table = methods_table(kinds)
    linked = [(f"[{name}](#{name})", *rest) for name, *rest in table.rows]
    legend = "".join(f"- {line}\n" for line in _legend())
    parts = [_PREAMBLE, legend, _markdown_table(table.columns, linked)]
    for stage, words in STAGES.items():
        if found := [kind for kind in _by_stage(kinds) if kind.traits.stage is stage]:
            parts += [f"## {stage.name.capitalize()}\n\n{words}\n"]
            parts += [method_markdown(method_data(kind), level=3) for kind in found]
    return "\n".join(parts)


def method_markdown(data: Mapping[str, Any], level: int = 1) -> str:
    """Return the page of one method in Markdown."""
    about, sections = _sections(data["doc"])
    parts = [f"{'#' * level} {data['name']}\n", *(f"{paragraph}\n" for paragraph in about)]
    parts += [f"**{heading}.** {text}\n" for heading, text in sections.items()]
    parts.append(_markdown_table(("trait", "value"), _traits(data)))
    if data["parameters"]:
        table = parameter_table(data)
        parts.append(_markdown_table(table.columns, [(f"`{name}`", *rest) for name, *rest in table.rows]))
    return "\n".join(parts)


def _sections(doc: str) -> tuple[list[str], dict[str, str]]:
    """Return the paragraphs of a docstring before its first heading, and heading → text; lines are joined."""
    about, *rest = re.split(rf"^({'|'.join(HEADINGS)}):$", doc, flags=re.MULTILINE)
    texts = [" ".join(text.split()) for text in rest[1::2]]
    paragraphs = [" ".join(paragraph.split()) for paragraph in about.split("\n\n")]
    return [paragraph for paragraph in paragraphs if paragraph], dict(zip(rest[::2], texts, strict=True))


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
