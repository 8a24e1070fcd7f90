"""The block loop, with progress. Knows no file formats."""

from calib.engine.hidden import HiddenStates
from calib.engine.journal import Journal
from calib.engine.prefix import PrefixBuilder, choose_prefix
from calib.engine.run import Engine, Outcome
from calib.engine.train import trained

__all__ = ["Engine", "HiddenStates", "Journal", "Outcome", "PrefixBuilder", "choose_prefix", "trained"]
