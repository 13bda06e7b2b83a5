"""DINO: the student's distribution over prototypes matches a slow, centred, sharpened teacher's. Caron et al. 2021.

As in the paper, large views teach and all views learn; `all_views_teach` is the VESPR authors' form. The centre moves
once in a training step and never in an attack. Not built, as in their code: a warm-up of the teacher's temperature, and
holding the last layer still at first.
"""

import torch
from pydantic import Field
from torch import Tensor

from poisonshield.batch import Batch, StepOutput
from poisonshield.losses.dino import dino, move_centre
from poisonshield.method import SSLMethod
from poisonshield.models.backbones import Encoder
from poisonshield.models.heads import ProjectorConfig, ProjectorName, build_projector
from poisonshield.models.target import Momentum, Target, TargetConfig


class DINO(SSLMethod):
    """Cross-entropy between a student's and a momentum teacher's prototypes. Labels are not used."""

    name = "dino"
    num_views = 2
    default_views = "ssl"
    centre: Tensor

    class Config(ProjectorConfig, TargetConfig):
        """The projector, whose `out` is the number of prototypes, the teacher and the two softmaxes."""

        projector: ProjectorName = "dino_vit"
        momentum: Momentum = 0.999
        student_temperature: float = Field(0.1, gt=0, description="What the student's outputs are divided by.")
        teacher_temperature: float = Field(
            0.05, gt=0, description="What the teacher's outputs are divided by; lower is sharper."
        )
        centre_momentum: float = Field(
            0.9, ge=0, lt=1, description="Share of the teacher's centre that is kept at each step, in [0, 1)."
        )
        all_views_teach: bool = Field(
            False, description="Whether small crops teach too, as in the VESPR authors' code; the paper's do not."
        )
        symmetrized: bool = Field(True, description="Whether every view learns, and not the first alone.")

    def __init__(self, config: Config, *, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = build_projector(config, encoder.feature_dim)
        self.target = Target(config, encoder, self.projector)
        self.register_buffer("centre", torch.zeros(config.out))

    def loss(self, features: tuple[Tensor, ...], batch: Batch) -> StepOutput:
        """Every view learns from the other views that teach."""
        c = self.config
        student = tuple(self.projector(h) for h in features)
        teachers = batch.all_views() if c.all_views_teach else batch.all_views()[: self.num_views]
        teacher = tuple(self.target(v) for v in teachers)
        loss = dino(student, teacher, self.centre, student_temperature=c.student_temperature,
                    teacher_temperature=c.teacher_temperature, symmetrized=c.symmetrized,
                    rank_sizes=batch.rank_sizes)  # fmt: skip
        if self.training:  # an attack runs in evaluation mode, and must leave the centre alone
            moved = move_centre(self.centre, teacher, momentum=c.centre_momentum, rank_sizes=batch.rank_sizes)
            self.centre.copy_(moved)
        return StepOutput(loss, {"ssl": loss.detach()})

    def after_step(self, progress: float) -> None:
        """The teacher follows."""
        self.target.follow(self.encoder, self.projector, progress=progress)
