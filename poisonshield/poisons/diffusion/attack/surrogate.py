"""A model that learns the pictures, so that the attack is on what a victim will have: trained, put back, attacked.

The caller's model is never touched: U-Net and text encoder are copies in float32. Weights in bfloat16 would hardly
move, since a step of 5e-7 is lost in the rounding of most of them. The VAE stays the caller's. A step sees whole
batches of pictures one by one, so its result does not depend on how many are computed together.
"""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from poisonshield.errors import ConfigError
from poisonshield.poisons.diffusion.attack.canvas import Canvas
from poisonshield.poisons.diffusion.attack.gradients import squared_error
from poisonshield.poisons.diffusion.attack.objective import Objective
from poisonshield.poisons.diffusion.attack.settings import AttackConfig
from poisonshield.poisons.diffusion.attack.view import View
from poisonshield.random import KeyedRandom

TOKEN = "<poison>"

LR = {"full": 5e-7, "kv": 1e-5, "ti": 5e-3}
"""Of DreamBooth in the scripts of Van Le et al. 2023, of Custom Diffusion, and of textual inversion."""


class SurrogateConfig(AttackConfig):
    """What the surrogate is, and how each of its training steps goes."""

    inner: Literal["full", "kv", "ti"] = Field(
        "full",
        description='what is trained: "full" U-Net and text encoder, "kv" of the cross-attention, or "ti", a new word',
    )
    prompt: str = Field("a photo of {}", description="with {} where the subject stands, which for ti is the new word")
    subject: str = Field("sks person", description="what stands there otherwise")
    init_word: str | None = Field(None, description="the word that ti begins at; None takes the mean of all words")
    lr: float | None = Field(None, gt=0, description="learning rate; None takes 5e-7 (full), 1e-5 (kv), 5e-3 (ti)")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay; a new word has none")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    batch: int = Field(1, ge=1, description="pictures a step")
    prior_weight: float = Field(0.0, ge=0, description="weight of the loss on class images")
    class_prompt: str = Field("a photo of person", description="what class images are learned with")
    defended: bool = Field(False, description="learn as under the defense: on eot's pixels, in t_range, masked loss")

    @property
    def whole_prompt(self) -> str:
        """The prompt with the subject, or the new word, in its place."""
        return self.prompt.replace("{}", TOKEN if self.inner == "ti" else self.subject)


@dataclass(frozen=True)
class Picture:
    """One picture of a canvas that may hold several."""

    key: str
    canvas: Canvas
    row: int

    @property
    def id(self) -> Tensor:
        """Its sample id, int64 [1]."""
        return self.canvas.ids[self.row : self.row + 1]

    def view(self, random: KeyedRandom, *, clean: bool) -> View:
        """The picture by itself, poisoned or clean; of a large one a tile that the numbers draw."""
        tile = int(random.uniform("which tile", 1)[0, 0] * len(self.canvas.plan.boxes))
        # The numbers are this picture's alone, so it takes its row of the pixels only.
        whole = self.canvas.view(tile, random, self.canvas.padded(clean=clean))
        return whole.rows([self.row], (self.key,))


class Surrogate:
    """`surrogate.train(...)`, and between trainings a frozen model: `predict` and `context`."""

    def __init__(self, poison: Objective, config: SurrogateConfig) -> None:
        self.poison, self.config = poison, config
        given = poison.model
        if self.config.inner == "ti" and "{}" not in self.config.prompt:
            raise ConfigError(f"prompt {self.config.prompt!r} has no {{}} where the learned word stands.")
        self.model = copy.deepcopy(given, {id(given.vae): given.vae})
        if given.dtype in (torch.bfloat16, torch.float16):
            self.model.unet.float()
            self.model.text_encoder.float()
        self.rows = self._new_word() if self.config.inner == "ti" else None
        self.prompt = self.config.whole_prompt
        self.parameters = self._parameters()  # a list: an iterator would be empty for the clipping
        self._mixed = given.dtype == torch.bfloat16 and given.alphas_cumprod.is_cuda
        self._context: Tensor | None = None

    def _new_word(self) -> Tensor:
        """The vectors of placeholders, [rows, width]: ours is the last."""
        model, word = self.model, self.config.init_word
        placeholder = model.add_placeholder(TOKEN)
        table = cast(Any, model.text_encoder).get_input_embeddings().weight
        first = model.word_vector(word) if word else table.detach().float().mean(0)
        # Rows of the caller's own placeholders, if any, come before ours and are not in our prompt.
        rows = torch.zeros(placeholder.first - model.vocabulary + 1, model.width, device=table.device)
        rows[-1] = first
        return rows

    def _parameters(self) -> list[Tensor]:
        """What is trained."""
        if self.rows is not None:
            return [self.rows]
        if self.config.inner == "kv":
            named = self.model.unet.named_parameters()
            return [p for name, p in named if "attn2.to_k." in name or "attn2.to_v." in name]
        return [*self.model.unet.parameters(), *self.model.text_encoder.parameters()]

    def train(
        self,
        canvases: Sequence[Canvas],
        steps: int,
        *,
        first: int,
        phase: str,
        clean: bool,
        prior: Sequence[Canvas] = (),
    ) -> None:
        """`steps` AdamW steps on the canvases' pictures (clean: their sources), by key, from number `first` on.

        The optimiser is new each time, as the published loops have it. phase names the random numbers.
        """
        pictures, others = _list_pictures(canvases), _list_pictures(prior)
        decay = 0.0 if self.config.inner == "ti" else self.config.weight_decay
        for p in self.parameters:
            p.requires_grad_()
        optimizer = torch.optim.AdamW(self.parameters, lr=self.config.lr or LR[self.config.inner], weight_decay=decay)
        try:
            for step in range(first, first + steps):
                optimizer.zero_grad(set_to_none=True)
                for j in range(step * self.config.batch, (step + 1) * self.config.batch):
                    self._backward(pictures[j % len(pictures)], j, phase, clean, self.prompt, 1.0)
                    if self.config.prior_weight:
                        picture = others[j % len(others)]
                        self._backward(picture, j, "prior", True, self.config.class_prompt, self.config.prior_weight)
                nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
                optimizer.step()
        finally:
            for p in self.parameters:
                p.requires_grad_(False).grad = None
            self._context = None

    def _backward(self, picture: Picture, number: int, phase: str, clean: bool, prompt: str, weight: float) -> None:
        """Adds the gradient of one picture's loss, of a random tile where it has several. number: of the draw."""
        view = picture.view(KeyedRandom(self.poison.seed, picture.id, number, f"surrogate {phase}"), clean=clean)
        with torch.enable_grad():
            (self._loss(view, prompt) * (weight / self.config.batch)).backward()

    def _loss(self, view: View, prompt: str) -> Tensor:
        poison, model = self.poison, self.poison.model
        noise, x = poison.noise(view, "noise"), view.x
        if self.config.defended:
            t, x = poison.timesteps(view), poison.change(view)(x)
        else:
            view = view.unmasked()
            t = (view.shared.uniform("t", 1)[:, 0].double() * model.num_timesteps).long()
        with torch.no_grad():
            z = model.encode(x, noise=poison.noise(view, "posterior"))
            z_t = model.noised(z, t, noise)
        with self._precision():
            pred = self.model.predict(z_t, t, self.model.prompts([prompt], self.rows))
        return squared_error(pred, model.target(z, t, noise), view.mask, view.area).mean()

    def predict(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the surrogate's U-Net says of z_t under its prompt; differentiable in z_t, not in weights."""
        if self._context is None:
            with torch.no_grad(), self._precision():
                self._context = self.model.prompts([self.prompt], self.rows)
        with self._precision():
            return self.model.predict(z_t, t, self._context.expand(len(z_t), -1, -1))

    def state(self) -> list[Tensor]:
        """A copy of what is trained."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Put back what `state` gave."""
        for p, value in zip(self.parameters, state, strict=True):
            p.copy_(value)
        self._context = None

    def _precision(self) -> AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self._mixed else nullcontext()


def _list_pictures(canvases: Sequence[Canvas]) -> list[Picture]:
    """Every picture, by key: not by how they were grouped."""
    pictures = (Picture(key, canvas, row) for canvas in canvases for row, key in enumerate(canvas.keys))
    return sorted(pictures, key=lambda picture: picture.key)
