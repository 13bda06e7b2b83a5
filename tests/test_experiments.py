"""From a config to a run: every mistake is worded before any process group starts, and the record says what ran."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from poisonshield.config import Choice
from poisonshield.data import ResidentSource, ShardSet
from poisonshield.errors import ConfigError, DataError
from poisonshield.runs import read_experiment, read_finished
from poisonshield.runs.classify import build_method, build_stream
from poisonshield.runs.parts.image_data import build_poison, build_training_set, open_data
from poisonshield.runs.parts.training import Training

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MINI = str(CONFIGS / "defend" / "vespr_cifar10_mini.yaml")
ALL_CONFIGS = sorted(p for p in CONFIGS.rglob("*.yaml") if not p.name.startswith("base"))


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_is_valid_and_short(path):
    assert read_experiment(path)
    assert len([line for line in path.read_text().splitlines() if ":" in line]) <= 60


def test_record_round_trips_and_keeps_fractions():
    run = read_experiment(MINI)
    assert run.record["defenses"][0]["eps"] == "8/255"
    assert yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(run.record))))["data"]["poison"]["name"] == "regions"


def test_run_read_from_its_own_record_is_the_same(tmp_path):
    run = read_experiment(MINI, ["seed=3"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(run.record))))
    again = read_experiment(path)
    assert again.record == run.record
    assert (again.method, again.defenses, again.poison) == (run.method, run.defenses, run.poison)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "defenses.0.attack.step_sise=1/255",
            "defenses[0].attack: step_sise is not a setting of pgd. Did you mean step_size?",
        ),
        ("defenses.0.eps=4", "defenses[0].eps: 4 is outside [0, 1]: budgets are in pixel units. Did you mean 4/255?"),
        ("engine.max_steps=many", "engine.max_steps: Input should be a valid integer"),
        ("engine.backend=deepsped", "Did you mean deepspeed?"),
        ("method.name=simcrl", "'simcrl' is not a method. Did you mean simclr?"),
        ("data.poison=lps", "'lps' is not a poison. Did you mean lsp?"),
        ("data.poison=gone.poison.safetensors", "there is no recipe file gone.poison.safetensors"),
        ("optimiser.lr=1", "optimiser is not a setting of a run. Did you mean optimizer?"),
        ("defenses=vespr", "a list is wanted"),
        ("data.batch_size=1", "batch norm needs at least 2 samples"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
    ],
)
def test_mistake_is_worded(override, words):
    with pytest.raises(ConfigError) as err:
        read_experiment(MINI, [override])
    assert words in str(err.value) and f"command line: {override}" in str(err.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.zero_stage=2", "base_cifar10_mini.yaml:21: engine: zero_stage 2 needs backend: deepspeed"),
        ("method.name=supervised", "yaml:15: defenses[0]: vespr adds a classifier to a self-supervised method"),
        ("defenses.0.attack_views=[5]", "yaml:15: defenses[0]: vespr.attack_views [5]: simclr has 2 views"),
        ("data.poison_ratio=0.5", "data.poison_ratio: a recipe brings its own"),
    ],
)
def test_pair_that_cannot_work_is_worded_at_its_block(override, words, tmp_path):
    overrides = [override]
    if "ratio" in override:
        (tmp_path / "r.poison.safetensors").touch()
        overrides.append(f"data.poison={tmp_path / 'r.poison.safetensors'}")
    with pytest.raises(ConfigError) as err:
        read_experiment(MINI, overrides)
    assert words in str(err.value)


def test_all_mistakes_of_a_file_come_with_their_lines(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        f"extends: {MINI}\nseed: x\nmethod:\n  name: simclr\n  temperatur: 1\ndefenses:\n  - name: vespr\n    eps: 8\n"
    )
    with pytest.raises(ConfigError) as err:
        read_experiment(path)
    lines = str(err.value).splitlines()
    assert [f"{path}:{n}" in line for n, line in zip((2, 5, 8), lines, strict=True)] == [True] * 3


def test_changed_defense_list_replaces_the_old_one():
    run = read_experiment(MINI, ["method.name=supervised", "defenses=[{name: adversarial}]"])
    assert [d.name for d in run.defenses] == ["adversarial"] and run.defense_label == "adversarial"


@pytest.mark.parametrize("turned", [False, True])
def test_name_of_a_block_keeps_the_settings_given_beside_it_in_any_order(turned):
    overrides = ["data.poison.eps=2/255", "data.poison.name=class_noise"]
    run = read_experiment(MINI, overrides[::-1] if turned else overrides)
    assert run.poison.name == "class_noise" and run.poison.config.eps == pytest.approx(2 / 255)
    named_later = read_experiment(
        MINI, ["method.name=supervised", "defenses=[{name: vespr}]", "defenses.0.name=adversarial"]
    )
    assert named_later.defense_label == "adversarial"


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.poison.name=ar", "data.poison.budget=linf", "data.poison.eps=8"],
        ["method.name=supervised", "defenses=[{name: adversarial, eps: 8}]"],
    ],
)
def test_linf_radius_in_levels_is_refused_where_the_norm_is_a_choice(overrides):
    with pytest.raises(ConfigError, match="8 .*is outside .* Did you mean 8/255"):
        read_experiment(MINI, overrides)
    l2 = [o.replace("linf", "l2").replace("eps: 8", "eps: 8, norm: l2") for o in overrides]
    assert read_experiment(MINI, l2).record


def test_labels_say_what_was_done():
    run = read_experiment(MINI, ["defenses=[{name: vespr, attack_views: []}]", "data.poison=null"])
    assert (run.defense_label, run.poison_label) == ("ssl+ce", "none")
    assert read_experiment(MINI, ["defenses=[]"]).defense_label == "none"


def test_missing_data_set_names_the_bundled_ones():
    with pytest.raises(ConfigError, match="Bundled: cifar10-mini"):
        open_data(read_experiment(MINI, ["data.train=cifar10-mimi"]))


def test_training_and_testing_on_one_set_is_refused(tmp_path):
    mini = open_data(read_experiment(MINI)).train.folder
    shutil.copytree(mini, tmp_path / "same")
    same = [f"data.{split}={tmp_path / 'same'}" for split in ("train", "test")]
    with pytest.raises(DataError, match="are the same set"):
        open_data(read_experiment(MINI, [*same, "data.poison=regions"]))


def test_set_without_test_images_trains_and_says_so(tmp_path, caplog):
    """Accuracy needs clean test images; where there are none it is missing, not measured on the training images."""
    mini = open_data(read_experiment(MINI)).train.folder
    shutil.copytree(mini, tmp_path / "same")
    data = open_data(read_experiment(MINI, [f"data.train={tmp_path / 'same'}", "data.poison=null"]))
    (tmp_path / "one").mkdir()
    (tmp_path / "same").rename(tmp_path / "one" / "train")
    alone = open_data(read_experiment(MINI, [f"data.train={tmp_path / 'one'}", "data.poison=null"]))
    assert (
        data.test is None
        and alone.test is None
        and "no test split, so there are no numbers on test images" in caplog.text
    )


def test_vespr_on_unlabelled_images_is_refused():
    run = read_experiment(MINI)
    with pytest.raises(ConfigError, match="one class: they are unlabelled"):
        build_method(run, 1)


def test_weights_follow_the_seed_and_leave_torch_alone():
    run = read_experiment(MINI)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = build_method(run, 10), build_method(run, 10)
    other = build_method(read_experiment(MINI, ["seed=1"]), 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.head.weight, other.head.weight)


def test_resident_and_tar_sources_give_the_same_poisoned_views():
    streams = []
    for source in ("resident", "tar"):
        run = read_experiment(MINI, [f"data.source={source}"])
        data = open_data(run)
        training = build_training_set(run, data)
        assert isinstance(training.source, ResidentSource if source == "resident" else ShardSet)
        streams.append(iter(build_stream(run, training, build_method(run, 10), torch.device("cpu"))))
    for _ in range(3):
        a, b = next(streams[0]), next(streams[1])
        assert a.keys == b.keys and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
        assert len(a.views) == 2 and all(torch.equal(v, w) for v, w in zip(a.views, b.views, strict=True))


def test_poisoned_pixels_are_levels_within_the_budget_and_tests_stay_clean():
    run = read_experiment(MINI)
    data = open_data(run)
    clean = next(
        iter(build_training_set(read_experiment(MINI, ["data.poison=null"]), data).batches(50, torch.device("cpu")))
    )
    poisoned = next(iter(build_training_set(run, data).batches(50, torch.device("cpu"))))
    levels = (poisoned.x - clean.x) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3) and levels.abs().max().round() == 8
    assert isinstance(run.poison, Choice) and build_poison(run, data.train).budget().radius == pytest.approx(8 / 255)


def test_a_run_folder_of_an_earlier_version_is_read_under_new_names(tmp_path):
    """Its record has the settings of that version; how it evaluated is left to today's defaults."""
    run = read_experiment(MINI, ["run.dir=elsewhere"])
    record = json.loads(json.dumps(run.record))
    attack = record["defenses"][0].pop("attack")
    record["defenses"][0] |= {key: attack[key] for key in ("step_size", "steps", "random_start", "restarts")}
    record["evaluate"] = {"batch_size": 500, "knn_k": 20, "lipschitz_samples": 0}
    record["forge"] = record.pop("release")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(record))
    again = read_finished(tmp_path)
    assert again.record["defenses"][0]["attack"] == run.record["defenses"][0]["attack"]
    assert again.defenses == run.defenses and again.settings.release == run.settings.release
    assert again.settings.evaluate.knn == run.settings.evaluate.knn
    assert again.folder.path == tmp_path, "results go where the folder lies now"


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_typo_in_the_methods_name_is_one_line_with_the_right_name(path):
    experiment = read_experiment(path)
    if not isinstance(experiment, Training):
        pytest.skip("a grid and a pipeline name no method")
    right = experiment.method.name
    typo = right[:-2] + right[-1] + right[-2] if right[-1] != right[-2] else right[:-1]
    with pytest.raises(ConfigError) as error:
        read_experiment(path, [f"method.name={typo}"])
    assert len(str(error.value).splitlines()) == 1 and f"Did you mean {right}?" in str(error.value)


def test_checking_a_config_takes_no_memory_for_its_networks():
    """A layer of 65,536 x 65,536 numbers is 16 GiB: what a config asks for is looked at and not made."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_experiment(MINI, ["method.hidden=65536", "method.out=65536"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
