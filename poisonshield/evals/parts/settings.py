"""How a finished run is read: the settings of every evaluation. Defaults use whole sets, and nothing is unseeded."""

from typing import Annotated

from pydantic import Field

from poisonshield.config import Pixels, Settings


class EvaluateConfig(Settings):
    """Which readouts and probes a finished run gets; accuracies are always of clean test images.

    robust_*: the attack on the classifier; no steps, no attack. linear_rates: also one SGD probe for each of these
    learning rates, over linear_epochs. alignment reads two views of training samples, lipschitz test samples, pair_*
    training samples with and without the poison.
    watch_pairs: during training, log of so many fixed training samples how alike the encoder finds clean and poisoned.
    *_samples: how many, drawn with the run's seed; null takes all, 0 leaves the probe out.
    legacy: sample as VESPR's authors do, a k-NN bank of 10,240 augmented training images, 2,560 queries and 1,024
    attacked images (all, where there are fewer), and attack the true class's score. Every other setting holds.
    """

    batch_size: int = Field(500, ge=1)
    knn_k: int = Field(20, ge=1)
    knn_weighted: bool = False
    knn_temperature: float = Field(0.07, gt=0)
    linear_weight_decay: float = Field(1e-4, ge=0)
    linear_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    linear_epochs: int = Field(100, ge=1)
    robust_eps: Pixels = 4 / 255
    robust_step_size: Pixels = 1 / 255
    robust_steps: int = Field(10, ge=0)
    robust_restarts: int = Field(1, ge=1)
    robust_samples: int | None = Field(None, ge=1)
    alignment_samples: int | None = Field(1000, ge=0)
    lipschitz_samples: int | None = Field(0, ge=0)
    lipschitz_eps: Pixels = 4 / 255
    lipschitz_step_size: Pixels = 0.6 / 255
    lipschitz_steps: int = Field(10, ge=0)
    lipschitz_restarts: int = Field(5, ge=1)
    pair_samples: int | None = Field(0, ge=0)
    watch_pairs: int = Field(0, ge=0)
    legacy: bool = False
