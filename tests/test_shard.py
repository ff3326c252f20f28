"Parts of a list: disjoint and complete, also for pools of images, whose files do not depend on the number of machines."
import numpy as np
import pytest
from hypothesis import given, strategies as st

from diclip.engine.shard import read_shard, share
from diclip.imagepool import generate_pool, profile_pool

VARIABLES = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_PROCID", "SLURM_NTASKS", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


@given(st.integers(0, 60), st.integers(1, 12))
def test_parts_are_disjoint_and_complete(length, n):
    parts = [share(range(length), (i, n)) for i in range(n)]
    assert sorted(sum(parts, [])) == list(range(length)) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("env, part", [(dict(SLURM_ARRAY_TASK_ID=3, SLURM_ARRAY_TASK_COUNT=4), (3, 4)), (dict(SLURM_ARRAY_TASK_ID=4, SLURM_ARRAY_TASK_COUNT=4, SLURM_ARRAY_TASK_MIN=1), (3, 4)),
                                       (dict(SLURM_ARRAY_TASK_ID=5, SLURM_ARRAY_TASK_COUNT=4, SLURM_ARRAY_TASK_MIN=1, SLURM_ARRAY_TASK_STEP=2), (2, 4)), (dict(SLURM_PROCID=0, SLURM_NTASKS=2), (0, 2)),
                                       (dict(SLURM_ARRAY_TASK_ID=1, SLURM_ARRAY_TASK_COUNT=2, SLURM_PROCID=0, SLURM_NTASKS=1), (1, 2)), (dict(JOB_COMPLETION_INDEX=7, JOB_COMPLETIONS=8), (7, 8))])
def test_schedulers_are_asked(env, part, monkeypatch):
    for k in VARIABLES: monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, str(v))
    assert read_shard("auto") == part and read_shard() == (0, 1) and read_shard("1/3") == (1, 3)


def test_what_is_no_part(monkeypatch):
    for text in ("4/4", "x", "1", "1/", "/2", "-1/2", "1.5/2", "0/0", " 0/1"):
        with pytest.raises(ValueError, match="give i/n with i from 0"): read_shard(text)
    for k in VARIABLES: monkeypatch.delenv(k, raising=False)
    with pytest.raises(ValueError, match="found none"): read_shard("auto")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(ValueError, match="SLURM_NTASKS is not"): read_shard("auto")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(ValueError, match="shard '1/1'"): read_shard("auto")


class Painter:
    "Its pictures depend on who is drawn beside whom, a little, as those of a network on a GPU may."
    fingerprint = "painter"

    def picture_size(self, size=None): return (4, 6)

    def generate(self, prompts, seeds, steps, guidance, size, sampler):
        return np.stack([np.random.default_rng([s, len(seeds), sum(map(int, seeds)) % 2**32]).integers(0, 256, (*size, 3), dtype=np.uint8) for s in seeds])


def files_of(folder): return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.png")}


@pytest.mark.parametrize("machines", [2, 3, 7])
def test_a_pool_does_not_depend_on_the_number_of_machines(machines, tmp_path):
    draw = lambda name, part, **kw: generate_pool(Painter(), ["cat", "boat", "car"], tmp_path / name, "a {category}", per_class=5, batch=2, progress=False, part=part, **kw)
    draw("one", (0, 1))
    sets = []
    for i in range(machines):
        draw(f"own{i}", (i, machines))
        draw("shared", (i, machines))
        sets.append(files_of(tmp_path / f"own{i}"))
    whole = files_of(tmp_path / "one")
    assert len(whole) == 15 and files_of(tmp_path / "shared") == whole
    assert sum(map(len, sets)) == 15 and {k: v for s in sets for k, v in s.items()} == whole
    with pytest.raises(ValueError, match="another seed"): draw("shared", (0, machines), seed=1)


def test_the_diffusion_model_draws_the_same_files_on_two_machines(tmp_path):
    from diclip.config import get_profile
    from diclip.sd import load_sd
    from helpers_sd import random_mini_sd
    two = ("boat", "plane")
    p = get_profile("mini", sd=str(random_mini_sd(tmp_path / "sd")), classes=two, prompt_names=two, prompt="a {category}", images_per_class=5, steps=2, size=96)
    sd = load_sd(p)
    draw = lambda name, part=(0, 1): profile_pool(sd, p, tmp_path / name, progress=False, part=part)
    draw("one")
    for i in (1, 0): draw("two", (i, 2))
    assert len(files_of(tmp_path / "one")) == 10 and files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_command_draws_its_part(tmp_path, monkeypatch, capsys):
    import diclip.imagepool
    from diclip.app.commands import diclip_cache
    from diclip.model import DiCLIP
    from diclip.config import get_profile
    from types import SimpleNamespace
    p = get_profile("mini", images_per_class=3, steps=1, size=8)
    monkeypatch.setattr(DiCLIP, "from_pretrained", lambda *a, **k: SimpleNamespace(sd=Painter(), profile=p))
    counts = []
    for i in range(3):
        diclip_cache(out=str(tmp_path / "out"), pool=str(tmp_path / "pool"), shard=f"{i}/3")
        counts.append(len(files_of(tmp_path / "pool")))
    assert counts == [8, 16, 24] and "part 2 of 3" in capsys.readouterr().out and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="error: shard '3/3'"): diclip_cache(shard="3/3")
