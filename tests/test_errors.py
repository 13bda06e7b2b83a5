"""What libraries say, without what is not for the user: faults E, C++ paths and torch's advice to trust a file."""

import os

import pytest
import torch

from poisonshield.engine.checkpoint import load_plain
from poisonshield.errors import CheckpointError, reason_of


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[enforce fail at inline_container.cc:337] . PytorchStreamReader failed", ". PytorchStreamReader failed"),
        (
            "Overflow when unpacking long long\nException raised from unpack at /__w/torch/csrc/numbers.h:79 "
            "(most recent call first):\nframe #0: c10::Error",
            "Overflow when unpacking long long",
        ),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1", None),
        ("", "ValueError"),
        ("x" * 900, "x" * 200),
    ],
)
def test_a_reason_is_one_line_without_places_in_c(said, reason):
    told = reason_of(ValueError(said))
    assert told == reason if reason else "Connection closed by peer" in told
    assert "\n" not in told and ".cc:" not in told and ".h:" not in told


@pytest.mark.parametrize("content", ["garbage", "runs", "cut"])
def test_nobody_is_advised_to_load_a_stranger_s_file_without_weights_only(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(Runs() if content == "runs" else {"w": torch.ones(1000)}, path)
    if content != "runs":
        path.write_bytes(b"garbage" if content == "garbage" else path.read_bytes()[:900])
    with pytest.raises(CheckpointError) as err:
        load_plain(path)
    assert "weights_only" not in str(err.value) and "pytorch.org" not in str(err.value)
    assert "\n" not in str(err.value) and (content != "runs" or "system" in str(err.value))
