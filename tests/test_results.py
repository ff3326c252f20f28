"Verdicts on the paper's steps, from records alone."
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diclip.app.paper import paper_numbers
from diclip.app.results import judged, published, rank_correlations, seed_interval, table_records, table_steps
from diclip.app.tables import TABLES
from diclip.config import get_profile

number = st.floats(-50, 50)


@given(number, number, number, number)
def test_a_verdict_turns_with_the_sign(value, a, b, expected):
    low, high = sorted((a, b))
    turned = judged([-value, -high, -low], -expected)
    assert judged([value, low, high], expected) == turned
    if expected > 0: assert turned == ("holds" if low > 0 else "reversed" if high < 0 else "not shown")
    if expected == 0: assert turned == "no order"


def record(table, values, base, difference=1.):
    row = lambda v, d: dict(value=v, miou=v, low=v - 1, high=v + 1, seeds=[v], difference=[d, d - difference / 2, d + difference / 2])
    return dict(parameters=dict(table=table), base=base, results={key: row(v, v - values[base + " | " + key.split(" | ")[1]]) for key, v in values.items()})


def test_steps_of_a_sweep_and_of_a_table_that_is_printed_as_a_line():
    r = record("VIa", {f"{n} groups | CAM mIoU": v for n, v in ((3, 50.), (6, 60.), (9, 58.), (12, 58.1))}, "9 groups")
    s = table_steps(r).set_index("step")
    assert s["verdict"].to_dict() == {"9 groups -> 3 groups": "holds", "9 groups -> 6 groups": "reversed", "9 groups -> 12 groups": "not shown"}
    assert not s["claim"].any(), "one training each"
    for row in r["results"].values(): row["seeds"] *= 2
    assert table_steps(r)["claim"].all() and table_steps(r)["verdict"].tolist() == s["verdict"].tolist(), "two seeds that agree change nothing"
    for k, row in r["results"].items(): row["seeds"] = [row["value"] - 9, row["value"] + 9] if k.startswith("3 groups") else row["seeds"]
    assert table_steps(r).set_index("step")["verdict"]["9 groups -> 3 groups"] == "not shown", "seeds that do not agree take a verdict away"
    assert s.loc["9 groups -> 3 groups", "paper"] == -2.5 and s.loc["9 groups -> 3 groups", "ours"] == -8
    names = ["without ACR", "1 iteration", *(f"{n} iterations" for n in (2, 3, 4, 5))]
    r = record("VII", {f"{n} | Segmentation mIoU": 60. + k for k, n in enumerate(names)}, "without ACR")
    assert table_steps(r)["paper"].tolist() == [.7, 1.1, 2., 1.9, 1.4] and set(table_steps(r)["verdict"]) == {"holds"}
    r = record("VII", {f"{n} | CAM mIoU": 60. + k for k, n in enumerate(names)}, "without ACR")
    assert not len(table_steps(r)) and rank_correlations(r) == {}, "the paper's one line is about segmentations"


def test_an_interval_over_seeds_is_that_of_students_t():
    from scipy.stats import ttest_1samp
    a, b = [61.2, 60.8, 61.9], [61.9, 61.2, 63.]
    wanted = ttest_1samp([y - x for x, y in zip(a, b)], 0).confidence_interval(.95)
    assert seed_interval(a, b) == [pytest.approx(wanted.low, abs=.005), pytest.approx(wanted.high, abs=.005)]
    for few in (([1.], [2.]), ([1.], [2., 3.])): assert all(v != v for v in seed_interval(*few))


def test_a_table_of_one_line_is_judged_by_the_profiles_data():
    column = next(iter(TABLES["XV"].columns))
    assert TABLES["XV"].published("50 % of classes", column) == ("VOC", "50 % of classes") and TABLES["XV"].published("50 % of classes", column, "coco") == ("COCO", "50 % of classes")
    assert any(row == "COCO" for row, _ in published("XV"))


def test_rank_correlation_by_hand():
    numbers = {n: v for (_, n), v in published("VII").items()}
    assert rank_correlations(record("VII", {f"{n} | Segmentation mIoU": v for n, v in numbers.items()}, "without ACR")) == {"Segmentation mIoU": 1.}
    assert rank_correlations(record("VII", {f"{n} | Segmentation mIoU": -v for n, v in numbers.items()}, "without ACR")) == {"Segmentation mIoU": -1.}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_and_column_of_ours_is_the_papers(name):
    "Names of tables and of the paper's numbers are the same; what is ours alone is named here."
    ours = {"sampler": "all", "IV": ["CAM mIoU"], "V": ["CAM mIoU"], "IX": ["fully supervised"], "III": ["labels by PAR", "labels by affinity and PAR"], "VII": ["CAM mIoU"], "XV": ["CAM mIoU"]}
    if ours.get(name) == "all": return
    table, numbers = TABLES[name], published(name)
    rows = table.rows(get_profile("voc")) if callable(table.rows) else table.rows
    missing = {(r, c) for r in rows for c in table.columns if c not in ours.get(name, []) and table.published(r, c) not in numbers}
    assert missing <= {("raw CLIP", "VOC train CAM mIoU")}
    assert set(paper_numbers(name)["origin"]) == {"paper"}


def test_committed_table_records_have_verdicts():
    for name, r in table_records().items():
        assert r["experiment"] == "table" and r["base"] in {key.split(" | ")[0] for key in r["results"]}
        steps = table_steps(r)
        assert not len(steps) or set(steps["verdict"]) <= {"holds", "reversed", "not shown", "no order"}
        now = json.loads(json.dumps(asdict(get_profile("mini"))))
        assert {k for k, v in now.items() if r["settings"].get(k) != v} <= {"iterations"} and r["environment"]["dirty"] is False
        wanted = [line for line in (Path(__file__).parents[1] / "nbs/experiments/mini.yaml").read_text().splitlines() if f"record: tables/{name}," in line]
        assert len(wanted) == 1 and f"table: {name}" in wanted[0]
