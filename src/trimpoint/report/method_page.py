"""The reference of a method, derived from its class: nothing here is written twice."""

import dataclasses
import inspect
from typing import Any

from trimpoint.method import Bounds, Fact, Method
from trimpoint.report.table import Table


def method_data(kind: type[Method]) -> dict[str, Any]:
    """Return everything a method declares as JSON data.

    Returns:
        `name`, `summary`, `doc`, the traits (`stage`, `status`, `acts_on`, `targets`, `requires`, `removes`, `reduces`,
        `needs`), and `parameters`, each with `name`, `default`, `doc`, `range`, `choices`, `search`.
    """
    traits, doc = kind.traits, inspect.cleandoc(kind.__doc__ or "")
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
        "parameters": [_parameter(field) for field in dataclasses.fields(kind)],
    }


def _facts(facts: Fact) -> list[str]:
    return [str(fact.name).lower() for fact in Fact if fact.value and fact in facts]


def _parameter(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    bounds, search = field.metadata.get("bounds"), field.metadata.get("search")
    return {
        "name": field.name,
        "default": _plain(field.default),
        "doc": field.metadata.get("doc", ""),
        "range": str(bounds) if isinstance(bounds, Bounds) else None,
        "choices": _plain(field.metadata.get("choices")),
        "search": None if search is None else _plain(tuple(search)),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def methods_table(kinds: dict[str, type[Method]]) -> Table:
    """Return one row for each method."""
    pages = [method_data(kind) for kind in kinds.values()]
    rows = [
        (p["name"], p["stage"], p["status"], ", ".join(p["reduces"]), ", ".join(p["needs"]), p["summary"])
        for p in pages
    ]
    return Table(
        columns=("method", "stage", "status", "reduces", "needs", "what it does"),
        rows=tuple(rows),
        notes=("", "`trimpoint methods NAME` shows one with its parameters."),
    )


def method_text(data: dict[str, Any]) -> str:
    """Return the head of a method's page: its name, its documentation and its traits."""
    traits = [
        ("stage", data["stage"]),
        ("status", data["status"]),
        ("acts on", ", ".join(data["targets"]) or data["acts_on"]),
        ("requires", ", ".join(data["requires"])),
        ("removes", ", ".join(data["removes"])),
        ("reduces", ", ".join(data["reduces"])),
        ("needs", ", ".join(data["needs"])),
    ]
    lines = [f"{name:10}{value or '–'}" for name, value in traits]
    return "\n".join([data["name"], "=" * len(data["name"]), "", data["doc"], "", *lines]) + "\n"


def parameter_table(data: dict[str, Any]) -> Table:
    """Return the parameters of a method: default, range, what a search tries, meaning."""
    rows = [
        (p["name"], _cell(p["default"]), p["range"] or _cell(p["choices"]), _cell(p["search"]), p["doc"])
        for p in data["parameters"]
    ]
    return Table(columns=("parameter", "default", "range", "search tries", "meaning"), rows=tuple(rows))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
