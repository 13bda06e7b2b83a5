"""Every backend is one process: losses, weights, resumption and refusals of two ranks against those of one.

The method attacks its input inside its forward, contrasts all samples with each other and takes batch statistics over
ranks, so that a wrapper which miscounts a gradient, a rank or a forward cannot pass. All runs share one start.
"""

import copy
import json
import math
import multiprocessing
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from engine.tiny import (
    AttackedMethod,
    Interrupted,
    TinyMethod,
    TinyStream,
    difference,
    losses,
    make_trainer,
    same_bits,
    train,
    weights,
)
from poisonshield import collectives
from poisonshield.batch import StepOutput
from poisonshield.engine.checkpoint import sha256
from poisonshield.engine.guards import NonFiniteError
from poisonshield.engine.signals import Preempted
from poisonshield.errors import BackendError, CheckpointError
from poisonshield.method import SSLMethod

BACKENDS = {"plain": {}, **{f"zero{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in range(4)}}
CLOSE = 1e-5  # float32 sums in another order, over eight steps
BF16_CLOSE = 0.03  # losses near 5.5 with eight bits: measured 0.015
STEPS, CLIP = 8, 0.3  # the gradient's norm is near 0.8, so clipping always bites


class Teacher(AttackedMethod):
    """Also what sharding may lose: parameters of its own, another module's weight, a frozen copy that follows along."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.prototypes = nn.Parameter(torch.full((3, 8), 0.5), requires_grad=False)

    def forward(self, batch):
        out = super().forward(batch)
        h = self.encoder(batch.x) * self.scale
        with torch.no_grad():
            target = self.teacher(batch.x)
        scores = h @ self.head.weight.T + h @ self.prototypes.T
        extra = collectives.mean((h - target).pow(2).sum(1) + scores.sin().sum(1), batch.rank_sizes)
        return StepOutput(out.loss + extra, out.metrics)

    def after_step(self, progress):
        super().after_step(progress)
        for old, new in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            old.data.lerp_(new.data, 0.2)


class Around(SSLMethod):
    """A method that calls another whole, as a defense does."""

    def __init__(self):
        super().__init__()
        self.inner = Teacher()
        self.gain = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, batch):
        out = self.inner(batch)
        return StepOutput((self.gain * out.loss).sum(), {**out.metrics, "inner": out.loss.detach()})

    def after_step(self, progress):
        self.inner.after_step(progress)


class BadGradient(AttackedMethod):
    """A finite loss whose gradient is not, at step 3: infinity times zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        out = super().forward(batch)
        zero = 0 * self.head.bias.sum()
        self.steps += 1
        return StepOutput(out.loss + (zero.abs().sqrt() if self.steps == 3 else zero), out.metrics)


def run(folder, *, method_class=AttackedMethod, **settings):
    """(losses, whole state) of a run as one of several ranks, or alone; the state is on rank 0 only."""
    trainer, _ = train(folder, method_class=method_class, **{"max_steps": STEPS, "clip_norm": CLIP, **settings})
    state = trainer.state_dict()
    assert bool(state) == (collectives.rank() == 0)
    return losses(folder), {k: v.tolist() for k, v in state.items()}, sorted({str(v.dtype) for v in state.values()})


def parameters(trainer):
    """The whole parameters, wherever their pieces are; all ranks call."""
    state = trainer.state_dict()
    names = {name for name, _ in trainer.method.named_parameters()}
    return {k: v.tolist() for k, v in state.items() if k in names}


def run_of_this_rank(folder, **settings):
    """Losses and parameters of a run of the method whose batch statistics are local, and this rank's own buffers."""
    trainer, _ = train(folder, max_steps=STEPS, **settings)
    buffers = {name: value.tolist() for name, value in trainer.method.named_buffers()}
    return {"losses": losses(folder), "parameters": parameters(trainer), "buffers": buffers}


def stop_at_a_bad_step(folder, kind, **settings):
    """What a bad third step did: the error's words, and whether the parameters are those before it."""
    before, bad = {}, (2,) if kind == "loss" else ()
    stream = Interrupted(2, lambda: before.update(parameters(trainer)), bad_steps=bad)
    method = AttackedMethod() if kind == "loss" else BadGradient()
    trainer = make_trainer(folder, method=method, stream=stream, **settings)
    words = refused(NonFiniteError, trainer.fit)
    return words, before == parameters(trainer), len(before)


def refused(kind, call):
    """The words of the error that `call` must raise."""
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def two_ranks(rank, world, root):
    """Everything that needs two ranks, in one start. Returns plain values, by backend and check."""
    out = {"preempted": {}, "skipped": {}}
    for name, backend in BACKENDS.items():
        here, answers = root / name, {}
        saving = {"checkpoint_every_steps": 3, "keep_checkpoints": 5, **backend}
        answers["even"] = run(here / "even", **saving)
        answers["uneven"] = run(here / "uneven", stream=TinyStream(even=False), **backend)
        answers["around"] = run(here / "around", method_class=Around, **saving)
        third = str(here / "around" / "checkpoints" / "step-00000003")
        answers["resumed"] = run(here / "resumed", method_class=Around, resume=third, **backend)
        if name != "zero0":
            answers["bf16"] = run(here / "bf16", precision="bf16", **backend)
        answers["bad"] = {kind: stop_at_a_bad_step(here / kind, kind, **backend) for kind in ("loss", "gradient")}
        out[name] = answers
    local = {"method_class": TinyMethod, "nonfinite": "skip", "nonfinite_limit": 1, "stream": TinyStream((1,))}
    out["skipped"]["plain"] = run(root / "skip", **local)
    out["skipped"]["words"] = refused(NonFiniteError, lambda: train(root / "stop", stream=TinyStream((1,))))
    for name in ("plain", "zero3"):  # one rank of the two is told to stop
        told = Interrupted(4, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
        with pytest.raises(Preempted) as stopped:
            train(root / name / "stopped", stream=told, max_steps=STEPS, **BACKENDS[name])
        again = run_of_this_rank(root / name / "stopped", resume="auto", **BACKENDS[name])
        never = run_of_this_rank(root / name / "never", **BACKENDS[name])
        out["preempted"][name] = (stopped.value.code, stopped.value.step, again == never, again["buffers"])
    out["zero3"]["in pieces"] = run_in_pieces(root / "pieces")
    out["discard"] = refused(BackendError, lambda: drop_a_step(root / "discard"))
    return out


@contextmanager
def in_pieces():
    """ZeRO 3 with nothing kept whole between uses; by default it keeps parameters as small as these."""
    from poisonshield.engine.backends import deepspeed as module

    ours = module.deepspeed_config

    def config(*args):
        made = ours(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    module.deepspeed_config = config
    try:
        yield
    finally:
        module.deepspeed_config = ours


def run_in_pieces(folder):
    with in_pieces():
        settings = {"method_class": Around, **BACKENDS["zero3"]}
        whole = run(folder / "a", checkpoint_every_steps=3, keep_checkpoints=5, **settings)
        resumed = run(folder / "b", resume=str(folder / "a" / "checkpoints" / "step-00000003"), **settings)
    return whole, resumed


def drop_a_step(folder):
    trainer = make_trainer(folder, method=AttackedMethod(), max_steps=1, **BACKENDS["zero1"])
    trainer.fit()
    trainer.backend.discard()


def alone(root):
    """Everything that needs deepspeed in one process without a launcher; runs after two_ranks, in its own process."""
    torch.set_num_threads(1)
    out, third = {}, "even/checkpoints/step-00000003"
    out["run"] = run(root / "alone", **BACKENDS["zero2"])
    out["again"] = run(root / "again", **BACKENDS["zero1"])  # a second run in one process
    for name in BACKENDS:
        if name != "plain":
            out[name] = run(root / f"fewer-{name}", resume=str(root / name / third), **BACKENDS[name])
    out["attack"] = load_an_attack(root)
    return out


class Attack:
    """Unpickled naively, it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def load_an_attack(root):
    """Put code into each kind of DeepSpeed's files, with a right hash: what is said, whether it ran, losses after."""
    words, trace = {}, root / "trace"
    run(root / "good", max_steps=2, **BACKENDS["zero1"])
    step = root / "good" / "checkpoints" / "step-00000002"
    for part in ("model_states", "optim_states"):
        (file,) = step.rglob(f"*{part}.pt")
        content, index = file.read_bytes(), json.loads((step / "index.json").read_text())
        torch.save({"module": {}, "attack": Attack(str(trace))}, file)
        index["files"][str(file.relative_to(step))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        (step / "index.json").write_text(json.dumps(index))
        (step / "index.sha256").unlink(missing_ok=True)  # as whoever writes the index could do, or write a right one
        words[part] = refused(CheckpointError, lambda: run(root / "good", resume="auto", **BACKENDS["zero1"]))
        file.write_bytes(content)
        index["files"][str(file.relative_to(step))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        (step / "index.json").write_text(json.dumps(index))
    return words, trace.exists(), run(root / "good", resume="auto", max_steps=3, **BACKENDS["zero1"])[0]


def tensors(state):
    return {k: torch.tensor(v) for k, v in state.items()}


@pytest.fixture(scope="module")
def root(ask_two_ranks):
    return ask_two_ranks(__name__).folder


@pytest.fixture(scope="module")
def one(root):
    """Each method run by one plain process: the oracle."""
    methods = {m.__name__: run(root / f"one-{m.__name__}", method_class=m) for m in (AttackedMethod, Around)}
    return {**methods, "bf16": run(root / "one-bf16", precision="bf16")}


@pytest.fixture(scope="module")
def two(ask_two_ranks):
    """The answers of both ranks."""
    return ask_two_ranks(__name__).ranks


@pytest.fixture(scope="module")
def single(root, two):
    """The answers of one process with deepspeed and no launcher, in a process of its own."""
    clean = {k: os.environ.pop(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if k in os.environ}
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply_async(alone, (root,)).get(timeout=200)
    finally:
        os.environ.update(clean)


pytestmark = pytest.mark.dist


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("name", BACKENDS)
def test_two_ranks_train_as_one_process_does(one, two, name, split):
    """4 + 4 or 5 + 3 samples a step; losses and everything that the method holds."""
    expected, state, _ = one["AttackedMethod"]
    got = two[0][name][split]
    assert len(got[0]) == STEPS and got[0] == pytest.approx(expected, abs=CLOSE)
    assert difference(tensors(got[1]), tensors(state)) < CLOSE
    assert expected[0] - min(expected) > 0.2  # it does train, so equality says something


@pytest.mark.parametrize("name", BACKENDS)
def test_own_parameters_frozen_copies_and_nested_methods_train_as_in_one_process(one, two, name):
    expected, state, _ = one["Around"]
    got = two[0][name]["around"]
    assert got[0] == pytest.approx(expected, abs=2 * CLOSE) and difference(tensors(got[1]), tensors(state)) < 2 * CLOSE


def test_zero_3_with_every_parameter_in_pieces_trains_and_resumes_as_one_process(one, two):
    expected, state, _ = one["Around"]
    whole, resumed = two[0]["zero3"]["in pieces"]
    assert whole[0] == pytest.approx(expected, abs=2 * CLOSE)
    assert difference(tensors(whole[1]), tensors(state)) < 2 * CLOSE
    assert resumed[0] == whole[0][3:] and resumed[1] == whole[1]


@pytest.mark.parametrize("name", BACKENDS)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(two, name):
    whole, resumed = two[0][name]["around"], two[0][name]["resumed"]
    assert len(resumed[0]) == STEPS - 3 and resumed[0] == whole[0][3:] and resumed[1] == whole[1]


def test_plain_checkpoint_of_two_ranks_goes_on_in_one_process(one, two, root, caplog):
    path = root / "plain" / "even" / "checkpoints" / "step-00000003"
    got = run(root / "plain-one", resume=str(path))
    assert got[0] == pytest.approx(one["AttackedMethod"][0][3:], abs=CLOSE)
    assert difference(tensors(got[1]), tensors(one["AttackedMethod"][1])) < CLOSE
    assert "has 2 ranks, this run 1: global random states start anew" in caplog.text


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "zero0"])
def test_bf16_stays_near_fp32_with_whole_state_in_fp32(one, two, name):
    expected = one["AttackedMethod"][0]
    got, state, dtypes = two[0][name]["bf16"]
    assert got == pytest.approx(expected, abs=BF16_CLOSE) and dtypes == ["torch.float32"]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) > 1e-4  # it was not fp32 all along
    assert difference(tensors(state), tensors(one["AttackedMethod"][1])) < BF16_CLOSE


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("name", BACKENDS)
def test_bad_step_moves_nothing_on_any_rank(two, name, kind):
    words, unmoved, watched = zip(*(answers[name]["bad"][kind] for answers in two), strict=True)
    assert unmoved == (True, True) and watched == (5, 0) and words[0] == words[1]  # rank 0 has the whole of them
    start = {"loss": "loss nan", "gradient": "gradient norm nan after a finite loss on each of 2 ranks."}[kind]
    assert words[0].startswith(f"step 3: {start}")


def test_bad_samples_of_one_rank_are_named_by_all(two):
    """Batch statistics are local here, so only the second rank's loss is bad."""
    words = [answers["skipped"]["words"] for answers in two]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))[12:16].tolist()
    assert words[0] == words[1] and words[0].startswith("step 2: loss nan, gradient norm nan on rank 1 of 2, samples ")
    assert f"samples {', '.join(f'image-{i}' for i in order)}.\n" in words[0]


def test_step_bad_on_one_rank_is_dropped_by_all(two):
    values, state, _ = two[0]["skipped"]["plain"]
    assert len(values) == STEPS - 1 and all(math.isfinite(v) for v in values)
    assert all(v.isfinite().all() for v in tensors(state).values())
    assert state["encoder.1.num_batches_tracked"] == STEPS - 1


@pytest.mark.parametrize("name", ["plain", "zero3"])
def test_signal_to_one_rank_stops_all_at_the_same_step_and_nothing_is_lost(two, name):
    """Each rank's own batch statistics and random states (for its dropout) included."""
    *told, buffers = zip(*(answers["preempted"][name] for answers in two), strict=True)
    assert told == [(75, 75), (5, 5), (True, True)]
    assert buffers[0]["encoder.1.running_mean"] != buffers[1]["encoder.1.running_mean"]


def test_deepspeed_refuses_to_drop_a_step(two):
    for answers in two:
        assert answers["discard"] == "deepspeed cannot drop a step whole: set engine.nonfinite: stop."


def test_deepspeed_needs_no_launcher_for_one_process(one, single):
    for kind in ("run", "again"):
        assert single[kind][0] == pytest.approx(one["AttackedMethod"][0], abs=CLOSE)
        assert difference(tensors(single[kind][1]), tensors(one["AttackedMethod"][1])) < CLOSE


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "plain"])
def test_deepspeed_checkpoint_of_two_ranks_goes_on_on_one(one, single, name):
    losses, state, _ = single[name]
    assert losses == pytest.approx(one["AttackedMethod"][0][3:], abs=CLOSE)
    assert difference(tensors(state), tensors(one["AttackedMethod"][1])) < CLOSE


def test_deepspeed_file_that_would_run_code_is_refused(single):
    words, ran, after = single["attack"]
    for part, text in words.items():
        assert f"{part}.pt cannot be read as tensors and plain values" in text
    assert len(words) == 2 and not ran and len(after) == 3


def test_plain_state_is_that_of_the_method(tmp_path):
    trainer, _ = train(tmp_path, max_steps=1)
    assert same_bits(trainer.state_dict(), weights(trainer.method))
