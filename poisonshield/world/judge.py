"""A judge of rendered concepts: is an object of this colour and this shape there? "Neither" is an answer of its own.

A classifier that must name some shape names one for a mere texture too, and would call a failed inversion a success.
This one has "none" in both of its heads and is trained on pictures that deserve it (judge_lessons.py). Its features
also carry the distance between generated and real pictures (evals/diffusion/).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from poisonshield.errors import CheckpointError, ConfigError, ShapeError

_WIDTHS = (16, 24, 32, 48, 48, 64)
_STRIDES = (2, 1, 2, 1, 2, 1)


class ConceptJudge(nn.Module):
    """A small CNN with two heads: colours and "none", shapes and "none". About 85,000 parameters, BatchNorm.

    colors, shapes: names, in the order of the outputs; the last output of each head is "none". size: pixels a side.
    temperature [2]: what the logits of each head are divided by before they are probabilities. record: how it was made.
    """

    temperature: Tensor

    def __init__(self, colors: tuple[str, ...], shapes: tuple[str, ...], *, size: int = 64) -> None:
        super().__init__()
        self.colors, self.shapes, self.size = tuple(colors), tuple(shapes), size
        self.record: dict[str, Any] = {}
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *_WIDTHS[:-1]), _WIDTHS, _STRIDES, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.color_head = nn.Linear(2 * _WIDTHS[-1], len(self.colors) + 1)
        self.shape_head = nn.Linear(2 * _WIDTHS[-1], len(self.shapes) + 1)
        self.register_buffer("temperature", torch.ones(2))

    def features(self, x: Tensor) -> Tensor:
        """[B, 128] of pixels [B, 3, size, size] in [0, 1]: mean and maximum of each last channel. Raises ShapeError."""
        if x.dim() != 4 or x.shape[1:] != (3, self.size, self.size):
            raise ShapeError(
                f"pixels {tuple(x.shape)}: this judge looks at [B, 3, {self.size}, {self.size}] in [0, 1]."
            )
        # Pixels about 0, with a deviation near 1.
        h = self.body((x - 0.5) * 4)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the colours [B, colors + 1] and of the shapes [B, shapes + 1], already divided by `temperature`."""
        h = self.features(x)
        return self.color_head(h) / self.temperature[0], self.shape_head(h) / self.temperature[1]

    @torch.no_grad()
    def fidelity(self, x: Tensor, color: str, shape: str, *, micro_batch: int = 256) -> dict[str, float]:
        """How far pictures [N, 3, size, size] show an object of this colour and shape; all values in [0, 1].

        joint: mean of P(colour) P(shape); share: how many pictures have that above 0.5; color, shape: how many have the
        one probability above 0.5; none: how many have P(no shape) above 0.5. Evaluation mode, whatever the mode is.
        Raises ConfigError for names that it never learned, ShapeError for no pictures or another size.
        """
        columns = self._column("colour", color, self.colors), self._column("shape", shape, self.shapes)
        if not len(x):
            raise ShapeError("no pictures were given; fidelity is a mean over pictures.")
        training = self.training
        self.eval()
        try:
            parts = [[h.softmax(1) for h in self(rows.float())] for rows in x.split(micro_batch)]
        finally:
            self.train(training)
        colors, shapes = (torch.cat(p) for p in zip(*parts, strict=True))
        p_color, p_shape = colors[:, columns[0]], shapes[:, columns[1]]
        joint = p_color * p_shape
        shares = {"share": joint, "color": p_color, "shape": p_shape, "none": shapes[:, -1]}
        return {"joint": float(joint.mean()), **{k: float((p > 0.5).float().mean()) for k, p in shares.items()}}

    def calibrate(self, logits: tuple[Tensor, Tensor], labels: Tensor) -> None:
        """Sets `temperature` to what makes labels [N, 2] likeliest under logits of temperature 1.

        Labels of -100 do not count.
        """
        grid = [math.exp(k / 20) for k in range(-30, 31)]  # 0.22 to 4.5
        for head, (h, y) in enumerate(zip(logits, labels.T, strict=True)):
            losses = [float(F.cross_entropy(h / t, y, ignore_index=-100)) for t in grid]
            self.temperature[head] = grid[losses.index(min(losses))]

    def save(self, path: str | Path) -> None:
        """Writes the judge in half precision, with its names and record, as safetensors."""
        about = {"colors": self.colors, "shapes": self.shapes, "size": self.size, "record": self.record}
        weights = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, path, metadata={"judge": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "ConceptJudge":
        """The judge of a file that `save` wrote, float32, in evaluation mode. Raises ConfigError, CheckpointError."""
        if not Path(path).is_file():
            raise ConfigError(f"{path} does not exist. `train_judge` makes a judge, and `save` writes it.")
        try:
            with safe_open(path, framework="pt") as stored:
                about = json.loads((stored.metadata() or {})["judge"])
                weights = {k: stored.get_tensor(k) for k in stored.keys()}
            judge = cls(tuple(about["colors"]), tuple(about["shapes"]), size=about["size"])
            judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as err:
            raise CheckpointError(f"{path} is no whole judge: {err}. Train and save it again.") from err
        judge.record = about["record"]
        return judge.eval()

    def _column(self, what: str, name: str, known: tuple[str, ...]) -> int:
        if name not in known:
            raise ConfigError(f"{name!r} is no {what} that this judge learned: {', '.join(known)}.")
        return known.index(name)
