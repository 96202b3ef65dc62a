"""Remove the rows of an embedding that the task's data never needs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimpoint.errors import DataError
from trimpoint.graph.layers import PrunedVocabulary
from trimpoint.losses import call, explained
from trimpoint.method import Bounds, Context, Fact, Method, Site, Stage, Traits, param
from trimpoint.padding import kept_positions
from trimpoint.signature import flatten
from trimpoint.task import Role, Task

_ID_BYTES = 4
_CHUNK = 1024
"""Rows that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class PruneVocabulary(Method):
    """Keep the rows of a vocabulary whose ids occur in the training and calibration data; the others become unknown.

    The model goes on taking the same ids: a table of four bytes an id leads each to its row, and those without a row
    to one that stands for it: the most similar one that is left, the mean of those that went, or that of an id of your
    own.

    When it pays:
        For a model that was pretrained on a large vocabulary and serves a narrow task: the embedding is often half of
        the file. It makes nothing faster: a row is read by its number, however many there are.
    What it costs:
        Words that were never seen in training lose their own meaning for that of a similar word. The change says what
        share of the tokens in `select` that concerns, padding left out (`padding_idx`, and what a mask such as
        `attention_mask` marks): where it is more than a few in a thousand, give more data.
    Needs:
        `train` data; ids that are an input of the model as they are.
    Leaves alone:
        Embeddings that are tied to another layer, read something other than an input of the model (such as positions),
        would not become smaller, or would keep no row but those of padding and `unknown`. Padding counts like any other
        id in `train` and `calibrate`: the model reads its row too.

    References:
        Abdaoui, Pradel and Sigel, "Load what you need: smaller versions of multilingual BERT" (2020).
    """

    min_count: int = param(
        1,
        doc="how often an id must occur in `train` and `calibrate` together to keep its row; 0 keeps all",
        bounds=Bounds(ge=0),
        noop=0,
    )
    others: str = param(
        "nearest",
        doc="what ids without a row read: each the row that is most similar to its own (cosine, the mean of all rows "
        "removed), or all of them one more row, the mean of those that go",
        choices=("nearest", "mean"),
    )
    unknown: int | None = param(
        None, doc="id whose row stands for all ids without one, whatever `others` says", bounds=Bounds(ge=0)
    )

    traits: ClassVar[Traits] = Traits(
        stage=Stage.STRUCTURE,
        targets=("Embedding",),
        requires=Fact.FLOAT_WEIGHT,
        removes=Fact.ORIGINAL_SHAPE,
        reduces=frozenset({"params", "file_bytes"}),
        needs=frozenset({"train"}),
        status="experimental",
    )

    def apply(self, ctx: Context) -> None:
        """Replace every embedding in scope that becomes smaller."""
        sites = [site for site in ctx.modules() if not self._unfit(ctx, site)]
        if not sites or ctx.task is None:
            return
        read = _leaves_read(ctx.module, ctx.task, [site.path for site in sites])
        for site in sites:
            leaves = read[site.path]
            if not leaves:
                ctx.skip(site.path, "what it reads is no input of the model as it is, so its ids cannot be counted")
                continue
            self._prune(ctx, site, leaves)

    def _unfit(self, ctx: Context, site: Site) -> bool:
        reason = ""
        if self.min_count == 0:
            reason = "min_count=0 keeps every row"
        elif site.tied:
            reason = "its weight is tied to another layer's"
        elif type(site.module) is not nn.Embedding or site.module.max_norm is not None:
            reason = f"a {type(site.module).__name__} does more than to look rows up"
        if reason:
            ctx.skip(site.path, reason)
        return bool(reason)

    def _prune(self, ctx: Context, site: Site, leaves: Sequence[int]) -> None:
        embedding, task = cast(nn.Embedding, site.module), cast(Task, ctx.task)
        size, padding = embedding.num_embeddings, embedding.padding_idx
        counts = _counts(task, "train", leaves, size) + _counts(task, "calibrate", leaves, size)
        if self.unknown is not None and self.unknown >= size:
            ctx.skip(site.path, f"it has no id {self.unknown} (`unknown`): name its embedding with `where`")
            return
        kept = counts >= self.min_count
        if not any(at != padding for at in kept.nonzero().flatten().tolist()):
            ctx.skip(site.path, f"no id but padding occurs {self.min_count:,} times (`min_count`): no row would stay")
            return
        for special in (padding, self.unknown):
            if special is not None:
                kept[special] = True
        gone = int((~kept).sum())
        row_bytes = embedding.embedding_dim * embedding.weight.element_size()
        if gone == 0 or (gone - 1) * row_bytes <= len(kept) * _ID_BYTES:
            ctx.skip(
                site.path,
                f"{gone:,} of {len(kept):,} rows are not needed: the table that leads ids to rows would be larger",
            )
            return
        unknown = _counts(task, "select", leaves, size, masked=False)
        if padding is not None:
            unknown[padding] = 0
        share = float(unknown[~kept].sum()) / max(1, int(unknown.sum()))
        reason = f"{gone:,} of {len(kept):,} rows go"
        if task.has("select"):
            reason += f"; {share:.2%} of the ids in `select` are unknown now"
        ctx.replace(site.path, pruned(embedding, kept, self.unknown, nearest=self.others == "nearest"), reason)


@torch.no_grad()
def pruned(
    embedding: nn.Embedding, kept: Tensor, unknown: int | None = None, *, nearest: bool = False
) -> PrunedVocabulary:
    """Return an embedding with the rows `kept`, to which the other ids lead as well.

    Args:
        embedding: `[num_embeddings, embedding_dim]`.
        kept: `[num_embeddings]`, boolean, not all of them true.
        unknown: id whose row the other ids read; by default a row of its own, the mean of those that go.
        nearest: without `unknown`, each other id reads the row that is most similar to its own.
    """
    rows, new = embedding.weight[kept], torch.cumsum(kept, 0) - 1
    padding = None if embedding.padding_idx is None else int(new[embedding.padding_idx])
    if unknown is None and not nearest:
        mean = embedding.weight[~kept].double().mean(0, keepdim=True).to(rows.dtype)
        rows = torch.cat([rows, mean])
    remap = torch.where(kept, new, len(rows) - 1 if unknown is None else int(new[unknown]))
    if unknown is None and nearest:
        remap[~kept] = _nearest(embedding.weight, kept, padding)
    with torch.random.fork_rng(devices=[]):
        made = PrunedVocabulary(embedding.num_embeddings, embedding.embedding_dim, len(rows), padding)
    result = made.to(rows.device, rows.dtype)
    result.table.weight.copy_(rows).requires_grad_(embedding.weight.requires_grad)
    result.remap.copy_(remap)
    return result


def _nearest(weight: Tensor, kept: Tensor, padding: int | None) -> Tensor:
    """Return for each row that goes the number of the most similar one that stays, padding excepted, `[gone]`."""
    centred = weight.float() - weight.float().mean(0)
    rows = nn.functional.normalize(centred, dim=1)
    left = rows[kept].T
    found = []
    for part in torch.split(rows[~kept], _CHUNK):
        similar = part @ left
        if padding is not None and left.shape[1] > 1:
            similar[:, padding] = -math.inf
        found.append(similar.argmax(1))
    return torch.cat(found)


def _leaves_read(model: nn.Module, task: Task, paths: Sequence[str]) -> dict[str, list[int]]:
    """Return for each embedding which inputs of the model it reads as they are; none where it reads anything else.

    Over the example batch and all of `calibrate` and `select`: a few samples may agree by chance.
    """
    leaves: list[Any] = []
    calls: dict[str, list[set[int]]] = {path: [] for path in paths}
    turn: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = next(iter((*args, *kwargs.values())), None)
            same = {i for i, leaf in enumerate(leaves) if isinstance(ids, Tensor) and _same(leaf, ids)}
            at = turn[path] = turn.get(path, -1) + 1
            if at == len(calls[path]):
                calls[path].append(same)
            else:
                calls[path][at] &= same

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True) for path in paths]
    try:
        with torch.no_grad():
            for inputs in _all_inputs(task):
                leaves[:] = flatten(inputs)
                turn.clear()
                with explained(inputs):
                    call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: sorted(set().union(*sets)) if all(sets) else [] for path, sets in calls.items()}


def _all_inputs(task: Task) -> Iterator[Any]:
    yield task.example_batch(2)
    roles: tuple[Role, ...] = ("calibrate", "select")
    for role in roles:
        if task.has(role):
            yield from (inputs for inputs, _ in task.batches(role))


def _same(leaf: Any, ids: Tensor) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_floating_point() and torch.equal(leaf, ids.to(leaf.dtype))


def _counts(task: Task, role: Role, leaves: Sequence[int], size: int, *, masked: bool = True) -> Tensor:
    """Return how often each id occurs in the inputs `leaves` of a role, `[size]`; zeros without that data.

    Args:
        task: with the data.
        role: of the data.
        leaves: numbers of the inputs.
        size: number of ids.
        masked: whether positions count that a mask marks as padding.

    Raises:
        DataError: if there is an id that the embedding has not.
    """
    total = torch.zeros(size, dtype=torch.long)
    if task.has(role):
        for inputs, _ in task.batches(role):
            found, real = flatten(inputs), None if masked else kept_positions(inputs)
            for leaf in leaves:
                ids = found[leaf].long()
                ids = ids[real] if real is not None and real.shape == ids.shape else ids.flatten()
                if len(wrong := ids[(ids < 0) | (ids >= size)]):
                    raise DataError(
                        f"An id of the `{role}` data must be in [0, {size}), the rows of the embedding. Got "
                        f"{int(wrong[0])}.",
                        "give an id of the vocabulary at padded positions too; -100 is for targets alone",
                    )
                total += torch.bincount(ids, minlength=size)
    return total
