"""PID, prompt-independent defense: move mean and variance of the VAE's posterior away from the clean ones.

Source: Li et al. 2024.

No prompt and no U-Net. The clean moments are computed once, not at every step.
"""

from torch import Tensor

from poisonshield.poisons.diffusion.attack.gradients import gradient_of
from poisonshield.poisons.diffusion.base import AttackConfig, DiffusionPoison, View


class PID(DiffusionPoison):
    """Raises MSE(log var(x), log var(clean)) + MSE(mean(x), mean(clean)), of the unscaled posterior."""

    class Config(AttackConfig):
        """The authors' script: 12.75 levels, 1000 steps of 1."""

    name = "pid"
    source = "Li et al. 2024"
    noise_start = "always"

    @property
    def fixed_goal(self) -> bool:
        """The clean posterior."""
        return True

    def prepare(self, view: View) -> dict[str, Tensor]:
        """The clean moments."""
        mean, std = self.model.posterior(view.x)
        return {"mean": mean, "log_var": 2 * std.log()}

    def terms(self, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """(MSE of log variances, MSE of means), each [B]."""
        mean, std = self.model.posterior(self.change(view)(x))
        of_variance, of_mean = 2 * std.log() - view.memo["log_var"], mean - view.memo["mean"]
        return of_variance.square().flatten(1).mean(1), of_mean.square().flatten(1).mean(1)

    def _sum(self, x: Tensor, view: View) -> Tensor:
        of_variance, of_mean = self.terms(x, view)
        return of_variance + of_mean

    def gradient(self, view: View) -> Tensor:
        """Of both terms, in one graph."""
        return gradient_of(lambda x: self._sum(x, view), view.x)

    def objective(self, view: View) -> Tensor:
        """Both terms."""
        return self._sum(view.x, view)
