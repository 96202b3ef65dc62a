"""The structure of PyTorch models: traced, read as coupled groups and blocks, edited in place, rebuilt elsewhere."""

from trimpoint.graph.blocks import find_blocks
from trimpoint.graph.groups import coupled_groups
from trimpoint.graph.layers import LowRank
from trimpoint.graph.rebuild import rebuild, save_structure
from trimpoint.graph.surgery import (
    AttributeEdit,
    Bypass,
    BypassEdit,
    Edit,
    ReplaceEdit,
    ResizeEdit,
    apply_edits_,
    bypass_,
    edits_from_data,
    edits_to_data,
    remove_units_,
    replace_,
)
from trimpoint.graph.trace import Trace, trace

__all__ = [
    "AttributeEdit",
    "Bypass",
    "BypassEdit",
    "Edit",
    "LowRank",
    "ReplaceEdit",
    "ResizeEdit",
    "Trace",
    "apply_edits_",
    "bypass_",
    "coupled_groups",
    "edits_from_data",
    "edits_to_data",
    "find_blocks",
    "rebuild",
    "remove_units_",
    "replace_",
    "save_structure",
    "trace",
]
