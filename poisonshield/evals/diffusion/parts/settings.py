"""How a learned word is read: a block of settings for each evaluation of words."""

from poisonshield.config import Settings
from poisonshield.evals.diffusion import EVALUATIONS
from poisonshield.evals.parts.blocks import with_blocks


@with_blocks(EVALUATIONS)
class WordEvaluateConfig(Settings):
    """Which numbers a learned word gets: a block for each evaluation, by its name; null leaves it out."""
