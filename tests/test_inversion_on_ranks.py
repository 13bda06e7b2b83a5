"""Textual inversion with Safe-Zone Training on two ranks, whatever shards it, learns what one process learns.

A whole run as `poisonshield train` makes it, ends included: the loss of each step, and vectors in embedding files.
Tolerance, stated before any comparison: 1e-5, of the loss, and of the distance that a vector has moved.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dist import free_port, run_dist
from runs import CONFIGS, logged
from safetensors.torch import load_file
from tiny import tiny_folder

from poisonshield.api import train
from poisonshield.errors import ConfigError

CONFIG = str(CONFIGS / "invert" / "rendered.yaml")
CONCEPTS = ("purple-star", "yellow-ring")
BACKENDS = {
    "plain": (),
    **{f"zero{s}": ("engine.backend=deepspeed", f"engine.zero_stage={s}") for s in range(4)},
}
SHORT = (
    "data.concepts=[yellow ring, purple star]", "data.count=3", "data.masks=file", "data.batch_size=4",
    "defenses=[{name: szt, purifier: {name: jpeg, quality: 50}, t_min: 500, mask: file}]",
    "engine.max_steps=4", "engine.log_every_steps=1", "engine.device=cpu",
    "generate.count=1", "generate.steps=1", "generate.every_steps=2", "evaluate.latent_cosine=null",
)  # fmt: skip
# Beside Safe-Zone Training as its config has it: what the whole batch on all ranks decides, and a step of two batches.
CALM = "generate.every_steps=null"
CASES = {
    "szt": (),
    "batch": ("defenses.0.loss_norm=batch", "defenses.0.t_sampler=stratified", "method.keep_norm=true", CALM),
    "accumulate": ("engine.accumulate=2", "method.vae=sample", CALM),
}
PIECES = "zero3 in pieces"  # by default ZeRO 3 keeps parameters below 100,000 numbers whole on every rank
RUNS = [
    *(("szt", backend) for backend in (*BACKENDS, PIECES)),
    *(("batch", backend) for backend in ("plain", "zero0")),
    *(("accumulate", backend) for backend in ("plain", "zero2", PIECES)),
]
LAUNCH = Path(__file__).resolve().parents[1] / "launch" / "train.py"


def settings(folder, pipeline, *more):
    return [f"model.pipeline={json.dumps(str(pipeline))}", f"run.dir={json.dumps(str(folder))}", *SHORT, *more]


def learned(folder):
    """{concept: vectors} of the embedding files."""
    files = {name: Path(folder) / "export" / name / "learned_embeds.safetensors" for name in CONCEPTS}
    return {name: load_file(file)[f"<{name}>"] for name, file in files.items()}


def everything(rank, world, folder, pipeline):
    """All runs, one after the other."""
    for case, backend in RUNS:
        run = lambda over, case=case, backend=backend: train(
            CONFIG, settings(f"{folder}/{case}-{backend}", pipeline, *CASES[case], *over)
        )
        in_pieces(run, BACKENDS["zero3"]) if backend == PIECES else run(BACKENDS[backend])
    return rank


def in_pieces(run, over):
    """A run with nothing kept whole between uses."""
    from poisonshield.engine.backends import deepspeed as module

    ours = module.deepspeed_config

    def config(*args):
        made = ours(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    module.deepspeed_config = config
    try:
        run(over)
    finally:
        module.deepspeed_config = ours


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pipeline") / "p", size=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory, pipeline):
    """The vectors that all runs begin with: those of a run at rate 0."""
    return learned(
        train(
            CONFIG, settings(tmp_path_factory.mktemp("start") / "r", pipeline, "optimizer.lr=0", "engine.max_steps=1")
        )
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(CONFIG, settings(folder / name, pipeline, *more)) for name, more in CASES.items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("shared")
    run_dist(everything, 2, str(folder), str(pipeline), deepspeed=True, timeout_s=400)
    return folder


def check(one, two, start):
    """Losses and vectors agree; prints by how much."""
    losses, theirs = logged(one), logged(two)
    assert len(set(losses)) == 4
    far = max(abs(a - b) / abs(a) for a, b in zip(losses, theirs, strict=True))
    away = max(float((learned(two)[n] - v).norm() / (v - start[n]).norm()) for n, v in learned(one).items())
    print(f"losses {far:.1e}, vectors {away:.1e} of the distance moved")
    assert far < 1e-5 and away < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_two_ranks_learn_the_words_that_one_process_learns(case, backend, alone, shared, start):
    check(alone[case], shared / f"{case}-{backend}", start)


@pytest.mark.dist
def test_the_comparison_would_notice_another_seed_or_another_denominator(alone, start):
    """The cases differ from each other by much more than the tolerance."""
    szt, batch = learned(alone["szt"]), learned(alone["batch"])
    assert all((szt[n] - batch[n]).norm() > 1e-3 * (szt[n] - start[n]).norm() for n in CONCEPTS)


@pytest.mark.dist
def test_rank_0_leaves_all_that_one_process_leaves(alone, shared):
    files = lambda folder: {
        str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in p.parts and p.is_file()
    }
    for backend in [*BACKENDS, PIECES]:
        assert files(shared / f"szt-{backend}") == files(alone["szt"])
    assert "validation/step-000002.png" in files(alone["szt"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharding_that_would_undo_a_method_s_own_moves_is_refused(tmp_path, pipeline, stage):
    sharded = ("method.keep_norm=true", "engine.backend=deepspeed", f"engine.zero_stage={stage}")
    with pytest.raises(ConfigError, match=f"engine.zero_stage {stage} would put them back. Set zero_stage: 0"):
        train(CONFIG, settings(tmp_path / "r", pipeline, *sharded))


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr("poisonshield.collectives.world_size", lambda: 3)
    with pytest.raises(ConfigError, match="multiple of the ranks"):
        train(CONFIG, settings(tmp_path / "r", pipeline))


def launch(command, folder, pipeline, *more):
    """A run as a user starts it on two processes."""
    port = free_port()
    binaries = Path(sys.executable).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }  # fmt: skip
    line = [str(binaries / command[0]), *(c.replace("PORT", str(port)) for c in command[1:]), str(LAUNCH), CONFIG]
    done = subprocess.run(
        [*line, *settings(folder, pipeline, *more)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=LAUNCH.parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        (("torchrun", "--nproc_per_node", "2", "--master_port", "PORT"), ()),
        (("deepspeed", "--num_gpus", "2", "--master_port", "PORT"), BACKENDS["zero2"]),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_the_launch_line_of_classifiers_starts_it_too(tmp_path, pipeline, alone, start, command, more):
    launch(command, tmp_path / "r", pipeline, *more)
    check(alone["szt"], tmp_path / "r", start)
