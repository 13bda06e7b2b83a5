"""faults D: a class list with a byte order mark, or with spaces and # in names, is read as it is meant."""

import os

import pytest
from made import plant

from poisonshield.data.class_list import read_class_list
from poisonshield.data.importer import import_data
from poisonshield.errors import DataError


@pytest.fixture
def read(tmp_path):
    def call(content):
        path = tmp_path / "list.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_class_list(path)

    return call


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("cat\ndog\n", {"cat": "cat", "dog": "dog"}),
        (b"\xef\xbb\xbfcat\r\ndog\r\n", {"cat": "cat", "dog": "dog"}),
        ("n1 tench, Tinca tinca\n", {"n1": "tench, Tinca tinca"}),
        (
            '"great dane"\n"great dane 2" Great Dane  # big\n',
            {"great dane": "great dane", "great dane 2": "Great Dane"},
        ),
        ("great dane\tGreat Dane\nC #\tC #\n", {"great dane": "Great Dane", "C #": "C #"}),
        ("great dane\t\n", {"great dane": "great dane"}),
        ('"# 1"\n"say \\"hi\\""\n', {"# 1": "# 1", 'say "hi"': 'say "hi"'}),
        ("C#\nF# F sharp # a comment\n# all comment\n  # and this\n", {"C#": "C#", "F#": "F sharp"}),
        ("# tab\tcomment\ncat", {"cat": "cat"}),
        ("n1 crane\nn2 crane\n", {"n1": "crane (n1)", "n2": "crane (n2)"}),
    ],
)
def test_each_form_of_a_line_is_read(read, text, classes):
    found = read(text)
    assert found == classes and list(found) == list(classes)


def test_quote_that_does_not_end_is_refused_with_its_line(read):
    with pytest.raises(DataError, match='list.txt:2: the quote of "great dane does not end'):
        read('cat\n"great dane\n')


def test_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list")
    with pytest.raises(DataError, match="class list .* cannot be read"):
        read_class_list(tmp_path / "list")


def test_folders_with_spaces_are_classes_and_forgotten_quotes_are_hinted_at(tmp_path):
    plant(tmp_path / "src", {"great dane/0.png": 0, "#1 dog/1.png": 1})
    (tmp_path / "list").write_text('"#1 dog"\ngreat dane\tGreat Dane\n')
    assert import_data(tmp_path / "src", tmp_path / "out", class_list=tmp_path / "list")[""].classes == (
        "#1 dog",
        "Great Dane",
    )
    (tmp_path / "list").write_text("great dane\n")
    with pytest.raises(DataError, match='Is it "great dane"[?] Write a name with spaces in quotes'):
        import_data(tmp_path / "src", tmp_path / "two", class_list=tmp_path / "list")
