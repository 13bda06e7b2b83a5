"""BRISQUE, a picture's quality without anything to compare with.

It did not rank methods in public benchmarks of protections: report it, never decide by it. No weights are fetched.
"""

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from poisonshield.evals.base import Number
from poisonshield.evals.diffusion.base import LearnedWord, WordEvaluation
from poisonshield.evals.diffusion.parts.image_quality import levels_of

log = logging.getLogger(__name__)


class Brisque(WordEvaluation):
    """The pictures' quality by BRISQUE."""

    name = "brisque"
    place = 50
    numbers = (Number("brisque", "BRISQUE", better="lower", digits=1, column="known"),)

    def __call__(self, subject: LearnedWord) -> dict[str, Any]:
        """Mean over the pictures; None without its package, which the log says."""
        quality = brisque(subject.x)
        if quality["status"] != "ok":
            say_missing(quality["needs"])
        return {"brisque": quality.get("value")}


@cache
def say_missing(needs: str) -> None:
    """Says it once a process."""
    log.warning("BRISQUE is not measured: %s", needs)


def brisque(x: Tensor) -> dict[str, Any]:
    """BRISQUE of pictures [N, 3, H, W] in [0, 1]: {"status": "ok", "value": mean, "pictures": how many it could score}.

    Lower is nominally better. A flat picture has no score and is left out; where none has one, value is None. Without
    the package: {"status": "unavailable", "needs": ...}. Source: Mittal et al. 2012, by the `brisque` package and its
    model.
    """
    try:
        from brisque import BRISQUE
    except ImportError:  # the package itself, or OpenCV beneath it
        return {"status": "unavailable", "needs": "pip install '.[brisque]'"}
    import warnings

    class Scorer(BRISQUE):
        def scale_features(self, features: Any) -> Any:
            # Some of them are arrays of one element, which numpy 2.4 no longer takes for numbers.
            return super().scale_features([float(torch.as_tensor(f).reshape(())) for f in features])

    judge = Scorer(url=False)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisions by zero in flat pictures, which end as nan below
        for picture in levels_of(x).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
            values.append(float(judge.score(picture)))
    finite = [v for v in values if math.isfinite(v)]
    return {"status": "ok", "value": sum(finite) / len(finite) if finite else None, "pictures": len(finite)}
