"""The Defense contract: change the data before training, the method during it, or both."""

from typing import Any, ClassVar

from poisonshield.batch import Batch
from poisonshield.method import Method


class Defense:
    """Both halves default to doing nothing; most defenses fill one. Never told which poison it faces.

    Built as `SomeDefense(config, num_classes=K, seed=seed)`.
    purifier: whether it changes pixels `x` alone, which suits any training; size and keys stay, and a picture's own
    pixels and key decide what becomes of it.
    """

    name: ClassVar[str]
    purifier: ClassVar[bool] = False

    def __init__(self, config: Any, *, num_classes: int, seed: int) -> None:
        self.config, self.num_classes, self.seed = config, num_classes, seed

    @property
    def label(self) -> str:
        """How result tables call it."""
        return self.name

    @property
    def exact(self) -> bool:
        """Whether `before` gives the same bits on every device. Not where a network has a part in it."""
        return True

    @property
    def ranks_stay_in_step(self) -> bool:
        """Whether every rank runs the method's parts equally often, as sharded weights need."""
        return True

    def before(self, batch: Batch) -> Batch:
        """The batch with purified pixels `x`, before any augmentation."""
        return batch

    def wrap(self, method: Method) -> Method:
        """The method as it is to be trained."""
        return method


class Wrapped(Method):
    """A method around another: encoder, classifier and bookkeeping are the inner one's."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.num_views, self.default_views = method.num_views, method.default_views

    @property
    def encoder(self):  # noqa: ANN201 - nn.Module, but typed by the parent
        """The inner method's encoder."""
        return self.method.encoder

    @property
    def projector(self):  # noqa: ANN201
        """The inner method's projector, or None."""
        return getattr(self.method, "projector", None)

    def features(self, batch: Batch):  # noqa: ANN201
        """The inner method's features."""
        return self.method.features(batch)

    def loss(self, features, batch: Batch):  # noqa: ANN001, ANN201
        """The inner method's loss."""
        return self.method.loss(features, batch)

    def logits(self, x):  # noqa: ANN001, ANN201
        """The inner method's class scores."""
        return self.method.logits(x)

    def initialize(self) -> None:
        """Passed on."""
        self.method.initialize()

    def after_step(self, progress: float) -> None:
        """Passed on."""
        self.method.after_step(progress)
