"""Atoms: the smallest things that structured pruning could remove, and what ties them to each other.

An atom is one position along one dimension of one parameter (or, for a parameter that is used as a plain tensor, one of
its elements). An *id tensor* has the shape of a tensor of the model and says for each element which atom it disappears
with; −1 stands for none. Id tensors are kept expanded with stride 0 along every dimension in which they do not vary, so
that they cost almost nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Owner = tuple[str, str]
Role = Literal["out", "in", "through"]
Kind = Literal["channels", "heads", "hidden"]
_RANK: dict[Role, int] = {"out": 0, "through": 1, "in": 2}


def compact(ids: Tensor) -> Tensor:
    """Return `ids` with size 1 along every dimension in which it does not vary."""
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1 and ids.stride(dim) == 0:
            ids = ids.narrow(dim, 0, 1)
    for dim in range(ids.dim()):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if bool((ids == first).all()):
                ids = first
    return ids


def spread(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `ids` in `shape`, with stride 0 wherever it does not vary."""
    return compact(ids).expand(tuple(shape))


def varies(ids: Tensor, dim: int) -> bool:
    """Return whether `ids` differ along `dim`."""
    return ids.shape[dim] > 1 and compact(ids).shape[dim] > 1


def _distinct(ids: Tensor) -> Tensor:
    """Return the different entries of an id tensor, sorted, `[count]`."""
    return torch.from_numpy(np.unique(ids.numpy()))


def _joint(*ids: Tensor) -> list[Tensor]:
    """Broadcast id tensors together, at the smallest common size."""
    expanded = list(torch.broadcast_tensors(*ids))  # type: ignore[no-untyped-call]
    for dim in range(expanded[0].dim()):
        if expanded[0].shape[dim] > 1 and all(part.stride(dim) == 0 for part in expanded):
            expanded = [part.narrow(dim, 0, 1) for part in expanded]
    return expanded


def first_of(first: Tensor, second: Tensor) -> Tensor:
    """Return the atoms of `first`, and those of `second` where it has none, at the smallest size that broadcasts."""
    one, other = _joint(first, second)
    return torch.where(one >= 0, one, other)


def ties(ids: Tensor, other: Tensor, heads: Tensor) -> bool:
    """Return whether one atom of `ids` meets atoms of several heads in `other`."""
    first, second = _joint(ids, other)
    met = heads[second]
    both = (first >= 0) & (met >= 0)
    if not bool(both.any()):
        return False
    pairs = np.unique(torch.stack([first[both], met[both]]).numpy(), axis=1)
    return bool(len(np.unique(pairs[0])) < pairs.shape[1])


@dataclass
class Dimension:
    """A dimension of a parameter, or all elements of one (`dim` is `None`), and its atoms `[start, start + size)`.

    Args:
        owner: path of the module and name of the parameter.
        dim: the dimension.
        shape: of the atoms: one number for a dimension, the parameter's shape for elements.
        start: the first atom.
        role: of the parameter for the channels.
    """

    owner: Owner
    dim: int | None
    shape: tuple[int, ...]
    start: int
    role: Role

    @property
    def ids(self) -> Tensor:
        """The atoms, in `shape`."""
        return torch.arange(self.start, self.start + int(np.prod(self.shape))).view(self.shape)


@dataclass(frozen=True, eq=False)
class Marked:
    """Atoms that are units of a kind, `[units]`; of those with one `alike` (if not `None`) equally many must stay."""

    ids: Tensor
    kind: Kind
    alike: str | None


@dataclass
class Atoms:
    """Atoms of a model, the couplings between them, and why some must not be removed.

    What depends on which atoms belong together is recorded first and decided by `solve`.
    """

    dimensions: dict[tuple[Owner, int | None], Dimension] = field(default_factory=dict)
    count: int = 0
    marked: list[Marked] = field(default_factory=list)
    _edges: list[np.ndarray] = field(default_factory=list)
    _heads: list[np.ndarray] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _frozen_owners: dict[Owner, str] = field(default_factory=dict)
    _constant: list[tuple[Tensor, tuple[int, ...], str]] = field(default_factory=list)
    _fixed: list[tuple[Tensor, Tensor, tuple[int, ...], str]] = field(default_factory=list)
    _watched: list[tuple[Tensor, str]] = field(default_factory=list)

    def dimension(self, owner: Owner, dim: int, size: int, role: Role) -> Tensor:
        """Return the atoms of a dimension of a parameter, `[size]`; always the same for the same dimension."""
        return self._register(owner, dim, (size,), role)

    def elements(self, owner: Owner, shape: Sequence[int]) -> Tensor:
        """Return the atoms of a parameter that is used as a tensor, in its shape.

        Where only one dimension is longer than 1, these are the atoms of that dimension.
        """
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) == 1:
            return self.dimension(owner, long[0], shape[long[0]], "through").view(tuple(shape))
        if not long:
            return torch.full(tuple(shape), -1)
        return self._register(owner, None, tuple(shape), "through")

    def _register(self, owner: Owner, dim: int | None, shape: tuple[int, ...], role: Role) -> Tensor:
        entry = self.dimensions.get((owner, dim))
        if entry is None:
            entry = self.dimensions[owner, dim] = Dimension(owner, dim, shape, self.count, role)
            self.count += int(np.prod(shape))
        if _RANK[role] < _RANK[entry.role]:
            entry.role = role
        return entry.ids

    def are_elements(self, ids: Tensor) -> bool:
        """Return whether any of these atoms is an element of a parameter that is used as a tensor."""
        atoms = _distinct(compact(ids))
        ranges = [(part.start, int(np.prod(part.shape))) for part in self.dimensions.values() if part.dim is None]
        return any(bool(((atoms >= start) & (atoms < start + size)).any()) for start, size in ranges)

    def couple(self, *ids: Tensor, heads: bool = False) -> None:
        """Let the atoms that meet at a position of these broadcast id tensors be removed together or not at all.

        Args:
            ids: the tensors.
            heads: whether what meets is of one head of attention.
        """
        first, *rest = _joint(*ids)
        for other in rest:
            both = (first >= 0) & (other >= 0) & (first != other)
            if bool(both.any()):
                self._edges.append(np.unique(torch.stack([first[both], other[both]]).numpy(), axis=1))
                if heads:
                    self._heads.append(self._edges[-1])

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Never remove the atoms in `ids`."""
        atoms = _distinct(compact(ids))
        if bool((atoms >= 0).any()):
            self._frozen.append((atoms[atoms >= 0], reason))

    def freeze_owner(self, owner: Owner, reason: str) -> None:
        """Never remove anything of a parameter."""
        self._frozen_owners.setdefault(owner, reason)

    def consume(self, ids: Tensor, dimension: Tensor, reason: str) -> None:
        """Couple a dimension of a parameter with what it reads; where that is no atom, the dimension stays."""
        self.couple(ids, dimension)
        read, own = _joint(ids, dimension)
        self.freeze(own[read < 0], reason)

    def couple_strictly(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Couple what meets at each position; what meets no atom stays."""
        self.couple(first, second)
        one, other = _joint(first, second)
        self.freeze(torch.cat([one[other < 0], other[one < 0]]), reason)

    def require_constant(self, ids: Tensor, dims: Iterable[int], reason: str) -> None:
        """Keep the atoms of `ids` if, in the end, they differ along `dims`."""
        self._constant.append((compact(ids), tuple(dim % ids.dim() for dim in dims), reason))

    def require_size(self, ids: Tensor, other: Tensor, dims: Sequence[int], reason: str) -> None:
        """Keep the atoms of `ids` that differ along `dims`, in which the tensor of `other` has a size of its own.

        Args:
            ids: of the result of an elementwise operator.
            other: of one operand, broadcast to the result; −1 where it has no atom.
            dims: in which the operand is not broadcast.
            reason: why they are kept.
        """
        parts = _joint(ids, other)
        if bool(((parts[0] >= 0) & (parts[1] < 0)).any()):
            self._fixed.append((parts[0], parts[1], tuple(dims), reason))

    def watch(self, ids: Tensor, reason: str) -> None:
        """Keep the atoms whose removal would not leave this tensor rectangular."""
        small = compact(ids)
        if sum(size > 1 for size in small.shape) > 1:
            self._watched.append((small, reason))

    def mark(self, ids: Tensor, kind: Kind, alike: str | None = None) -> None:
        """Say what kind of unit the atoms in `ids`, `[units]`, are.

        Args:
            ids: one for each unit.
            kind: of the units; others are channels.
            alike: path of a module with one size for several sets of units, of which equally many must stay.
        """
        if not any(entry.alike == alike and torch.equal(entry.ids, ids) for entry in self.marked):
            self.marked.append(Marked(ids, kind, alike))

    def solve(self) -> tuple[np.ndarray, dict[int, str]]:
        """Return the class of each atom, and for each class that must not be removed the reason.

        Atoms of one class can only be removed together.
        """
        classes = self._components(self._edges)
        lookup = torch.from_numpy(np.append(classes, -1))
        reasons: dict[int, str] = {}

        def keep(found: Tensor, reason: str) -> None:
            for label in _distinct(found).tolist():
                if label >= 0:
                    reasons.setdefault(label, reason)

        for atoms, reason in self._frozen:
            keep(lookup[atoms], reason)
        for dimension in self.dimensions.values():
            if dimension.owner in self._frozen_owners:
                keep(lookup[dimension.ids.flatten()], self._frozen_owners[dimension.owner])
        self._decide(lambda ids: lookup[ids], keep)
        return classes, reasons

    def _components(self, edges: Sequence[np.ndarray]) -> np.ndarray:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), np.int64)
        matrix = coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(self.count, self.count))
        labels: np.ndarray = connected_components(matrix, directed=False)[1].astype(np.int64)
        return labels

    def tied_heads(self, classes: np.ndarray) -> Tensor | None:
        """Return for each atom its head, or −1, `[count + 1]`, where heads of one tensor are coupled; else `None`."""
        sets = [entry.ids.numpy() for entry in self.marked if entry.kind == "heads"]
        if not sets:
            return None
        labels = self._components(self._heads)
        if all(len(np.unique(classes[ids])) == len(np.unique(labels[ids])) for ids in sets):
            return None
        known = np.isin(labels, np.unique(labels[np.concatenate(sets)]))
        return torch.from_numpy(np.append(np.where(known, labels, -1), -1))

    def _decide(self, resolve: Callable[[Tensor], Tensor], keep: Callable[[Tensor, str], None]) -> None:
        for ids, dims, reason in self._constant:
            labels = compact(resolve(ids))
            if any(labels.shape[dim] > 1 for dim in dims):
                keep(labels, reason)
        for ids, other, dims, reason in self._fixed:
            labels = resolve(ids)
            shape = compact(labels).shape
            if any(shape[dim] > 1 for dim in dims):
                keep(labels[other < 0], reason)
        alike = self._alike()
        for ids, reason in self._watched:
            if len(ragged(compact(resolve(alike[ids])))):
                keep(ragged(compact(resolve(ids))), reason)
        for dimension in self.dimensions.values():
            if dimension.dim is None:
                keep(ragged(compact(resolve(dimension.ids))), "a parameter is used in it in several dimensions at once")

    def _alike(self) -> Tensor:
        """Return for each atom the one in its place in the first set that must stay as large, `[count + 1]`."""
        stands = torch.cat([torch.arange(self.count), torch.tensor([-1])])
        first: dict[str, Tensor] = {}
        for entry in self.marked:
            if entry.alike is not None and first.setdefault(entry.alike, entry.ids).shape == entry.ids.shape:
                stands[entry.ids] = first[entry.alike]
        return stands


def ragged(labels: Tensor) -> Tensor:
    """Return the classes whose removal would not leave the tensor rectangular.

    A class can go if its elements are whole slices along one dimension.
    """
    if sum(size > 1 for size in labels.shape) < 2:
        return labels.new_empty(0)
    flat = labels.flatten()
    fine: list[np.ndarray] = []
    for dim, size in enumerate(labels.shape):
        if size == 1:
            continue
        position = torch.arange(size).view([-1 if d == dim else 1 for d in range(labels.dim())]).expand(labels.shape)
        keys, counts = np.unique((flat * size + position.flatten()).numpy(), return_counts=True)
        partial = keys[counts < flat.numel() // size] // size
        fine.append(np.setdiff1d(flat.numpy(), partial))
    return torch.from_numpy(np.setdiff1d(flat.numpy(), np.concatenate(fine)))
