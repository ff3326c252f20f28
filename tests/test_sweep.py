"""Sweeps: what is planned, what is skipped, what survives a failure or kill -9. The experiment is a notebook without models,
so that a run is little more than the start of a kernel."""
import json, os, signal, subprocess, sys, threading, time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

import diclip.app.jobs as jobs_of
import diclip.app.sweep as S
from diclip.app.records import record_files
from diclip.app.repro import check_parameters, notebook_parameters
from diclip.engine.shard import share

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """
profile = "mini"  # a profile
n_val = 3  # images
width = 0.5  # of something
wait = False  # until the file "hold" is gone
seed = 0  # of nothing
overrides = {}  # settings
record = ""  # path
"""
MEASURE = """
import os, time
from dataclasses import asdict, replace
from pathlib import Path
from diclip.config import get_profile
from diclip.engine.files import write_json
p = replace(get_profile(profile, **overrides), layers=n_val)
with open("runs.txt", "a") as f: f.write(f"{width} {seed} {os.getpid()}\\n")
while wait and Path("hold").exists(): time.sleep(.1)
if width == 9: raise RuntimeError("too wide")
if width == 8: os._exit(3)
environment = dict(commit="", dirty=None, date="2026-12-01", device="cpu", hardware="none", memory=0, python="3", versions=dict(torch="2"))
row = dict(miou=round(width + seed + p.alpha, 2), low=0, high=100, seeds=[1.])
write_json(record, dict(experiment="toy", settings=asdict(p), parameters=dict(profile=profile, seed=seed, width=width), protocol="mini val, labels given, images 3",
                        results=dict(a=row), minutes=.1, models=dict(clip="", sd=""), environment=environment))
write_json(Path(record).with_stem("toy_test"), dict(second=True))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "A folder of experiments: `toy`, `many` (which repeats itself) and `bare` (which has no settings)."
    folder = tmp_path_factory.mktemp("experiments")
    cells = dict(toy=PARAMETERS, many=PARAMETERS.replace("seed = 0 ", "seeds = 3 "), bare=PARAMETERS.replace("overrides = {}", "x = 1").replace("seed = 0 ", "y = 0 "))
    for name, parameters in cells.items():
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(t.strip()) for t in (parameters, MEASURE)])
        page.cells[0].metadata.tags = ["parameters"]
        page.metadata.kernelspec = dict(name="python3", language="python", display_name="python3")
        nbformat.write(page, folder / f"{name}.ipynb")
    return folder


@pytest.fixture(autouse=True)
def toy_folder(toys, monkeypatch):
    monkeypatch.setenv("DICLIP_EXPERIMENTS", str(toys))


def plan(**how): return S.plan("toy", **how)
def sweep(jobs, out, parallel=1): return [j.parameters for j in S.Sweep(jobs, out, parallel, tell=lambda line: None).run()]
def ran(out): return Counter(l.rsplit(" ", 1)[0] for l in (out / "runs.txt").read_text().splitlines())
def results(jobs, out): return [json.loads(j.file(out, ".json").read_text())["results"] for j in jobs]


def until(what, seconds=60):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "waited in vain"
        time.sleep(.1)


# ---- planning

def test_every_combination_once():
    jobs = plan(vary=dict(width=[.3, .7], beta=[0, 1]), seeds=2)
    assert len({j.key for j in jobs}) == len(jobs) == 8
    assert Counter(j.parameters.get("seed", 0) for j in jobs) == {0: 4, 1: 4}
    assert {json.dumps(j.parameters.get("overrides")) for j in jobs} == {'{"beta": 0.0}', '{"beta": 1.0}'}
    assert [j.parameters.get("seed") for j in plan(seeds=[3, 5])] == [3, 5] and len(plan(vary=dict(width=[.3, .3]))) == 1
    assert S.plan_given("many", dict(seeds=2)) == S.plan("many", seeds=2) and len(S.plan_given("toy", dict(seeds=2, width=1))) == 2
    assert S.plan("many", seeds=2)[0].parameters == dict(seeds=2) and S.plan("many", seeds=[0, 1, 2])[0].parameters == {}


def test_a_key_is_the_run_and_not_its_wording():
    key = lambda **p: plan(**p)[0].key
    assert key() == key(alpha=16) == key(n_val=3, width=.5) == key(overrides=dict(alpha=16.)) == key(profile="mini")
    assert key(width=1) == key(width=1.) and key(scales=(1, 2)) == key(scales=[1., 2.])
    assert len({key(), key(alpha=1), key(width=1), key(profile="voc"), key(sd_layers=(0,)), key(sd_layers=None, alpha=2)}) == 6
    job = plan(alpha=1, width=.25)[0]
    assert job.label == "alpha=1.0,width=0.25" and job.file("x", ".json") == Path(f"x/toy/alpha=1.0,width=0.25-{job.key}.json")
    assert plan()[0].label == "default" and len(plan(prompt="a " * 200 + "{category}")[0].label) <= 80


def test_a_key_is_stable():
    "Records of a sweep are found again by it, also by a later version."
    assert S.Job("components", dict(n_val=40, overrides=dict(beta=.5))).key == "fe394532b1"


@pytest.mark.parametrize("how, message", [(dict(experiment="tyo"), "unknown experiment 'tyo': choose one of bare, many, toy"), (dict(experiment="../toy"), "unknown experiment"), (dict(widht=1), "unknown name 'widht': neither a parameter of toy nor a setting of its profile; did you mean width"),
    (dict(alpha=-1), "setting alpha=-1: it should be"), (dict(vary=dict(norm=["minmax", "mean"])), "setting norm='mean'"), (dict(width="x"), "width='x': width is a number, such as 0.5"), (dict(width=-1), "give a number above 0"), (dict(n_val=0), "n_val=0: give a number above 0"),
    (dict(n_val=1.5), "n_val is a whole number"), (dict(width=float("nan")), "width=nan"), (dict(wait=1), "wait is True or False"), (dict(seed=-1), "seed=-1: give a number from 0 up"), (dict(profile="maxi"), "unknown profile 'maxi'"), (dict(name="x"), "unknown name 'name'"),
    (dict(vary=dict(width=[])), "give a list of values"), (dict(vary=dict(width=".5")), "give a list of values"), (dict(vary=dict(width=[1]), width=1), "both set and varied"), (dict(vary=dict(seed=[1]), seed=1), "both set and varied"), (dict(seeds=0), "seed is varied over []"),
    (dict(experiment="many", seeds=[1, 2]), "repeats itself, from seed 0 on"), (dict(experiment="many", seeds=0), "seeds=0: give a number above 0"), (dict(experiment="bare", seeds=2), "neither seed nor seeds"), (dict(experiment="bare", alpha=1), "takes no settings of the profile: leave out alpha"),
    (dict(overrides=3), "overrides is a dictionary"), (dict(overrides=dict(alhpa=3)), "unknown name 'alhpa'"), (dict(seeds=2, record="a"), "made by one run, not by 2")])
def test_refusals(how, message):
    with pytest.raises(ValueError) as e: S.plan(**dict(experiment="toy") | how)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_the_experiments_of_the_project(monkeypatch):
    monkeypatch.delenv("DICLIP_EXPERIMENTS")
    for path in (ROOT / "nbs/experiments").glob("*.ipynb"):
        known = notebook_parameters(path.stem)
        assert {"profile", "data", "device", "overrides"} <= set(known) and ("seed" in known) != ("seeds" in known) and "record" not in known
        assert check_parameters(path.stem, {k: v for k, (v, _) in known.items()}) == {}
        assert check_parameters(path.stem, dict(alpha=1)) == dict(overrides=dict(alpha=1.))
    for given, message in ((dict(profile="voc"), "pass --data ROOT"), (dict(profile="voc", data="nowhere"), "nowhere"), (dict(split="vall"), "unknown split"), (dict(n_val=401), "val has 400 scenes"), (dict(precision="fp16"), "choose bf16"),
                           (dict(device="gpu"), "choose cpu, cuda or mps"), (dict(cache_images="drawn"), "generated or rendered"), (dict(hand_width=0), "above 0")):
        with pytest.raises(ValueError, match=message): check_parameters("components", given)
    with pytest.raises(ValueError, match="no table 'VIx': choose one of"): check_parameters("table", dict(table="VIx"))
    assert check_parameters("components", dict(hand_temperature=0)) == dict(hand_temperature=0.)       # the cell says what 0 means
    assert check_parameters("training", dict(n_train=0)) == dict(n_train=0)


def test_the_file_of_the_records(monkeypatch):
    monkeypatch.delenv("DICLIP_EXPERIMENTS")
    jobs = S.read_jobs(ROOT / "nbs/experiments/mini.yaml")
    committed = {p.relative_to(ROOT / "nbs/results").with_suffix("").as_posix(): p for p in record_files(ROOT / "nbs/results")}
    assert set(committed) == {j.record for j in jobs} | {"training_test"} and len({j.record for j in jobs}) == len({j.key for j in jobs}) == len(jobs)
    assert {j.experiment for j in jobs} == {p.stem for p in (ROOT / "nbs/experiments").glob("*.ipynb")}
    for j in (j for j in jobs if j.record in committed):
        ran, asked = json.loads(committed[j.record].read_text())["parameters"], jobs_of._asked(j)[0]
        assert not {k for k in asked if k in ran and ran[k] != asked[k] and k not in ("iterations", "names")}, j.record      # 0 iterations are the profile's, no names are all


# ---- running

@pytest.fixture(scope="module")
def swept(toys, tmp_path_factory):
    "Four runs by two processes; the second fails, the third ends its kernel."
    out, lines = tmp_path_factory.mktemp("swept"), []
    with pytest.MonkeyPatch.context() as m:
        m.setenv("DICLIP_EXPERIMENTS", str(toys))
        jobs = plan(vary=dict(width=[.3, 9, 8, .7]))
        failed = S.Sweep(jobs, out, 2, lines.append).run()
    return out, jobs, failed, lines


def test_a_failure_in_the_middle_stops_nobody(swept):
    out, jobs, failed, lines = swept
    assert [j.parameters["width"] for j in failed] == [9, 8] and [S.state(j, out)[0] for j in jobs] == ["done", "failed", "failed", "done"]
    error = jobs[1].file(out, ".error").read_text()
    assert error.startswith("Traceback") and "RuntimeError: too wide" in error and "\x1b" not in error
    assert "DeadKernelError" in jobs[2].file(out, ".error").read_text()
    for ending in (".ipynb", ".html", ".log", ".json", "_test.json"): assert jobs[0].file(out, ending).exists(), ending
    assert "too wide" in jobs[1].file(out, ".ipynb").read_text() and not jobs[1].file(out, ".json").exists() and not list(out.rglob(".*"))
    assert lines[-1].split(" | ")[0].endswith("2 done, 0 waiting, 0 running, 2 failed") and len(lines) == 8
    table = S.progress(jobs, out).splitlines()
    assert [l.split()[0] for l in table[:-1]] == ["done", "failed", "failed", "done"] and table[-1].startswith("2 done, 0 running, 2 failed, 0 waiting; ")


def test_what_is_valid_is_skipped_and_what_is_not_is_made_again(swept, tmp_path):
    import shutil
    out, (a, _, _, b) = tmp_path / "out", swept[1]
    shutil.copytree(swept[0], out)
    before, runs = results([a, b], out), ran(out)
    assert sweep([a, b], out) == [] and ran(out) == runs and before[0]["a"]["miou"] == 16.3
    a.file(out, ".json").unlink()
    b.file(out, ".json").write_text(b.file(out, ".json").read_text()[:500])
    assert [S.state(j, out)[0] for j in (a, b)] == ["waiting"] * 2
    assert sweep([a, b], out, 2) == [] and results([a, b], out) == before and ran(out) == runs + Counter(["0.3 0", "0.7 0"])


def test_a_record_of_other_parameters_is_not_taken(swept, tmp_path, monkeypatch):
    out, job = swept[0], swept[1][0]
    record = S.finished(job, out)
    assert record["job"]["parameters"]["width"] == .3 and record["job"]["chosen"] == ["layers"]
    def with_(**change):
        path = replace(job).file(tmp_path, ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record | change))
        return S.finished(job, tmp_path) is not None
    assert with_() and with_(job=record["job"] | dict(parameters={k: v for k, v in record["job"]["parameters"].items() if k != "n_val"}))   # older than n_val
    assert not with_(job=None) and not with_(job=record["job"] | dict(parameters=record["job"]["parameters"] | dict(n_val=4)))
    assert not with_(job=record["job"] | dict(parameters=record["job"]["parameters"] | dict(gone=4)))
    assert not with_(settings=record["settings"] | dict(alpha=1.)) and with_(settings=record["settings"] | dict(layers=1)) and not with_(results={})
    assert with_(settings={k: v for k, v in record["settings"].items() if k != "sharpness"}) and not with_(settings={k: v for k, v in record["settings"].items() if k != "rounds"})   # as its default, or not


def test_a_setting_that_the_notebook_chooses_itself_is_no_answer(tmp_path):
    (job,) = plan(layers=5)
    assert len(sweep([job], tmp_path)) == 1
    assert "toy chooses layers itself" in job.file(tmp_path, ".error").read_text() and not job.file(tmp_path, ".json").exists()


def script(folder):
    "What the console script does."
    path = folder / "diclip_sweep.py"
    path.write_text("from diclip.app.sweep import diclip_sweep\ndiclip_sweep()\n")
    return [sys.executable, str(path)]


def pids(out): return [int(c.read_text().split()[1]) for c in out.rglob("*.claim") if c.read_text()]


def test_kill_9_and_resume(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "hold").touch()
    command = [*script(tmp_path), "toy", "--vary", "width=0.3,0.6,0.9", "--set", "wait=True", "--out", str(out), "--jobs", "2"]
    jobs = plan(vary=dict(width=[.3, .6, .9]), wait=True)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until(lambda: (out / "runs.txt").exists() and len(ran(out)) == 2)                       # two at a time, and both are in their notebooks
    assert sorted(S.state(j, out)[0] for j in jobs) == ["running", "running", "waiting"]
    kernels = [int(l.split()[2]) for l in (out / "runs.txt").read_text().splitlines()]
    workers = pids(out)
    first.kill()
    first.wait()
    alive = lambda p: Path(f"/proc/{p}").exists() and "Z" not in Path(f"/proc/{p}/stat").read_text().split(")")[1][:3]
    until(lambda: not any(map(alive, workers + kernels)), 15)
    assert len(workers) == 2 and [S.state(j, out)[0] for j in jobs] == ["waiting"] * 3
    (out / "hold").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "3 done, 0 running, 0 failed, 0 waiting" in done.stdout, done.stdout + done.stderr
    assert len(results(jobs, out)) == 3 and sum(ran(out).values()) == 5


def test_two_sweeps_do_no_run_twice_and_wait_for_each_other(tmp_path):
    out = tmp_path / "out"
    command = [*script(tmp_path), "toy", "--vary", "width=0.3,0.6", "--out", str(out)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both: assert "2 done, 0 running" in p.communicate(timeout=120)[0] and p.returncode == 0
    assert set(ran(out).values()) == {1} and len(ran(out)) == 2


def test_a_process_that_is_killed_is_a_failure_with_its_last_words(tmp_path):
    (tmp_path / "hold").touch()
    (job,), failed = plan(wait=True), []
    thread = threading.Thread(target=lambda: failed.extend(sweep([job], tmp_path)))
    thread.start()
    until(lambda: (tmp_path / "runs.txt").exists())
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    thread.join(30)
    assert len(failed) == 1 and job.file(tmp_path, ".error").read_text().startswith("The process ended with code -9. Its last words:")


def test_claims(tmp_path):
    path = tmp_path / "deep/a.claim"
    assert not S.is_claimed(path)
    claim = S.take_claim(path)
    assert S.take_claim(path) is None and S.is_claimed(path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[claim])
    os.close(claim)
    assert S.is_claimed(path)                                                               # the process has it now
    child.kill()
    child.wait()
    assert not S.is_claimed(path)


def test_a_run_in_other_hands_is_waited_for_or_taken_over(swept, tmp_path):
    "Its record may come from elsewhere, its failure too; if neither comes, it is done here."
    job = swept[1][0]
    claim, lines = S.take_claim(job.file(tmp_path, ".claim")), []
    thread = threading.Thread(target=S.Sweep([job], tmp_path, 1, lines.append).run)
    thread.start()
    time.sleep(1)
    assert thread.is_alive() and not lines
    job.file(tmp_path, ".json").write_text(swept[1][0].file(swept[0], ".json").read_text())
    thread.join(10)
    os.close(claim)
    assert not thread.is_alive() and not lines
    job.file(tmp_path, ".json").unlink()
    sweeping = S.Sweep([job], tmp_path, 1, lines.append)
    job.file(tmp_path, ".error").write_text("elsewhere")
    os.utime(job.file(tmp_path, ".error"), (time.time() + 5,) * 2)
    assert sweeping.run() == [job] and "failed elsewhere" in lines[0]


# ---- the command

def test_the_command(swept, tmp_path, capsys):
    out = str(swept[0])
    S.diclip_sweep(["toy"], vary=["width=0.3,0.7"], out=out)
    assert "2 done, 0 running, 0 failed, 0 waiting" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: S.diclip_sweep(["toy"], vary=["width=0.3,9"], out=out, status=True)
    assert e.value.code == 1 and "1 done, 0 running, 1 failed" in capsys.readouterr().out
    S.diclip_sweep(["toy"], vary=["width=0.3,0.4"], out=out, status=True)
    assert "1 done, 0 running, 0 failed, 1 waiting" in capsys.readouterr().out
    file = tmp_path / "jobs.yaml"
    file.write_text("[{experiment: toy, record: best, set: {width: 0.3}}, {experiment: toy, vary: {width: [0.3, 0.7]}}]")
    S.diclip_sweep(file=str(file), out=out, publish_to=str(tmp_path / "results"))
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["best.json", "best_test.json"]
    assert json.loads((tmp_path / "results/best.json").read_text())["results"] == results(swept[1][:1], swept[0])[0]


def test_shards_do_all_runs_once(tmp_path):
    whole = dict(vary=["width=0.3,0.6"], seeds=1, out=str(tmp_path))
    for i in range(2):
        S.diclip_sweep(["toy"], shard=f"{i}/2", **whole)
        assert len(ran(tmp_path)) == i + 1
    assert set(ran(tmp_path).values()) == {1}
    jobs = plan(vary=dict(width=[.1, .2, .3], alpha=[1, 2, 3]), seeds=3)
    keys = [j.key for i in range(4) for j in share(jobs, (i, 4))]
    assert sorted(keys) == sorted(j.key for j in jobs) and len(set(keys)) == 27


@pytest.mark.parametrize("how, message", [(dict(experiments=["tyo"]), "unknown experiment"), (dict(), "name an experiment"), (dict(experiments=["toy"], vary=["width"]), "'width': write NAME=VALUE"), (dict(experiments=["toy"], vary=["alhpa=1,2"]), "unknown name 'alhpa'"),
    (dict(experiments=["toy"], set=["alpha=-1"]), "setting alpha=-1"), (dict(experiments=["toy"], jobs=0), "jobs=0"), (dict(experiments=["toy"], shard="2/2"), "shard '2/2'"), (dict(experiments=["toy"], profile="maxi"), "unknown profile"), (dict(file="none.yaml"), "none.yaml"),
    (dict(experiments=["toy"], slurm=["x"]), "write NAME=VALUE"), (dict(experiments=["toy"], set=["record=x"]), "record cannot be set"), (dict(experiments=["toy"], set=["seeds=0.5"]), "give a number or a list"), (dict(experiments=["bare"], set=["seeds=2"]), "neither seed nor seeds")])
def test_the_command_refuses_before_anything_runs(how, message, tmp_path):
    with pytest.raises(SystemExit) as e: S.diclip_sweep(**dict(out=str(tmp_path / "out")) | how)
    assert str(e.value).startswith("error: ") and message in str(e.value) and not (tmp_path / "out").exists()


def test_submitit_does_it_in_processes_of_its_own(tmp_path):
    pytest.importorskip("submitit")
    jobs = plan(vary=dict(width=[.3, 9]))
    tasks = S.submit(jobs, tmp_path, 2, dict(timeout_min=2, slurm_partition="none"), cluster="local")
    assert len(tasks) == 2 and tasks[0].result() is None
    with pytest.raises(Exception, match="toy width=9.0 failed"): tasks[1].result()
    assert [S.state(j, tmp_path)[0] for j in jobs] == ["done", "failed"] and S.submit(jobs[:1], tmp_path, cluster="local") == []
    with pytest.raises(ValueError, match="submitit refuses"): S.submit(jobs, tmp_path, 1, dict(minutes=2), cluster="local")


def test_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="error: --slurm needs submitit: pip install"): S.diclip_sweep(["toy"], slurm=[], out=str(tmp_path))


# ---- the other command

def test_repro_by_name(monkeypatch, tmp_path):
    from diclip.app import repro
    seen = []
    monkeypatch.setattr(repro, "run_notebook", lambda name, out, **p: seen.append((name, p)) or dict(results={"a": dict(miou=1.)}, protocol="x"))
    repro.diclip_repro(["toy", "many"], out=str(tmp_path), n_val=5, set=["alpha=1", "width=2"])
    assert seen == [("toy", dict(n_val=5, width=2., overrides=dict(alpha=1.))), ("many", dict(n_val=5, width=2., overrides=dict(alpha=1.)))]
    for how, message in ((dict(set=["alpha"]), "write NAME=VALUE"), (dict(set=["alhpa=1"]), "unknown name"), (dict(per_class=3), "unknown name 'per_class'"), (dict(no_train=True), "unknown name 'no_train'"), (dict(set=["alpha=-1"]), "setting alpha")):
        with pytest.raises(SystemExit) as e: repro.diclip_repro(["toy"], out=str(tmp_path), **how)
        assert str(e.value).startswith("error: ") and message in str(e.value)
    assert len(seen) == 2


def test_repro_without_names_is_the_main_job(monkeypatch, tmp_path):
    from diclip.app import repro
    monkeypatch.delenv("DICLIP_EXPERIMENTS")
    seen = {}
    monkeypatch.setattr(repro, "run_notebook", lambda name, out, **p: seen.update({name: p}) or dict(table=""))
    repro.diclip_repro(out=str(tmp_path))
    usual = dict(n_val=200, seeds=1)
    assert list(seen) == ["components", "training"] and seen["components"] == usual | dict(n_train=60)
    assert seen["training"] == usual | dict(n_train=200, n_choose=60, iterations=250, controls=False, n_strong=50)
    repro.diclip_repro(out=str(tmp_path), n_val=16, n_heads=50, controls=True, set=["alpha=1", "hand_alpha=2", "iterations=7"])
    assert seen["components"] == dict(n_val=16, n_train=60, seeds=1, hand_alpha=2., overrides=dict(alpha=1., iterations=7))
    assert seen["training"] == dict(n_val=16, seeds=1, n_train=50, n_choose=50, iterations=7, n_strong=50, overrides=dict(alpha=1.))
    seen.clear()
    repro.diclip_repro(out=str(tmp_path), no_train=True, seeds=3)
    assert seen == dict(components=dict(n_train=60, n_val=200))
    with pytest.raises(SystemExit, match="unknown name 'alhpa'"): repro.diclip_repro(out=str(tmp_path), set=["alhpa=1"])
