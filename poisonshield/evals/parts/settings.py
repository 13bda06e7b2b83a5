"""How a finished run of a classifier is read: the settings that all evaluations share, and a block for each of them."""

from typing import ClassVar

from pydantic import Field

from poisonshield.config import Settings
from poisonshield.evals import EVALUATIONS
from poisonshield.evals.parts.blocks import with_blocks

_ONCE = {  # one flat list of settings, before evaluations had blocks
    "knn": ("k", "weighted", "temperature"),
    "linear": ("weight_decay", "rates", "epochs"),
    "robust": ("eps", "samples"),
    "alignment": ("samples",),
    "lipschitz": ("samples", "eps", "step_size", "steps", "restarts"),
}


@with_blocks(EVALUATIONS)
class EvaluateConfig(Settings):
    """Which numbers a finished run gets, and how; accuracies are always of clean test images.

    Beside these settings there is a block for each evaluation, by its name: null leaves it out, {} takes its defaults.
    """

    renamed: ClassVar[dict[str, str]] = {
        "pair_samples": "pairs.samples",
        **{f"{block}_{key}": f"{block}.{key}" for block, keys in _ONCE.items() for key in keys},
        **{f"robust_{key}": f"robust.attack.{key}" for key in ("step_size", "steps", "restarts")},
    }

    batch_size: int = Field(500, ge=1, description="Samples that are looked at together.")
    watch_pairs: int = Field(
        0, ge=0, description="During training, log of so many fixed samples how alike clean and poisoned look; 0: none."
    )
    legacy: bool = Field(
        False,
        description="Sample as VESPR's authors do: a k-NN bank of 10,240 augmented training images, 2,560 queries and "
        "1,024 attacked images (all, where there are fewer), and attack the true class's score.",
    )
