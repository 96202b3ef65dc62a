"""The structure of PyTorch models: traced, read as coupled groups and blocks, edited in place, rebuilt elsewhere."""

from trimpoint.graph.blocks import find_blocks
from trimpoint.graph.edits import MaskEdit
from trimpoint.graph.groups import coupled_groups
from trimpoint.graph.hidden_heads import find_groups
from trimpoint.graph.layers import LowRank
from trimpoint.graph.masks import Mask, ScheduledMask, bake_masks_, baked, mask_, masks_of, why_not_maskable
from trimpoint.graph.pruned_attention import PrunedAttention, pruned_attention, why_unprunable
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
    "Mask",
    "MaskEdit",
    "PrunedAttention",
    "ReplaceEdit",
    "ResizeEdit",
    "ScheduledMask",
    "Trace",
    "apply_edits_",
    "bake_masks_",
    "baked",
    "bypass_",
    "coupled_groups",
    "edits_from_data",
    "edits_to_data",
    "find_blocks",
    "find_groups",
    "mask_",
    "masks_of",
    "pruned_attention",
    "rebuild",
    "remove_units_",
    "replace_",
    "save_structure",
    "trace",
    "why_not_maskable",
    "why_unprunable",
]
