"""Compression as projection of coupled channel groups: tensors in, tensors out."""

from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.choose.masks import MASKS
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.compress import Compressed, compress, compressions
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan
from pipeline.compression.recipe import Recipe, parse, spell
from pipeline.compression.report import Report
from pipeline.compression.trace.graph import channel_groups

__all__ = [
    "MASKS",
    "METHODS",
    "ChannelGroup",
    "ChannelGroups",
    "Compressed",
    "Plan",
    "Projection",
    "Recipe",
    "Report",
    "channel_groups",
    "compress",
    "compressions",
    "parse",
    "spell",
    "synthesize",
]
