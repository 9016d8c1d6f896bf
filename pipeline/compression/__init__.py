"""Compression as projection of coupled channel groups: tensors in, tensors out."""

from pipeline.compression.compress import Compressed, compress, compressions
from pipeline.compression.graph import channel_groups
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.masks import MASKS
from pipeline.compression.methods import METHODS
from pipeline.compression.plan import Plan
from pipeline.compression.projection import Projection
from pipeline.compression.recipe import Recipe, parse, spell
from pipeline.compression.report import Report
from pipeline.compression.synthetic import synthesize

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
