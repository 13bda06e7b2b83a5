"""`poisonshield pipeline`: what every rank builds by itself."""

from runs import CONFIGS

from poisonshield import world
from poisonshield.runs import read_experiment
from poisonshield.runs.pipeline import build_parts


def test_a_rank_builds_its_tokenizer_where_no_other_one_writes(tmp_path, monkeypatch):
    config = CONFIGS / "pretrain" / "rendered.yaml"
    monkeypatch.chdir(tmp_path)
    parts = [build_parts(read_experiment(config, [f"run.dir={tmp_path / 'run'}"]).settings) for _ in range(2)]
    assert not [*tmp_path.iterdir()]
    words = [[p["tokenizer"](w, add_special_tokens=False).input_ids for w in world.WORDS] for p in parts]
    assert words[0] == words[1] and all(len(ids) == 1 for ids in words[0])
    parts[0]["tokenizer"].save_pretrained(tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
