"""Whether generated pictures show the concept, by a judge who knows it. Without one the numbers are missing, never
guessed."""

from typing import Any

from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation


class Fidelity(WordEvaluation):
    """Whether the pictures show the concept, by the judge beside the pipeline."""

    name = "fidelity"
    place = 10
    numbers = (
        Number("fidelity", "fidelity", better="higher", column="always", effect=1),
        Number("shown", "shown", "%", "higher", digits=1, column="always"),
    )

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """The judge's mean probability, and the percentage of pictures above one half; None without a judge."""
        if subject.judge is None:
            return {"fidelity": None, "shown": None}
        seen = subject.judge.fidelity(subject.x)
        return {"fidelity": seen["joint"], "shown": 100 * seen["share"]}
