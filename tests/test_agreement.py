"""Two processes of one job that were told different things: each refuses before it trains, and says which key it is."""

import multiprocessing
import os
import socket
import sys
import time

import pytest
from dist import free_port

SMALL = (
    "model.widths=[8,8,16,16]", "method.hidden=16", "method.out=16", "data.batch_size=40", "data.workers=0",
    "engine.max_steps=2", "engine.device=cpu", "engine.threads=1", "evaluate.robust.attack.steps=1",
)  # fmt: skip

# What rank 1 is told beside what rank 0 is told, and what the refusal must name.
OTHER_SETTINGS = {
    "optimizer.lr=0.2": "optimizer.lr is 0.2",
    "seed=7": "seed is 7",
    "engine.max_steps=3": "engine.max_steps is 3",
    "engine.checkpoint_every_steps=1": "engine.checkpoint_every_steps is 1",
    "engine.backend=deepspeed": 'engine.backend is "deepspeed"',
    "engine.precision=bf16": 'engine.precision is "bf16"',
    "engine.accumulate=2": "engine.accumulate is 2",
    "data.batch_size=20": "data.batch_size is 20",
    "data.poison.eps=0.5": "data.poison.eps is 0.5",
    "data.poison=null": "data.poison is null",
    "model.widths=[8,8,16,32]": "model.widths.3 is 32",
    "model.batch_norm=local": 'model.batch_norm is "local"',
    "defenses=[]": "defenses is []",
    "views.blur_p=0.1": "views.blur_p is 0.1",
    "method.temperature=0.3": "method.temperature is 0.3",
    "run.dir={folder}/elsewhere": "run.dir is ",
    "data.train={other}": "its poison regions would",
    "data.poison=null data.train={other}": "digest of data.train is ",
}
OTHER_ENVIRONMENT = {
    ("POISONSHIELD_BACKEND", "reference"): 'POISONSHIELD_BACKEND is "reference"',
    ("NVIDIA_TF32_OVERRIDE", "0"): 'NVIDIA_TF32_OVERRIDE is "0"',
    ("WORLD_SIZE", "3"): "counts WORLD_SIZE=3 processes",
    ("RANK", "0"): "two processes call themselves rank 0: ",
}


def train(rank, port, folder, overrides, environment, versions):
    """One process, forked from one that has imported everything; its words go to rank-N.txt."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.environ.update(environment)
    sys.stdout = sys.stderr = (folder / f"rank-{rank}.txt").open("w", buffering=1)
    from poisonshield.cli import main
    from poisonshield.engine import meeting

    for name, value in versions.items():
        real = meeting.version
        meeting.version = lambda package, real=real, name=name, value=value: value if package == name else real(package)
    try:
        main(["train", "defend/vespr_cifar10_mini", f"run.dir={folder}/run", *SMALL, *overrides])
    except SystemExit as end:
        print("refused" if end.code else "trained")
    sys.stdout.flush()
    os._exit(0)


def words_of_both(folder, *, overrides=(), environment=None, versions=None):
    """What both processes say, and the seconds that it takes."""
    import deepspeed  # noqa: F401 - once, in the process that is forked

    import poisonshield.runs.classify  # noqa: F401

    folder.mkdir()
    port, began, context = free_port(), time.monotonic(), multiprocessing.get_context("fork")
    told = [((), {}, {}), (overrides, environment or {}, versions or {})]
    both = [context.Process(target=train, args=(rank, port, folder, *told[rank])) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    late = [process for process in both if process.is_alive()]
    for process in late:
        process.kill()
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert not late, texts
    return texts, time.monotonic() - began


def check_refused(folder, key, **told):
    texts, seconds = words_of_both(folder, **told)
    assert seconds < 20
    assert all(text.splitlines()[-1] == "refused" for text in texts), texts
    assert any(key in text for text in texts), texts
    assert not (folder / "run" / "metrics.jsonl").exists()
    return texts


@pytest.mark.dist
def test_settings_and_versions_are_compared_before_training(tmp_path):
    """One of each kind; the long list is slow."""
    texts = check_refused(tmp_path / "lr", "optimizer.lr is 0.2", overrides=["optimizer.lr=0.2"])
    assert all(f"rank 1 on {socket.gethostname()}: optimizer.lr is 0.2, and 0.1 on rank 0" in text for text in texts)
    texts = check_refused(tmp_path / "version", "deepspeed is ", versions={"deepspeed": "0.1"})
    assert all('deepspeed is "0.1", and' in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(("override", "key"), OTHER_SETTINGS.items())
def test_every_other_setting_is_refused(tmp_path, override, key):
    from poisonshield.data import find_folder

    override = override.format(folder=tmp_path, other=find_folder("cifar10-mini", "test"))
    texts = check_refused(tmp_path / "run", key, overrides=override.split())
    assert all(key in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "key"), OTHER_ENVIRONMENT.items())
def test_every_other_environment_is_refused(tmp_path, variable, key):
    check_refused(tmp_path / "run", key, environment=dict([variable]))


@pytest.mark.slow
def test_what_belongs_to_a_process_may_differ(tmp_path):
    texts, _ = words_of_both(tmp_path / "run", overrides=["data.workers=1"])
    assert all("trained" in text.splitlines() for text in texts), texts
