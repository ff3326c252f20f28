"Records: the schema, old and new ones, the table of all of them."
import json, math, re
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path

import pytest

import diclip.app.records as R
from diclip.config import Profile, get_profile

ROOT = Path(__file__).resolve().parent.parent
RECORDS = R.record_files(ROOT / "nbs/results")


def new_record(**more):
    env = dict(commit="abc", dirty=False, date="2026-12-01", device="cpu", hardware="x86_64, 1 threads", memory=.5, python="3.11", versions=dict(torch="2"))
    return dict(experiment="toy", parameters=dict(profile="mini", seed=0), settings=json.loads(json.dumps(asdict(get_profile("mini")))), protocol="mini val, labels given, images 3",
                results={"a": dict(miou=2., low=1., high=3., seeds=[1.5, 2.5])}, minutes=.1, models=dict(clip="c", sd="s"), environment=env) | more


def test_the_committed_records_are_records_and_small():
    assert {p.stem for p in RECORDS} >= {"adapter", "choices", "components", "components_rendered", "controls", "training", "training_test"}
    for path in RECORDS:
        record = R.read_record(path)
        assert path.stat().st_size < 50_000, path.name
        if {"dirty", "memory"} <= set(record["environment"]): R.check_record(record, complete=set(f.name for f in fields(Profile)) <= set(record["settings"]))


def test_the_schema_is_a_schema():
    "By another library, which also agrees about every damage of the next test that JSON Schema can name."
    from jsonschema import Draft7Validator
    for complete in (True, False): Draft7Validator.check_schema(R.schema(complete))
    reads = Draft7Validator(json.loads(json.dumps(R.schema())))
    assert reads.is_valid(new_record())
    for damage, message in DAMAGE:
        record = new_record()
        damage(record)
        assert reads.is_valid(record) == (message in ("no number", "wrong way round")), message


DAMAGE = [(lambda r: r.pop("protocol"), "it lacks protocol"), (lambda r: r["settings"].pop("alpha"), "settings lacks alpha"), (lambda r: r["environment"].pop("memory"), "environment lacks memory"),
          (lambda r: r["environment"].pop("dirty"), "environment lacks dirty"), (lambda r: r["environment"].update(dirty="no"), "environment.dirty: 'no' must be"), (lambda r: r["parameters"].pop("seed"), "parameters lacks seed or seeds"),
          (lambda r: r.update(minutes=-1), "minutes: -1 must be bigger"), (lambda r: r.update(minutes="5"), "minutes: '5' must be number"), (lambda r: r["results"].clear(), "results has no rows"),
          (lambda r: r["results"]["a"].update(miou=100.1), "results.a.miou"), (lambda r: r["results"]["a"].update(miou=math.nan), "no number"), (lambda r: r["results"]["a"].update(low=4.), "wrong way round"),
          (lambda r: r["results"]["a"].update(seeds=[]), "results.a.seeds"), (lambda r: r.update(cams={"b": {"miou": 1}}), "cams.b lacks low, high, seeds"), (lambda r: r.update(experiment=""), "experiment"),
          (lambda r: r["environment"].update(date="yesterday"), "environment.date")]


@pytest.mark.parametrize("damage, message", DAMAGE, ids=[m for _, m in DAMAGE])
def test_damage_is_named(damage, message):
    record = new_record()
    R.check_record(record, complete=True)
    damage(record)
    with pytest.raises(ValueError, match=re.escape(message)) as e: R.check_record(record, complete=True)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_an_old_record_may_be_read_and_not_written(tmp_path):
    from diclip.app.experiment import save_record
    old = new_record()
    for k in ("dirty", "memory"): del old["environment"][k]
    del old["settings"]["alpha"]
    R.check_record(old)
    with pytest.raises(ValueError, match="lacks"): save_record(tmp_path / "a.json", **old)
    assert not list(tmp_path.iterdir())
    assert R.read_record(save_record(tmp_path / "a.json", **new_record(settings=asdict(get_profile("mini"))))) == new_record()      # tuples are lists in JSON


def test_files(tmp_path):
    (tmp_path / "half.json").write_text(json.dumps(new_record())[:200])
    for f in (R.read_record, R.records):
        with pytest.raises(ValueError, match="half.json is not JSON, or cut short"): f(tmp_path / "half.json" if f is R.read_record else tmp_path)
    (tmp_path / "half.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="half.json is not JSON"): R.read_record(tmp_path / "half.json")
    with pytest.raises(FileNotFoundError): R.read_record(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no folder"): R.records(tmp_path / "none")


def test_the_table(tmp_path):
    pytest.importorskip("pandas")
    t = R.records()
    rows = sum(len(json.loads(p.read_text()).get(k, ())) for p in RECORDS for k in R.TABLES)
    assert len(t) == rows and not t.miou.isna().any() and set(t.profile) == {"mini"} and set(t.split) >= {"train", "val", "test"}
    assert set(t[t.record == "components"].n) == {400} and set(t[t.record == "training"].table) == {"results", "cams", "inference"}
    for name, folder in (("one", ""), ("two", "deep/"), ("three", ".hidden/")):
        path = tmp_path / f"{folder}{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(new_record(parameters=dict(profile="mini", seed=7, width=.5))))
    (tmp_path / "card.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    t = R.records(tmp_path, "width", "alpha", "nothing")
    assert list(t.record) == ["deep/two", "one"] and set(t.width) == {.5} and set(t.alpha) == {16} and t.nothing.isna().all()
    row = t.iloc[0]
    assert (row.experiment, row.row, row.miou, row.low, row.high, row.seeds, row["mean"], row.n, row.minutes, row.memory, row.commit, row.dirty) == ("toy", "a", 2, 1, 3, 2, 2, 3, .1, .5, "abc", False)


def test_the_environment(monkeypatch, tmp_path):
    import subprocess
    import diclip.app.experiment as E
    env = E.environment()
    R.check_record(new_record(environment=env), complete=True)
    import torch
    before = E.peak_memory()
    block = torch.ones(100_000_000)
    assert E.peak_memory() >= before and E.peak_memory() >= .4 and block.sum() > 0
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *a], cwd=tmp_path, check=True, capture_output=True)
    package = tmp_path / "diclip"
    for f in (package / "__init__.py", tmp_path / "nbs/results/a.json"):
        f.parent.mkdir(parents=True)
        f.write_text("")
    monkeypatch.setattr(E.diclip, "__file__", str(package / "__init__.py"))
    assert E._code() == dict(commit="", dirty=None)                          # no repository
    git("init", "-q")
    assert E._code() == dict(commit="", dirty=None)                          # in the working tree of something that does not hold it
    git("add", "."); git("commit", "-qm", "all")
    clean = E._code()
    assert len(clean["commit"]) >= 7 and clean["dirty"] is False
    (tmp_path / "nbs/results/a.json").write_text("{}")
    (tmp_path / "new.txt").write_text("untracked")
    assert E._code() == clean                                                # a record is not code, and what is not tracked is not looked at
    (package / "__init__.py").write_text("#")
    assert E._code() == clean | dict(dirty=True)
