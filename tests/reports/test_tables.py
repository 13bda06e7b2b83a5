"""Numbers as text: means with their range, tables, and what one run gave."""

import pytest

from poisonshield.evals import EVALUATIONS
from poisonshield.evals.base import Number
from poisonshield.reports.tables import list_numbers, markdown, spread, spreads

SCORE = Number("score", "score", "%", "higher", digits=1)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"),
        ([None, None], "-"),
        ([50.04], "50.0"),
        ([None, 1.0, 2.0], "1.5 (1.0 to 2.0)"),
        ([0.0, 0.0], "0.0 (0.0 to 0.0)"),
    ],
)
def test_spread_is_the_mean_and_the_range_of_what_is_known(values, text):
    assert spread(values, SCORE) == text


def test_digits_are_those_of_the_number():
    share = Number("share", "share", digits=3)
    rows = [{"score": 10.0, "share": 0.25}, {"score": 20.0}]
    assert spreads(rows, [SCORE, share]) == ["15.0 (10.0 to 20.0)", "0.250"]
    assert (share.title, SCORE.title, SCORE.write(None), SCORE.write(2.345, more=1)) == (
        "share",
        "score, %",
        "-",
        "2.35",
    )


def test_markdown_has_a_head_and_a_rule():
    assert markdown(["a", "b"], ["1", "2"], ["3", "4"]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_a_list_of_numbers_leaves_out_what_was_not_measured_and_marks_what_does_not_apply():
    measured = {
        "classifier": {"test_top1": None, "train_top1": 61.234},
        "knn": None,
        "linear": {"linear_top1": 50.0, "sweep": {0.1: 40.0, 10.0: None}},
        "spectrum": {"effective_rank": 3.21, "projection_rank": 2.0, "log10_shares": [-0.1, -2.0]},
        "pairs": {"pairs": 30, "psn_cln_sim": 0.98765},
    }
    lines = list_numbers(measured, EVALUATIONS).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["test_top1", "-"],
        ["train_top1", "61.23"],
        ["linear_top1", "50.00"],
        ["psn_cln_sim", "0.988"],
        ["pairs", "30"],
        ["effective_rank", "3.21"],
        ["projection_rank", "2.00"],
        ["linear.sweep.0.1", "40"],
    ]
    assert len({line.index("%") for line in lines if "%" in line}) == 1
