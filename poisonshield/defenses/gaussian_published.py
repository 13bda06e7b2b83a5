"""The "Gaussian" of published tables (ISS, APBench): kernel 3 and sigma 0.1, which leaves every 8-bit picture as it is.

Its neighbours' weight is e^-50. So the column repeats "no defense", and its distance from that column is how far two
runs of one setting lie apart: that is what it is here for. A blur that does something is `blur`.
"""

from typing import ClassVar

from poisonshield.batch import Batch
from poisonshield.defenses.base import Context, Defense
from poisonshield.defenses.gaussian import Gaussian


class GaussianPublished(Defense):
    """Blurs so little that no pixel changes, as published; no purifier, since it purifies nothing."""

    name: ClassVar[str] = "gaussian_published"

    def __init__(self, config: Defense.Config, context: Context | None = None) -> None:
        super().__init__(config, context)
        self.blur = Gaussian(Gaussian.Config(sigma=0.1, kernel=3), context)

    def before(self, batch: Batch) -> Batch:
        """x as it was, [B, 3, H, W], by way of the filter."""
        return self.blur.before(batch)
