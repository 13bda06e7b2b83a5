"""engine.compile: the encoder runs compiled, under the same names, with the same numbers up to rounding."""

import pytest
import torch

from engine.tiny import TinyMethod, losses, make_trainer, train, weights
from poisonshield import ops
from poisonshield.engine.processes import processes
from poisonshield.engine.settings import EngineConfig
from poisonshield.errors import BackendError, ConfigError
from poisonshield.models.backbones import BackboneConfig, build_encoder


class Compiling(TinyMethod):
    """Lets the engine compile its encoder; without dropout, which draws other numbers when it is compiled."""

    def __init__(self):
        super().__init__()
        self.encoder[3].p = 0.0

    def parts_to_compile(self):
        return (self.encoder,)


def fit(folder, method):
    with processes(EngineConfig(max_steps=1, device="cpu"), seed=1):
        make_trainer(folder, method=method, compile=True, max_steps=1).fit()


def test_method_without_such_a_part_is_refused(tmp_path):
    class Whole(TinyMethod):
        name = "whole"

        def parts_to_compile(self):
            return ()

    with pytest.raises(ConfigError, match="engine.compile: whole has no part that is compiled. Leave it out"):
        fit(tmp_path, Whole())


def test_machine_without_a_compiler_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "info", lambda: {"compiled": "no C++ compiler: install g++"})
    with pytest.raises(BackendError, match="nothing can be compiled here: no C\\+\\+ compiler: install g\\+\\+"):
        fit(tmp_path, Compiling())


def test_encoder_whose_norms_change_is_refused():
    encoder = build_encoder(BackboneConfig(name="resnet_mini", views_together=True))
    with pytest.raises(ConfigError, match="Set model.views_together: false, or engine.compile: false"):
        encoder.compile()


@pytest.mark.slow
def test_compiled_run_is_the_plain_one_up_to_rounding(tmp_path):
    plain, _ = train(tmp_path / "plain", method_class=Compiling, max_steps=6)
    compiled, _ = train(tmp_path / "compiled", method_class=Compiling, max_steps=6, compile=True)
    assert compiled.method.encoder._compiled_call_impl is not None
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    a, b = weights(plain.method), weights(compiled.method)
    assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-5) for n in a)
