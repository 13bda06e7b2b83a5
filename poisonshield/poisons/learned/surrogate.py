"""The classifier that a poison is made against: an encoder with a linear head, trained by SGD as the poison says."""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from poisonshield.attacks import frozen_stats
from poisonshield.config import Settings
from poisonshield.models.backbones import BackboneConfig, Encoder, build_encoder


class SurrogateConfig(Settings):
    """The network and how it is trained."""

    model: BackboneConfig = Field(
        BackboneConfig(),
        description="the network. For images of 32 px keep stem: cifar: with the other one a poison is made six times "
        "as fast and is worth much less",
    )
    batch_size: int = Field(128, ge=2, description="pictures of a training step")
    lr: float = Field(0.1, gt=0, description="learning rate of SGD")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of SGD")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient; null leaves it")


class Learner(nn.Module):
    """A network with its optimiser. A subclass builds its parts in `build`, whose weights are drawn from the seed."""

    encoder: Encoder

    def __init__(self, config: SurrogateConfig, *, num_classes: int, seed: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's own generator stays as it was
            torch.manual_seed(seed % 2**63)
            self.encoder = build_encoder(config.model)
            self.build(num_classes)
        self.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
        )

    @abstractmethod
    def build(self, num_classes: int) -> None:
        """What follows the encoder."""

    def step(self, loss: Tensor, rate: float) -> None:
        """One SGD step down a scalar loss. rate: what the learning rate is multiplied by."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.config.clip)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, statistics and momentum: all that it takes to go on."""
        state = {f"net.{k}": v for k, v in self.state_dict().items()}
        momenta: Callable[[Tensor], Tensor | None] = lambda p: self.optimizer.state[p].get("momentum_buffer")
        found = {f"momentum.{name}": momenta(p) for name, p in self.named_parameters()}
        return state | {name: v for name, v in found.items() if v is not None}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave."""
        self.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        for name, p in self.named_parameters():
            if f"momentum.{name}" in tensors:
                # Copied into the layout of the weight, so that a step has the same bits as without the stop.
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(tensors[f"momentum.{name}"])


class Surrogate(Learner):
    """A classifier f."""

    def build(self, num_classes: int) -> None:
        """A linear head."""
        self.head = nn.Linear(self.encoder.feature_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, K] of x [B, 3, H, W] in [0, 1]."""
        return self.head(self.encoder(x))

    def loss_of_each(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy [B]."""
        return F.cross_entropy(self(x), y, reduction="none")

    def gain_of_each(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus cross-entropy [B]: an attack that ascends it makes errors smaller."""
        return -self.loss_of_each(x, y)

    def learn(self, x: Tensor, y: Tensor, *, rate: float = 1.0) -> None:
        """One SGD step on cross-entropy, in training mode. rate: what the learning rate is multiplied by."""
        self.train()
        self.step(self.loss_of_each(x, y).mean(), rate)

    @torch.no_grad()
    def count_errors(self, x: Tensor, y: Tensor) -> int:
        """How many of x it calls something else than y, in evaluation mode."""
        with frozen_stats(self):
            return int((self(x).argmax(1) != y).sum())
