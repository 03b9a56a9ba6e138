"""Tensors to frames and back, without loss.

A tensor is a matrix of levels (first axis: rows, all others flattened: columns). Its levels are
put in **order** (:mod:`.order`), **folded** into samples (:mod:`.fold`) and laid on the
**ribbon**, which is cut into frames (:mod:`.ribbon`).
"""

from weightvid.tile.fold import PLAIN, Fold
from weightvid.tile.layout import PLAIN_LAYOUT, Layout
from weightvid.tile.order import EnergyOrder, from_sequence, to_sequence
from weightvid.tile.ribbon import (
    ALIGN,
    BAND,
    MIN_FRAME_PX,
    ZERO_SAMPLE,
    FrameGeometry,
    Samples,
    Tile,
    choose_geometry,
    frame_from_ribbon,
    matrix_shape,
    ribbon_columns,
    sequence_from_frame,
    starts,
    tiles,
    zero_sample,
)

__all__ = [
    "ALIGN",
    "BAND",
    "MIN_FRAME_PX",
    "PLAIN",
    "PLAIN_LAYOUT",
    "ZERO_SAMPLE",
    "EnergyOrder",
    "Fold",
    "FrameGeometry",
    "Layout",
    "Samples",
    "Tile",
    "choose_geometry",
    "frame_from_ribbon",
    "from_sequence",
    "matrix_shape",
    "ribbon_columns",
    "sequence_from_frame",
    "starts",
    "tiles",
    "to_sequence",
    "zero_sample",
]
