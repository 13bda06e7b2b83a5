"""VESPR: train self-supervision and a classifier together on views attacked against the classifier. arXiv 2409.08509.

    L = ssl_weight L_SSL(views) + ce_weight mean_v CE(head(encoder(view_v)), y),   views in attack_views replaced by
    x + argmax_{|d| <= eps} attack_ce_weight CE(head(encoder(x + d)), y) + attack_ssl_weight L_SSL

Supervised training finds a planted shortcut first, so its loss is the best detector of it; ascending that loss erases
the shortcut, and positive pairs can then agree on real content only. With `attack_views: none` this is joint
self-supervised and supervised training without any attack (the ablation "SSL+CE").

Differs from the authors' code: budgets are in true pixel units, attacked pixels stay in [0, 1], and the attack runs
encoder and classifier alone, on the attacked views alone, without parameter gradients. With the classifier's loss as
the only objective, this takes the same sign steps as attacking the joint loss at 0 * L_SSL + 1 * L_CE, at a third of
the cost. keep_clean adds the clean copies as further views of the same samples, where the authors' code makes further
samples of them, which fails on the labels and turns unattacked views into false negatives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from poisonshield import collectives
from poisonshield.attacks import (
    AttackChoice,
    AttackConfig,
    ChannelLinf,
    ClassMemory,
    Repeated,
    batch_stats,
    frozen_stats,
)
from poisonshield.batch import Batch, StepOutput
from poisonshield.config import Number
from poisonshield.defenses.base import Defense, Wrapped
from poisonshield.errors import ConfigError
from poisonshield.method import SSLMethod
from poisonshield.models.batchnorm import input_gradients_only
from poisonshield.models.normalize import IMAGENET_STD
from poisonshield.ops.precision import at_least_float32
from poisonshield.random import KeyedRandom

_SCALE = {"fp16": 1024.0}  # of the attack's loss: gradients in pixels are small, and fp16 rounds them to 0
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _as_views(value: Any) -> Any:
    named: dict[Any, tuple[int, ...]] = {"none": (), "both": (0, 1)}
    return named.get(value, (value,)) if isinstance(value, (str, int)) else value


class VESPR(Defense):
    """Adds a classifier and adversarial views around any self-supervised method."""

    name: ClassVar[str] = "vespr"

    class Config(AttackConfig):
        """The losses, who sees what, and the attack; `norm`, `eps` and `attack` lie beside them."""

        eps: Number = Field(4 / 255, ge=0, description="radius in pixel units of the norm: 4/255 for linf, not 4")
        attack: AttackChoice = Field(
            {"name": "pgd", "step_size": 0.6 / 255},
            validate_default=True,
            description="a name, or a block with `name:` and the attack's settings",
        )
        attack_views: Annotated[tuple[int, ...], BeforeValidator(_as_views)] = Field(
            (0,), description="none, 0, 1, both, or a list of views counted from 0; the nominal method attacks view 0"
        )
        attack_ce_weight: float = Field(
            1.0, ge=0, description="weight of the classifier's loss that the attack ascends"
        )
        attack_ssl_weight: float = Field(0.0, ge=0, description="weight of the method's loss that the attack ascends")
        ssl_weight: float = Field(1.0, ge=0, description="weight of the method's loss in training")
        ce_weight: float = Field(1.0, ge=0, description="weight of the classifier's loss in training")
        ssl_sees: Literal["attacked", "clean"] = Field("attacked", description="views that the method's loss trains on")
        ce_sees: Literal["attacked", "clean"] = Field("attacked", description="views that the classifier trains on")
        ce_all_views: bool = Field(True, description="the classifier's loss is the mean over views, not that of view 0")
        stop_gradient: bool = Field(False, description="the classifier reads features without changing them")
        keep_clean: bool = Field(False, description="attacked views stay in the batch unattacked too")
        attack_mode: Literal["eval", "train"] = Field(
            "eval", description="train lets batch norm use the attacked batch's statistics"
        )
        attack_precision: Literal["run", "fp32", "bf16", "fp16"] = Field(
            "run", description="that of the inner loop; fp16 scales the loss by 1024"
        )
        stop_loss: float | None = Field(
            None, gt=0, description="samples whose cross-entropy has reached this are attacked no further; null: none"
        )
        warm_start: bool = Field(False, description="begin at the class's average perturbation of earlier steps")
        legacy_scalar_std: float | None = Field(
            None,
            gt=0,
            description="as the authors' code, a radius of eps * std[c] / this (0.226) for channel c, without clipping",
        )

        @model_validator(mode="after")
        def _parts_fit(self) -> "VESPR.Config":
            if not self.attack_views:
                return self
            if len(set(self.attack_views)) < len(self.attack_views):
                raise ValueError(f"attack_views {list(self.attack_views)} names a view twice.")
            if self.ssl_sees == self.ce_sees == "clean":
                raise ValueError(
                    "ssl_sees and ce_sees are both clean: no loss sees the attack. Set attack_views: none."
                )
            if self.stop_gradient and self.attack_ce_weight > 0:
                raise ValueError(
                    "stop_gradient leaves the classifier's loss without a gradient in the pixels, so it cannot be "
                    "attacked. Set attack_ce_weight: 0 and attack_ssl_weight: 1, or attack_views: none."
                )
            if self.attack_ce_weight == self.attack_ssl_weight == 0:
                raise ValueError("attack_ce_weight and attack_ssl_weight are both 0: set attack_views: none instead.")
            self.attack.cls.check(stop_loss=self.stop_loss)
            if self.attack.cls.compares_losses and self.attack_ssl_weight > 0:
                raise ValueError(
                    f"{self.attack.name} follows each sample's own loss, and the self-supervised loss ties samples "
                    "together. Set attack_ssl_weight: 0, or attack: pgd."
                )
            if self.stop_loss is not None and (self.attack_ssl_weight > 0 or self.attack_mode == "train"):
                raise ValueError(
                    "stop_loss attacks some samples without the rest, and here a sample's loss depends on its batch. "
                    "It needs attack_ssl_weight: 0 and attack_mode: eval."
                )
            if self.legacy_scalar_std is not None and self.norm != "linf":
                raise ValueError(f"legacy_scalar_std belongs to norm: linf, not {self.norm}.")
            return self

    @property
    def label(self) -> str:
        """'vespr', or 'ssl+ce' when no view is attacked."""
        return self.name if self.config.attack_views else "ssl+ce"

    @property
    def ranks_stay_in_step(self) -> bool:
        """Not with stop_loss: a rank whose samples have all stopped runs no further pass."""
        return self.config.stop_loss is None or not self.config.attack_views

    def wrap(self, method: SSLMethod) -> SSLMethod:
        """Raises ConfigError for a view that the method does not have, or a method that is already supervised."""
        if method.has_classifier:
            raise ConfigError(
                f"vespr adds a classifier to a self-supervised method, and {method.name} has one. "
                "Use method.name: simclr, or the defense adversarial."
            )
        beyond = [v for v in self.config.attack_views if not 0 <= v < method.num_views]
        if beyond:
            raise ConfigError(
                f"vespr.attack_views {beyond}: {method.name} has {method.num_views} views, counted from 0."
            )
        if self.context.num_classes is None:
            raise ConfigError("vespr adds a classifier and has to know the number of classes: Context(num_classes=K).")
        if self.context.num_classes == 1:
            raise ConfigError(
                "vespr attacks a classifier, and the training images have one class: they are unlabelled, or there is "
                "nothing to tell apart.\n  Import them with labels, or train without this defense: defenses=[]."
            )
        return VESPRMethod(method, self.config, self.context.num_classes, self.seed)


class VESPRMethod(Wrapped):
    """One joint step; the inner method keeps its own loss and state."""

    def __init__(self, method: SSLMethod, config: VESPR.Config, num_classes: int, seed: int) -> None:
        super().__init__(method)
        self.config, self.seed, self.has_classifier = config, seed, True
        self.head = nn.Linear(method.encoder.feature_dim, num_classes)
        self.attack = config.build_attack(
            grad_scale=_SCALE.get(config.attack_precision, 1.0), stop_loss=config.stop_loss
        )
        self.budget = config.budget()
        if config.legacy_scalar_std is not None:
            scale = tuple(std / config.legacy_scalar_std for std in IMAGENET_STD)
            self.budget = ChannelLinf(config.eps, scale, clip=False)
        self.memory = ClassMemory(num_classes, method.num_views) if config.warm_start else None

    def forward(self, batch: Batch) -> StepOutput:
        """ssl_weight * L_SSL + ce_weight * L_CE on the attacked batch."""
        c, flagged = self.config, self.config.attack_views
        clean, hard, y = batch.all_views(), self.attacked_views(batch), batch.labels()
        if self.memory is not None:
            for i in flagged:
                self.memory.remember(i, hard[i] - clean[i], y)
        if c.keep_clean and flagged:
            # As further views of the same samples: as further samples they would be negatives of themselves.
            hard = hard + tuple(clean[i] for i in flagged)
        attacked = batch.replace(views=hard)
        seen = {"attacked": attacked, "clean": batch}
        features = self.method.features(seen[c.ssl_sees])
        out = self.method.loss(features, seen[c.ssl_sees])
        if c.ce_sees != c.ssl_sees:  # else both losses share one pass of the encoder
            features = self.method.features(seen[c.ce_sees])
        per_view = [self._cross_entropy(h, y) for h in (features if c.ce_all_views else features[:1])]
        ce = collectives.mean(_mean(per_view), batch.rank_sizes)
        metrics = {**out.metrics, "ce": ce.detach(), **self._diagnostics(features, per_view, batch)}
        return StepOutput(c.ssl_weight * out.loss + c.ce_weight * ce, metrics)

    def _cross_entropy(self, h: Tensor, y: Tensor) -> Tensor:
        """Of each sample, from features [B, E]."""
        scores = self.head(h.detach() if self.config.stop_gradient else h)
        return F.cross_entropy(at_least_float32(scores), y, reduction="none")

    @torch.no_grad()
    def _diagnostics(self, features: tuple[Tensor, ...], per_view: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """How much more an attacked view costs the classifier than a plain one, and how alike their features are."""
        flagged, large = self.config.attack_views, range(self.method.num_views)
        plain = [i for i in large if i not in flagged] or [len(batch.all_views())]  # or the first clean copy
        if not flagged or self.config.ce_sees == "clean" or max(flagged[0], plain[0]) >= len(per_view):
            return {}
        hard, easy = flagged[0], plain[0]
        gap = collectives.mean(per_view[hard] - per_view[easy], batch.rank_sizes)
        alike = F.cosine_similarity(at_least_float32(features[hard]), at_least_float32(features[easy]), dim=1)
        return {"attack_ce_gap": gap, "attack_similarity": collectives.mean(alike, batch.rank_sizes)}

    def attacked_views(self, batch: Batch) -> tuple[Tensor, ...]:
        """All views as the attack leaves them, [B, 3, H, W] each, in [0, 1] (beyond it with legacy_scalar_std)."""
        if self.config.attack_ssl_weight > 0 and self.config.attack_views:
            return self._attack_together(batch)
        return tuple(self.attacked(v, i, batch) for i, v in enumerate(batch.all_views()))

    def attacked(self, view: Tensor, index: int, batch: Batch) -> Tensor:
        """One view attacked against the classifier if `index` is flagged, else unchanged.

        Sends nothing over ranks, but for synced batch norm with attack_mode: train.
        """
        if index not in self.config.attack_views:
            return view
        labels, modules = batch.labels(), (self.method.encoder, self.head)
        objective: Callable[..., Tensor] = lambda x: self._loss_of_each(x, labels)
        if self.config.attack_mode == "eval":  # synced batch norm sends messages from within, in training mode
            reads = tuple(v for m in modules for v in (*m.parameters(), *m.buffers()))
            objective = Repeated(self._loss_of_each, (labels,), reads)
        start = None if self.memory is None else self.memory.start(index, view, labels, self.budget)
        with self._still(*modules):
            rng = batch.random(self.seed, view.device).within(f"view{index}")
            return self.attack(objective, view, self.budget, rng, start=start)

    def _loss_of_each(self, x: Tensor, labels: Tensor) -> Tensor:
        """What the attack on one view ascends: the classifier's loss of each sample, [B]."""
        with self._precision(x):
            scores = self.logits(x)
        return F.cross_entropy(at_least_float32(scores), labels, reduction="none")

    def _attack_together(self, batch: Batch) -> tuple[Tensor, ...]:
        """All flagged views attacked at once: the self-supervised loss ties them to each other and to the batch."""
        c, flagged = self.config, self.config.attack_views
        views, y = batch.all_views(), batch.labels()

        def compose(x: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(flagged, x.chunk(len(flagged)), strict=True))
            return tuple(found.get(i, v) for i, v in enumerate(views))

        def objective(x: Tensor) -> Tensor:
            seen = batch.replace(views=compose(x))
            with self._precision(x):
                features = self.method.features(seen)
                ssl = self.method.loss(features, seen).loss
            ce = _mean([self._cross_entropy(h, y) for h in features])
            joint = c.attack_ssl_weight * ssl + c.attack_ce_weight * collectives.mean(ce, batch.rank_sizes)
            if not torch.is_grad_enabled():  # restarts are compared: all ranks must pick the same one
                joint = collectives.all_reduce_mean({"joint": joint})["joint"]
            return joint.expand(len(x))

        together = torch.cat([views[i] for i in flagged])  # [views * B, 3, H, W]
        keyed = batch.random(self.seed, together.device)
        # An id of its own for each view, so that two views of a sample do not start at the same noise.
        rng = KeyedRandom(keyed.seed, torch.cat([keyed.ids + i for i in flagged]), keyed.offset, "views")
        start = None
        if self.memory is not None:
            start = torch.cat([self.memory.start(i, views[i], y, self.budget) for i in flagged])
        with self._still(self):
            return compose(self.attack(objective, together, self.budget, rng, start=start))

    @contextmanager
    def _still(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, passes leave no trace in the modules, and gradients are of pixels alone."""
        with (frozen_stats if self.config.attack_mode == "eval" else batch_stats)(*modules):
            with input_gradients_only(*modules):
                yield

    def _precision(self, x: Tensor) -> AbstractContextManager[None]:
        name = self.config.attack_precision
        if name == "run":
            return nullcontext()
        # Not cached: weights cast for the attack must not turn up in the training step.
        dtype = _DTYPES.get(name, torch.bfloat16)
        return torch.autocast(x.device.type, dtype=dtype, enabled=name in _DTYPES, cache_enabled=False)

    def logits(self, x: Tensor) -> Tensor:
        """[B, K]."""
        return self.head(self.encoder(x))


def _mean(per_view: Sequence[Tensor]) -> Tensor:
    """The mean over views of a loss of each sample, [B]."""
    total = per_view[0]
    for loss in per_view[1:]:
        total = total + loss
    return total / len(per_view)
