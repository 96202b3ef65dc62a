"""The structure of PyTorch models: traced, read as coupled groups and blocks, edited in place, rebuilt elsewhere."""

from trimpoint.graph.blocks import find_blocks
from trimpoint.graph.codebooks import Codebook, share_
from trimpoint.graph.edits import CodebookEdit, GridEdit, InputGridEdit, MaskEdit
from trimpoint.graph.grids import OnGates, OnGrid, OnGroups, grids_of, put_on_grid_
from trimpoint.graph.groups import coupled_groups
from trimpoint.graph.held import bake_, baked, why_not_held
from trimpoint.graph.hidden_heads import find_groups
from trimpoint.graph.input_grids import InputGrid, input_ranges, put_input_on_grid_
from trimpoint.graph.layers import LowRank
from trimpoint.graph.masks import Mask, ScheduledMask, kept_by, mask_, masks_of
from trimpoint.graph.pruned_attention import PrunedAttention, pruned_attention, why_unprunable
from trimpoint.graph.rebuild import rebuild, save_structure
from trimpoint.graph.signs import OnSigns
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
    "Codebook",
    "CodebookEdit",
    "Edit",
    "GridEdit",
    "InputGrid",
    "InputGridEdit",
    "LowRank",
    "Mask",
    "MaskEdit",
    "OnGates",
    "OnGrid",
    "OnGroups",
    "OnSigns",
    "PrunedAttention",
    "ReplaceEdit",
    "ResizeEdit",
    "ScheduledMask",
    "Trace",
    "apply_edits_",
    "bake_",
    "baked",
    "bypass_",
    "coupled_groups",
    "edits_from_data",
    "edits_to_data",
    "find_blocks",
    "find_groups",
    "grids_of",
    "input_ranges",
    "kept_by",
    "mask_",
    "masks_of",
    "pruned_attention",
    "put_input_on_grid_",
    "put_on_grid_",
    "rebuild",
    "remove_units_",
    "replace_",
    "save_structure",
    "share_",
    "trace",
    "why_not_held",
    "why_unprunable",
]
