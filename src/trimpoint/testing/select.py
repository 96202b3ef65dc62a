"""Which models of the zoo a check looks at, given what a method acts on."""

import dataclasses
from collections.abc import Callable
from functools import cache
from itertools import islice

from trimpoint.method import Method
from trimpoint.testing.zoo import ZooEntry, zoo

Select = Callable[[Method], tuple[ZooEntry, ...]]

_ORDER = ("resnet", "transformer", "cnn", "separable", "dict_outputs", "tied", "lstm", "attention")
"""Ordinary models first: what needs several compressions is looked at on these, in this order."""


def every(_: Method) -> tuple[ZooEntry, ...]:
    """Return the whole zoo."""
    return tuple(zoo().values())


def first(method: Method) -> tuple[ZooEntry, ...]:
    """Return one model, for checks that look at the method rather than at what it does."""
    return suited(1)(method)


def suited(count: int) -> Select:
    """Return a selection of the first `count` models on which a method has something to do."""

    def select(method: Method) -> tuple[ZooEntry, ...]:
        ordered = sorted(zoo().values(), key=lambda entry: _rank(entry.name))
        return tuple(islice((entry for entry in ordered if acts_on(method, entry)), count))

    return select


def acts_on(method: Method, entry: ZooEntry) -> bool:
    """Return whether the model has what the method's traits say it acts on."""
    traits = method.traits
    if traits.acts_on == "blocks":
        return "residual" in entry.features
    if traits.targets:
        return bool(set(traits.targets) & _classes(entry.name))
    if traits.acts_on == "groups":
        return bool({"conv", "linear"} & entry.features) and "root" not in entry.features
    return "no_parameters" not in entry.features


def has_noop(method: Method) -> bool:
    """Return whether a parameter of the method declares the value at which it does nothing."""
    return any("noop" in field.metadata for field in dataclasses.fields(method))


def has_strength(method: Method) -> bool:
    """Return whether a parameter of the method declares a value at which it does less than at its default."""
    return any("weak" in field.metadata for field in dataclasses.fields(method))


def class_names(kind: type) -> tuple[str, ...]:
    """Return the names of a class and of all its bases."""
    return tuple(base.__name__ for base in kind.__mro__)


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


@cache
def _classes(name: str) -> frozenset[str]:
    model, _ = zoo()[name].make()
    return frozenset(base for module in model.modules() for base in class_names(type(module)))
