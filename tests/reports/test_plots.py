"""Figures of one run are drawn from the Numbers, whatever was measured."""

import json

import pytest
from matplotlib import pyplot

from poisonshield.engine.runfolder import RunFolder
from poisonshield.reports import plots

ALIGNMENT = {"positive_cosine": 0.9, "negative_cosine": 0.1, "variance": 0.01}
SPECTRUM = {"effective_rank": 2.0, "projection_rank": None, "log10_shares": [-0.1, -1.0]}
PAIRS = {"psn_cln_sim": 0.8, "ce_clean": 1.0, "ce_poisoned": None}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(measured)`: {title: labels below} of the panels of probes.png."""
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)

    def draw(**measured):
        names = ("spectrum", "alignment", "pairs")
        (tmp_path / "evaluation.json").write_text(
            json.dumps(dict.fromkeys(names) | measured | {"settings": {"knn": {}}})
        )
        assert plots.plot_probes(RunFolder(tmp_path)).read_bytes().startswith(b"\x89PNG")
        return {axis.get_title(): [label.get_text() for label in axis.get_xticklabels()] for axis in kept[-1].axes}

    return draw


def test_panels_hold_the_known_numbers_of_all_evaluations(drawn):
    panels = drawn(spectrum=SPECTRUM, alignment=ALIGNMENT, pairs=PAIRS)
    assert list(panels)[0] == "features: effective rank 2.0"
    assert panels["cosine"] == ["two views", "other samples", "clean, poisoned"]
    assert panels["cross-entropy"] == ["clean"] and len(panels) == 3


def test_what_was_left_out_has_no_panel(drawn):
    assert list(drawn(alignment=ALIGNMENT)) == ["cosine"]
    assert list(drawn(spectrum=SPECTRUM)) == ["features: effective rank 2.0"]
    assert list(drawn()) == [""]
