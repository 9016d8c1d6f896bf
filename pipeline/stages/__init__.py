"""Stages take a network and give one, one file a stage; a chain is stages in order."""

from pipeline.stages.chain import (
    STAGES,
    TAILS,
    Chain,
    Followed,
    check_stage,
    fitting,
    needed,
    parse_chain,
    parse_chains,
    parse_tail,
    spell_chain,
)
from pipeline.stages.compress import Compress, compressed
from pipeline.stages.repair import Repair
from pipeline.stages.stage import Seen, Stage, State, Supplies, Terms, Traces, Training
from pipeline.stages.tune import Tune, TuneNorms

__all__ = [
    "STAGES",
    "TAILS",
    "Chain",
    "Compress",
    "Followed",
    "Repair",
    "Seen",
    "Stage",
    "State",
    "Supplies",
    "Terms",
    "Traces",
    "Training",
    "Tune",
    "TuneNorms",
    "check_stage",
    "compressed",
    "fitting",
    "needed",
    "parse_chain",
    "parse_chains",
    "parse_tail",
    "spell_chain",
]
