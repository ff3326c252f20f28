"Table X: each phase in a process of its own, nothing that is there already counted as work, and nothing of one phase counted as the other's."
from pathlib import Path

import pytest
import torch

from diclip import cache
from diclip.app import cost
from diclip.app.experiment import peak_memory
from diclip.app.paper import paper_value
from diclip.cache import Cache
from diclip.config import get_profile
from diclip.imagepool import POOLED
from diclip.study import Study

torch.set_num_threads(1)
QUICK = dict(sd_draws=1, images_per_class=1, centroids=1, iterations=2, batch=2, head_width=16, prompts=2, par_rounds=1, steps=1)
PLAN = dict(n_train=3, n_choose=3, n_val=3)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "Both phases once, in this process: the folders and what they gave."
    home, p = tmp_path_factory.mktemp("cost"), get_profile("mini", **QUICK)
    first = cost.offline(p, PLAN, home / "fresh", home / "store")
    return home, p, first, cost.online(p, PLAN | dict(pool=first["pool"]), home / "fresh")


def test_the_offline_phase_draws_what_is_not_there_and_builds_the_cache(measured):
    home, p, first, _ = measured
    assert first["drawn"] == len(list(Path(first["pool"]).glob("*/*.png"))) == 8 and (home / "store").resolve() in Path(first["pool"]).parents
    assert first["drawing"] > 0 and first["building"] > 0 and first["loaded"] <= first["memory"] <= peak_memory()
    (file,) = (home / "fresh/cache").glob("*.safetensors")
    torch.testing.assert_close(Cache.load(file).keys, Study(p, home / "other", None, **PLAN | dict(pool=first["pool"])).cache().keys)
    assert not (home / "store/cache").exists(), "what is measured leaves nothing in the store but images"


def test_images_that_are_there_are_not_drawn_again_unless_asked(measured, tmp_path, monkeypatch):
    home, p, first, _ = measured
    files = lambda: {f: f.stat().st_mtime_ns for f in Path(first["pool"]).glob("*/*.png")}
    before, pooled, real = files(), [], cache.pool_images
    monkeypatch.setattr(cache, "pool_images", lambda *how: pooled.append(1) or real(*how))
    again = cost.offline(p, PLAN, tmp_path / "fresh", home / "store")
    assert (again["drawn"], again["pool"]) == (0, first["pool"])
    anew = cost.offline(p, PLAN, tmp_path / "anew", home / "store", redraw=True)
    assert anew["drawn"] == 8 and (tmp_path / "anew").resolve() in Path(anew["pool"]).parents and files() == before
    ships = cost.offline(get_profile("mini", **QUICK | dict(steps=25)), PLAN, tmp_path / "ships", tmp_path / "store")
    assert ships["drawn"] == 0 and not list(tmp_path.glob("store/**/*.png"))
    assert not (Path(ships["pool"]) / POOLED).exists() and len(pooled) == 3 * 8, "vectors that ship are not what is timed"
    given = cost.offline(p, PLAN | dict(pool=first["pool"]), tmp_path / "given", tmp_path / "store", redraw=True)
    assert given["drawn"] == 0 and given["pool"] == first["pool"]


def test_the_online_phase_reads_the_cache_and_trains(measured, monkeypatch):
    home, p, first, trained = measured
    assert trained["frozen"] > 0 and trained["training"] > 0 and trained["loaded"] <= trained["memory"]
    s = Study(p, home / "fresh", None, **PLAN | dict(pool=first["pool"]))
    assert s.row("dynamic", "head", draws=20)["miou"] >= 0 and s.row("static", draws=20)["miou"] >= 0
    assert not {"cache", "student"} & {k for k, n in s.store.made.items() if n}, "the scores are those of what was timed"
    for change in (dict(seed=3), dict(pool="")):
        with pytest.raises(ValueError, match="no cache of these settings in fresh: run the offline phase first"): cost.online(p, PLAN | dict(pool=first["pool"]) | change, home / "fresh")


def test_a_process_of_its_own(measured):
    held = torch.ones(10 ** 8)
    assert cost.alone(peak_memory) < peak_memory() - .2 and held.sum() > 0
    with pytest.raises(ValueError, match="run the offline phase first"): cost.alone(cost.online, measured[1], PLAN, measured[0] / "nothing")


def test_the_table_has_the_papers_layout():
    lines = cost.cost_table({"here": (1.25, 2., None, float("nan"))}).splitlines()
    assert lines[0].split() == ["minutes", "GB", "CAM", "Seg."] and len({len(l) for l in lines}) == 1
    assert lines[-1].split() == ["here", "1.2", "2.0", "-", "-"]
    (online,) = (l for l in lines if l.startswith("DiCLIP (online phase)"))
    assert list(map(float, online.split()[-4:])) == [paper_value("X", "DiCLIP (online phase)", c) for c in cost.COLUMNS]
