"""What strangers wrote reaches no screen as a command: in errors, logs, prints, tables and bars."""

import io
import json
import logging
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from rich.table import Table

from poisonshield.cli import main
from poisonshield.data import open_dataset
from poisonshield.data.writer import ShardWriter
from poisonshield.terminal import Console, Formatter, guard, visible

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2066\u200b\x08"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202egnp.\u2066\u200b\x08"


def harmless(text):
    return not [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def test_controls_are_written_out_and_the_rest_stays():
    assert visible(EVIL) == SHOWN
    assert visible("line\n\tcolumn \\x1b") == "line\n\tcolumn \\x1b"
    assert visible("naïve 猫 🐈 e\u0301 می\u200cخواهم") == "naïve 猫 🐈 e\u0301 می\u200cخواهم"
    assert visible("\ud800\u2028\u00ad\ufeff") == r"\ud800\u2028\xad\ufeff"


def test_every_character_is_judged_as_its_kind_says():
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        known = harmless(letter) or letter in "\u200c\u200d"
        assert (visible(letter) == letter) == known, hex(code)


def test_a_log_record_is_visible_text():
    record = logging.LogRecord("x", logging.INFO, "f", 1, "class %s", (EVIL,), None)
    assert Formatter("%(message)s").format(record) == f"class {SHOWN}"


def test_what_is_printed_inside_the_guard_is_visible_and_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    with guard():
        print(EVIL, end="")
        sys.stderr.writelines([EVIL, "\n"])
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == (SHOWN, SHOWN + "\n")


def test_letters_that_a_screen_lacks_are_written_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with guard():
        print("猫")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u732b\n"


def test_a_table_keeps_its_own_colours_and_shows_what_is_in_its_cells(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table("name", style="red")
    table.add_row(EVIL.replace("\r", "").replace("\x08", "").replace("\x07", ""))  # rich drops these by itself
    with guard():
        Console(width=120, force_terminal=True, color_system="standard").print(table)
    text = stream.getvalue()
    assert r"\x1b[2J" in text and "\x1b[31m" in text
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\u202e" not in text


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A data set whose class names and a shard's name hold escape sequences; a shard is missing."""
    folder, source = tmp_path_factory.mktemp("bad"), open_dataset("cifar10-mini")
    for split, rows in (("train", range(20)), ("test", range(20, 30))):
        with ShardWriter(folder / split, classes=source.classes, image_size=(32, 32)) as writer:
            for i in rows:
                writer.write_encoded(source.keys[i], *source.encoded(torch.tensor([i])), "png", int(source.labels[i]))
    path = folder / "train" / "manifest.json"
    about = json.loads(path.read_text())
    about["classes"][0], about["provenance"] = EVIL, EVIL
    about["shards"] = {f"{EVIL}.tar": next(iter(about["shards"].values()))}
    path.write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["data", "verify", "{bad}"],  # faults C: a manifest with escape sequences
        ["data", "import", "{bad}/train", "--out", "{tmp}/out"],
        ["train", "defend/vespr_own", "data.train={bad}", "run.dir={tmp}/run", "engine.device=cpu"],
        ["train", EVIL],
        ["train", "defend/vespr_cifar10_mini", f"{EVIL}=1"],
        ["train", "defend/vespr_cifar10_mini", f"model.name={json.dumps(EVIL)}"],
        ["train", f"{{tmp}}/{EVIL}"],
        [EVIL],
        ["train", f"--{EVIL}"],
        ["convert", EVIL, "--out", EVIL],
        ["protect", f"{{tmp}}/{EVIL}", "--out", "{tmp}/out"],
    ],
)
def test_no_command_lets_them_through(bad, tmp_path, capsys, command):
    (tmp_path / EVIL).mkdir()
    shutil.copytree(bad, tmp_path / "bad")
    with pytest.raises(SystemExit) as end:
        main([word.format(bad=tmp_path / "bad", tmp=tmp_path) for word in command])
    text = "".join(capsys.readouterr())
    assert end.value.code and text and harmless(text), repr(text)


def test_reports_escape_what_they_are_given():
    """HTML, where a name could bring a script along: every template is filled with escaping on."""
    for path in (Path(__file__).parents[1] / "poisonshield" / "api").glob("*.py"):
        text = path.read_text()
        assert text.count("jinja2.Template(") == text.count("autoescape=True"), path
