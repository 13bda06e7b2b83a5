"""What an evaluation of a learned word may look at. The contract of evaluations is poisonshield.evals.base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from poisonshield.evals.base import Evaluation
from poisonshield.models.diffusion.pipeline import LatentDiffusion


class Judge(Protocol):
    """Something that knows what the subject's concept looks like, such as the judge of the rendered world."""

    def features(self, x: Tensor) -> Tensor:
        """Features [N, D] of pictures [N, 3, H, W]."""

    def fidelity(self, x: Tensor) -> Mapping[str, float]:
        """Of pictures [N, 3, H, W]: "joint", their mean probability of showing the concept, and "share", how many of
        them have one above 0.5. Both in [0, 1]."""


@dataclass(frozen=True)
class LearnedWord:
    """A word that a run has learned, and the pictures to compare. All pixels are [N, 3, H, W] in [0, 1], on the CPU.

    pictures: generated ones by prompt group; "recon" is always there. references: real pictures of the concept, which
    need not have the same size. clean: the pictures that the run was given, before they were poisoned. rows: the word's
    vectors [k, d]. judge: None where nobody knows what the concept looks like. prompts: a text for each picture of
    "recon" with an ordinary word in place of the learned one, None where there is no such word.
    """

    model: LatentDiffusion
    pictures: Mapping[str, Tensor]
    references: Tensor
    clean: Tensor
    rows: Tensor
    judge: Judge | None = None
    prompts: tuple[str, ...] | None = None

    @property
    def x(self) -> Tensor:
        """The pictures that most numbers are read off: those of the group "recon"."""
        return self.pictures["recon"]


WordEvaluation = Evaluation[LearnedWord]
