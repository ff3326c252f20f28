"Every notebook runs from top to bottom, and every experiment runs through papermill at its smallest setting."
import json, multiprocessing, os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "experiments"} & set(p.parts))
FEW = dict(images_per_class=2, centroids=2, sd_draws=1, batch=2, par_rounds=2, crf_rounds=1)
SMALL = {"components": dict(n_train=6, n_val=6, seeds=1, per_class=2, draws=50, overrides=FEW), "choices": dict(n_train=3, overrides=FEW),
         "controls": dict(n_train=3, alphas=[1., 8.], widths=[1.], temperatures=[0, .1], timesteps=[50], overrides=FEW),
         "training": dict(n_train=6, n_choose=6, n_val=6, seeds=1, iterations=3, draws=50, overrides=FEW),
         "adapter": dict(n_teach=6, n_judge=6, n_choose=6, seeds=1, iterations=3, draws=50, overrides=FEW),
         "table": dict(table="V", n_train=6, n_choose=6, n_val=6, seeds=1, iterations=3, draws=50, overrides=FEW),
         "confusion": dict(n_train=6, n_choose=6, n_val=16, iterations=3, draws=50, overrides=FEW),
         "cost": dict(n_train=6, n_choose=6, n_val=6, iterations=3, points=3, draws=50, overrides=FEW),
         "rivals": dict(n_train=3, n_choose=3, n_val=3, names=["NACLIP", "DiffSegmenter"], most=1, draws=50, overrides=FEW),
         "online": dict(n_train=6, n_choose=3, n_val=6, seeds=1, iterations=3, points=2, confidences=[.7], budgets=[2], momenta=[.5], shares=[0., .8], draws=50, overrides=FEW),
         "figures": dict(n_val=6, shown=2, rounds=2, alphas=[.5, 1.], n_train=40, iterations=3, overrides=FEW | dict(images_per_class=1, centroids=1))}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def run_page(path, log):
    "What a process of its own does: a page that defines its functions again must not change those that other tests call."
    for stream in (sys.stdout, sys.stderr): os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    multiprocessing.set_start_method("fork", force=True)   # as in a kernel: processes that a page starts know its functions
    from nbdev.test import test_nb
    good, _ = test_nb(path, skip_flags=["cuda", "slow"])
    sys.stdout.flush()
    os._exit(not good)


@pytest.fixture(scope="session")
def server():
    "Processes that have imported the large libraries already, and done nothing with them."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "open_clip", "diffusers", "transformers", "sklearn.cluster", "matplotlib.pyplot", "execnb.shell", "nbdev.test", "diclip.study"])
    return context


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_runs(path, server, tmp_path):
    log = tmp_path / "output.txt"
    process = server.Process(target=run_page, args=(path, log))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{path.name} failed:\n{log.read_text()[-5000:] if log.exists() else process.exitcode}"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/experiments").glob("*.ipynb")), ids=lambda p: p.stem)
def test_experiment_runs_small(path, tmp_path):
    from diclip.app.repro import run_notebook
    record = run_notebook(path.stem, tmp_path, **SMALL[path.stem])
    assert record["experiment"] == path.stem and record["protocol"] and record["environment"]["versions"]["torch"]
    for name, row in record["results"].items():
        assert 0 <= row["low"] <= row["high"] <= 100 and len(row["seeds"]) >= 1, name
    assert (tmp_path / f"{path.stem}.html").stat().st_size > 10_000


@pytest.mark.parametrize("name, images", [("components", "generated"), ("components_rendered", "rendered")])
def test_a_committed_record_fits_its_experiment(name, images):
    record = json.loads((ROOT / f"nbs/results/{name}.json").read_text())
    assert record["parameters"]["n_val"] == 400 and record["parameters"]["seeds"] >= 3 and record["parameters"]["cache_images"] == images
    assert set(record["results"]) >= {"center prior", "baseline CLIP", "+ VCE without ACR", "+ VCE", "+ positive cache", "+ negative cache",
                                      "untrained UNet", "color similarity", "neighbors", "hand-made", "hand-made + ACR", "rolled labels", "no class keys", "oracle attention"}
    assert record["models"] == shipped(), "measured with other weights: run it again"


def test_the_committed_training_record_fits_its_experiment():
    record = json.loads((ROOT / "nbs/results/training.json").read_text())
    assert record["parameters"]["n_val"] == 400 and record["parameters"]["seeds"] >= 3
    assert set(record["results"]) >= {"baseline", "+ VCE", "+ positive cache", "+ negative cache", "+ adapter", "random adapter", "rolled cache + adapter", "masks (supervised)"}
    assert record["models"] == shipped(), "measured with other weights: run it again"


def test_the_committed_test_record_has_the_settings_of_val():
    val, test = (json.loads((ROOT / f"nbs/results/{n}.json").read_text()) for n in ("training", "training_test"))
    differs = {k for k in val["parameters"] if val["parameters"][k] != test["parameters"][k]}
    assert differs == {"split"} and test["models"] == val["models"] == shipped()


def test_the_committed_training_record_fits_the_profile():
    from diclip.config import profile
    assert json.loads((ROOT / "nbs/results/training.json").read_text())["parameters"]["iterations"] == profile("mini").iterations


def test_the_committed_adapter_record_chose_the_profile():
    from diclip.config import profile
    record = json.loads((ROOT / "nbs/results/adapter.json").read_text())
    p, best = profile("mini"), {n: max(v) for n, v in record["sweep"]["miou"].items()}
    assert record["models"] == shipped(), "measured with other weights: run it again"
    assert max(best, key=best.get) == f"dynamic (13), {p.dynamic_votes}"
    row = record["sweep"]["miou"][f"dynamic (13), {p.dynamic_votes}"]
    assert row[record["sweep"]["betas"].index(p.dynamic_beta)] >= max(row) - .5


def shipped():
    "Fingerprints of the models that ship."
    from diclip.clip import load_clip
    from diclip.config import profile
    from diclip.sd import load_sd
    return dict(clip=load_clip(profile("mini")).fingerprint, sd=load_sd(profile("mini")).fingerprint)


def test_the_hand_made_row_is_the_best_of_its_family_on_train():
    controls, components = (json.loads((ROOT / f"nbs/results/{n}.json").read_text()) for n in ("controls", "components"))
    best = {k: v for k, v in controls["best"]["best hand-made"].items() if k != "miou"}
    assert controls["models"] == components["models"] == shipped() and controls["tried"]["by hand"] >= 200
    assert components["parameters"]["hand"] == best
    rows = {n: max(r["seeds"]) for n, r in controls["results"].items() if n.startswith("by hand")}
    assert max(rows.values()) == controls["best"]["best hand-made"]["miou"]


ADAPTER = {"dynamic_votes", "dynamic_beta", "dynamic_gamma", "prompts", "prompt_noise"}
UNREAD = dict.fromkeys(("choices", "controls", "components"), ADAPTER)     # nothing is trained there
DECIDES = dict(choices={"readout", "layers", "alpha", "timestep", "sd_layers", "propagation", "rounds", "groups"},
               adapter={"beta", "dynamic_votes", "dynamic_beta", "gamma", "dynamic_gamma", "foreground_weight"})


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/results").glob("*.json")), ids=lambda p: p.stem)
def test_a_committed_record_holds_the_profile_that_ships(path):
    """A field that a record lacks counts as its default; an experiment that chooses a setting was run before it was chosen,
    and one that trains nothing does not read the adapter's."""
    from dataclasses import asdict, fields
    from diclip.config import Profile, get_profile
    record = json.loads(path.read_text())
    if "settings" not in record: return
    default = {f.name: f.default for f in fields(Profile)}
    now = json.loads(json.dumps(asdict(get_profile(record["parameters"]["profile"]))))
    changed = {k for k, v in now.items() if record["settings"].get(k, default[k]) != v}
    stated = {k for k in changed if record["parameters"].get(k) == record["settings"].get(k)}    # a parameter of the run, such as fewer iterations
    free = stated | DECIDES.get(record["experiment"], set()) | UNREAD.get(record["experiment"], set()) | {"sd_versions"}   # names of other models, read by Table XIII alone
    assert changed <= free, f"measured with another {', '.join(sorted(changed))}: run it again"
    assert not set(record["settings"]) - set(now), "the record has settings that the profile no longer has"
