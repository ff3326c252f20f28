"""Keys, values and the cache: properties of equations (8)-(10), the file format, refusals, continuing after an interruption."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from diclip.cache import Cache, build_cache, cache_from_features, class_images, tsne
from diclip.config import profile
from diclip.data import batch_images
from diclip.keys import cache_values, cluster_keys, foreground_masks, masked_average_pool, object_masks, patch_masks, pool_images

quick = settings(deadline=None, max_examples=25)
few = settings(deadline=None, max_examples=5)     # k-means takes a while
seeds = st.integers(0, 2**16)


def generator(seed): return torch.Generator().manual_seed(seed)
def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def a_cache(seed=0, C=3, per_class=2, background=2, d=8):
    text = unit(C, d, seed=seed + 1)
    index = torch.arange(C).repeat_interleave(per_class)
    keys = unit(len(index) + background, d, seed=seed)
    return Cache(keys, cache_values(keys[:len(index)], text, index, background), tuple("abcdefgh"[:C]), {"clip": "clip-1", "sd": "sd-1", "grid": [4, 4]})


# ---- (8)

@quick
@given(seeds, st.integers(1, 4), st.integers(1, 20), st.integers(1, 9))
def test_pooling_a_constant_feature_returns_it(seed, B, N, d):
    value = torch.randn(B, 1, d, generator=generator(seed))
    mask = (torch.rand(B, N, generator=generator(seed)) > .5).float()
    mask[:, 0] = 1
    torch.testing.assert_close(masked_average_pool(value.expand(B, N, d), mask), value[:, 0], atol=1e-5, rtol=1e-5)


@quick
@given(seeds, st.integers(2, 20))
def test_pooling_does_not_depend_on_the_order_of_patches(seed, N):
    x, mask, order = torch.randn(2, N, 5, generator=generator(seed)), torch.rand(2, N, generator=generator(seed)), torch.randperm(N, generator=generator(seed))
    torch.testing.assert_close(masked_average_pool(x[:, order], mask[:, order]), masked_average_pool(x, mask), atol=1e-5, rtol=1e-4)


@quick
@given(seeds, st.integers(2, 20))
def test_object_and_background_make_up_the_image(seed, N):
    x, mask = torch.randn(3, N, 4, generator=generator(seed)), (torch.rand(3, N, generator=generator(seed)) > .4).float()
    n = mask.sum(1, keepdim=True)
    whole = (masked_average_pool(x, mask) * n + masked_average_pool(x, 1 - mask) * (N - n)) / N
    torch.testing.assert_close(whole, x.mean(1), atol=1e-5, rtol=1e-4)


def test_an_empty_mask_pools_zeros_and_only_its_own_row():
    out = masked_average_pool(torch.ones(2, 3, 4), torch.tensor([[0., 0, 0], [1, 0, 0]]))
    assert out[0].abs().sum() == 0 and (out[1] == 1).all()


def test_boolean_and_half_precision_masks():
    x = torch.randn(2, 6, 4)
    mask = torch.rand(2, 6) > .5
    torch.testing.assert_close(masked_average_pool(x, mask), masked_average_pool(x, mask.float()))
    assert masked_average_pool(x.half(), mask).dtype == torch.float16


@pytest.mark.parametrize("x, mask, message", [
    (torch.ones(2, 4, 3), torch.ones(2, 2, 2), "flatten the mask's grid"),
    (torch.ones(2, 4, 3), torch.ones(1, 4), "flatten the mask's grid"),
    (torch.ones(4, 3), torch.ones(4), "features \\(B, N, d\\)"),
    (torch.full((1, 2, 3), float("nan")), torch.ones(1, 2), "NaN")])
def test_pooling_refuses(x, mask, message):
    with pytest.raises(ValueError, match=message): masked_average_pool(x, mask)


def test_masks():
    assert foreground_masks(torch.tensor([[.5, .51]])).tolist() == [[0, 1]]
    assert foreground_masks(torch.tensor([[.5, .51]]), .2).tolist() == [[1, 1]]
    for bad in (-.1, 1., float("nan")):
        with pytest.raises(ValueError, match="outside"): foreground_masks(torch.zeros(1, 2), bad)
    pixels = np.zeros((2, 8, 8), np.uint8)
    pixels[0, :4, :4] = 7
    assert patch_masks(pixels, (2, 2)).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert patch_masks([torch.ones(6, 6), np.ones((9, 12), bool)], (3, 3)).shape == (2, 9)


# ---- (9)

@few
@given(seeds, st.integers(1, 6))
def test_keys_have_length_one_and_repeat(seed, k):
    x = torch.randn(12, 5, generator=generator(seed))
    keys = cluster_keys(x, k, seed=3)
    assert keys.shape == (k, 5) and keys.dtype == torch.float32
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(k))
    assert torch.equal(keys, cluster_keys(x, k, seed=3))


def test_as_many_centroids_as_features_are_the_features():
    x = unit(5, 8)
    assert ((cluster_keys(x, 5) @ x.T).max(0).values > 1 - 1e-5).all()


def test_clusters_far_apart_are_found():
    centers = 10 * torch.eye(3, 8)
    x = (centers[:, None] + .01 * torch.randn(3, 6, 8, generator=generator(0))).flatten(0, 1)
    assert ((cluster_keys(x, 3) @ F.normalize(centers, dim=-1).T).max(0).values > .999).all()


@pytest.mark.parametrize("x, k, message", [
    (torch.randn(3, 4), 4, "more pictures per class"), (torch.randn(3, 4), 0, "1 to 3 centroids"),
    (torch.randn(2, 3, 4), 1, "masked_average_pool"), (torch.full((3, 4), float("nan")), 1, "NaN")])
def test_clustering_refuses(x, k, message):
    with pytest.raises(ValueError, match=message): cluster_keys(x, k)


# ---- (10)

@quick
@given(seeds, st.integers(1, 5), st.integers(0, 3))
def test_values_are_one_hot_times_raw_cosine_with_the_background_last(seed, C, background):
    keys, text = unit(6, 7, seed=seed), unit(C, 7, seed=seed + 1)
    index = torch.randint(C, (6,), generator=generator(seed))
    V = cache_values(keys, text, index, background)
    assert V.shape == (6 + background, C + 1)
    torch.testing.assert_close(V[torch.arange(6), index], (keys * text[index]).sum(-1), atol=1e-5, rtol=1e-4)
    assert ((V[:6] != 0).sum(1) <= 1).all() and (V[:6, C] == 0).all()
    assert (V[6:, C] == 1).all() and (V[6:, :C] == 0).all()
    one_hot = cache_values(keys, text, index, background, text_weighted=False)
    assert torch.equal(one_hot[:6], F.one_hot(index, C + 1).float())
    assert torch.equal(one_hot, cache_values(keys, None, index, background, num_classes=C, text_weighted=False))


def test_values_refuse():
    with pytest.raises(ValueError, match="0..2"): cache_values(unit(2, 4), unit(3, 4), [0, 3])
    with pytest.raises(ValueError, match="0..2"): cache_values(unit(2, 4), unit(3, 4), [0, -1])
    with pytest.raises(ValueError, match="class indices"): cache_values(unit(2, 4), unit(3, 4), [0])
    with pytest.raises(ValueError, match="text_weighted=False"): cache_values(unit(2, 4), None, [0, 1], num_classes=2)


# ---- Cache

@quick
@given(seed=seeds, C=st.integers(1, 5), per_class=st.integers(1, 3), background=st.integers(0, 3))
def test_save_and_load_return_the_same(tmp_path_factory, seed, C, per_class, background):
    cache = a_cache(seed, C, per_class, background)
    path = tmp_path_factory.mktemp("cache") / "deeper" / "c.safetensors"
    cache.save(path)
    back = Cache.load(path)
    assert torch.equal(back.keys, cache.keys) and torch.equal(back.values, cache.values)
    assert (back.classes, back.meta) == (cache.classes, cache.meta)
    assert [f.name for f in path.parent.iterdir()] == ["c.safetensors"]


def test_saving_over_a_cache_replaces_it_and_a_failing_save_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    a_cache(1).save(path); a_cache(2).save(path)
    assert torch.equal(Cache.load(path).keys, a_cache(2).keys)
    def no(*_): raise OSError("disk full")
    monkeypatch.setattr("os.replace", no)
    with pytest.raises(OSError, match="disk full"): a_cache(3).save(path)
    monkeypatch.undo()
    assert torch.equal(Cache.load(path).keys, a_cache(2).keys) and [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]


@quick
@given(seed=seeds, cut=st.floats(0, .999))
def test_a_truncated_file_is_one_clear_error(tmp_path_factory, seed, cut):
    path = tmp_path_factory.mktemp("cache") / "c.safetensors"
    a_cache(seed).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:int(cut * len(data))])
    with pytest.raises(ValueError, match="build it again"): Cache.load(path)


@quick
@given(seed=seeds, where=st.floats(0, .999), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_the_rows_silently(tmp_path_factory, seed, where, bit):
    path, cache = tmp_path_factory.mktemp("cache") / "c.safetensors", a_cache(seed)
    cache.save(path)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    try: back = Cache.load(path)
    except ValueError as e: assert "build it again" in str(e)
    else: assert torch.equal(back.keys, cache.keys) and torch.equal(back.values, cache.values)


def test_other_safetensors_and_missing_files(tmp_path):
    from safetensors.torch import save_file
    save_file({"keys": torch.ones(1, 2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="no readable cache"): Cache.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="build_cache"): Cache.load(tmp_path / "none.safetensors")


def test_the_header_is_readable_without_this_package(tmp_path):
    from safetensors import safe_open
    a_cache().save(tmp_path / "c.safetensors")
    with safe_open(str(tmp_path / "c.safetensors"), "np") as f: assert json.loads(f.metadata()["diclip-cache"])["classes"] == ["a", "b", "c"]


def test_check_accepts_what_fits_and_what_is_unknown():
    cache = a_cache()
    assert cache.check() is cache
    assert cache.check(classes=["a", "b", "c"], clip="clip-1", sd="sd-1", grid=(4, 4)) is cache
    assert replace(cache, meta={}).check(clip="clip-2", grid=(9, 9)).keys is cache.keys


@pytest.mark.parametrize("asked, message", [
    (dict(clip="clip-2"), "made with clip clip-1, not clip-2: rebuild"), (dict(sd="sd-2"), "rebuild"), (dict(grid=(4, 5)), "rebuild"),
    (dict(classes=("a", "b")), "rebuild"), (dict(classes=("c", "b", "a")), "made for the classes a, b, c")])
def test_check_refuses_with_the_cure(asked, message):
    with pytest.raises(ValueError, match=message): a_cache().check(**asked)


def test_a_cache_refuses_arrays_that_do_not_fit():
    cache = a_cache()
    with pytest.raises(ValueError, match="length 1"): replace(cache, keys=2 * cache.keys)
    with pytest.raises(ValueError, match="background"): replace(cache, values=cache.values[:, 1:])
    with pytest.raises(ValueError, match="finite"): replace(cache, values=cache.values * float("inf"))


@quick
@given(seeds, st.integers(1, 5), st.integers(0, 3), st.integers(-7, 7))
def test_positive_and_rolled(seed, C, background, shift):
    cache = a_cache(seed, C, 2, background)
    positive, rolled = cache.positive(), cache.rolled(shift)
    assert len(positive) == 2 * C and torch.equal(positive.keys, cache.keys[:2 * C]) and not positive.background.any()
    assert torch.equal(rolled.keys, cache.keys) and torch.equal(rolled.background, cache.background) and torch.equal(rolled.values[:, -1], cache.values[:, -1])
    for c in range(C): assert torch.equal(rolled.values[:, (c + shift) % C], cache.values[:, c])
    assert torch.equal(rolled.rolled(-shift).values, cache.values)


# ---- from features

def features(seed=0, n=12, N=16, d=8):
    return unit(n, N, d, seed=seed), (torch.rand(n, N, generator=generator(seed)) > .5).float(), torch.arange(n) % 3, unit(3, d, seed=seed + 1)


def test_rows_stand_class_by_class_then_background():
    x, m, y, text = features()
    cache = cache_from_features(x, m, y, text, "abc", centroids=2, background_centroids=1)
    assert cache.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert cache.classes == ("a", "b", "c") and cache.meta["per_class"] == {"a": 4, "b": 4, "c": 4}
    json.dumps(cache.meta)


def test_unclustered_keeps_everything_and_zero_background_centroids_nothing():
    x, m, y, text = features()
    assert len(cache_from_features(x, m, y, text, "abc", clustered=False)) == 24
    assert not cache_from_features(x, m, y, text, "abc", centroids=2, background_centroids=0).background.any()
    one_hot = cache_from_features(x, m, y, text, "abc", centroids=2, text_weighted=False)
    assert set(one_hot.values.unique().tolist()) == {0, 1}


@few
@given(seeds)
def test_the_order_of_pictures_does_not_matter(seed):
    x, m, y, text = features(seed)
    order = torch.randperm(12, generator=generator(seed))
    a, b = (cache_from_features(x[o], m[o], y[o], text, "abc", centroids=1) for o in (slice(None), order))
    torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)


def test_a_class_without_pictures_gets_no_rows_and_one_without_foreground_is_an_error():
    x, m, y, text = features()
    part = cache_from_features(x[y != 1], m[y != 1], y[y != 1], text, "abc", centroids=2)
    assert (part.values[:, 1] == 0).all() and part.values.shape[1] == 4
    with pytest.raises(ValueError, match="'b'.*lower mask_threshold"): cache_from_features(x, m * (y != 1)[:, None], y, text, "abc", centroids=2)
    m[0] = 0                                    # one empty mask is dropped, the others carry the class
    assert len(cache_from_features(x, m, y, text, "abc", centroids=3).positive()) == 9


def test_keys_that_speak_against_their_class_are_silenced_and_counted():
    x, m, y, text = features()
    cache = cache_from_features(x, m, y, torch.stack([text[0], -F.normalize(x[y == 1].mean((0, 1)), dim=0), text[2]]), "abc", centroids=1)
    assert cache.meta["silenced"] >= 1 and (cache.values >= 0).all() and cache.values[1].sum() < .001
    assert cache.labels.tolist() == [0, 1, 2, 3, 3, 3]


# ---- from pictures

class FakeCLIP:
    "Mean colors of the patches, mapped by a fixed matrix"
    patch, fingerprint = 8, "fake-clip"
    def __init__(self, seed=0): self.W, self.calls = torch.randn(3, 6, generator=generator(seed)), 0
    def text(self, names, templates=None): return F.normalize(torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1]])[:len(names)] @ self.W, dim=-1)
    def dense(self, images, **_):
        self.calls += 1
        class Out: patches = F.normalize(F.avg_pool2d(images, 8).flatten(2).mT @ self.W, dim=-1)
        return Out


CLASSES = ("red", "green", "blue")
TOY = dict(classes=CLASSES, prompt_names=CLASSES, crop=32, images_per_class=5, centroids=2, mask_threshold=.5)


def pictures(n=5, seed=0):
    rng, out = np.random.default_rng(seed), {}
    for c, name in enumerate(CLASSES):
        shots = rng.integers(80, 120, (n, 32, 32, 3)).astype(np.uint8)
        shots[:, 8:24, 8:24] = 20
        shots[:, 8:24, 8:24, c] = rng.integers(200, 255, (n, 16, 16))
        out[name] = list(shots)
    return out


def build(clip=None, images=None, **how):
    over = {k: how.pop(k) for k in list(how) if k in TOY}
    return build_cache(clip or FakeCLIP(), None, images or pictures(), profile("mini", **{**TOY, **over}), progress=False, **how)


def test_building_finds_the_objects():
    cache, clip = build(), FakeCLIP()
    assert len(cache) == 3 * 2 + 3 and cache.classes == CLASSES
    best = (cache.keys[:6] @ clip.text(CLASSES).T).argmax(1)
    assert best.tolist() == [0, 0, 1, 1, 2, 2]
    cache.check(classes=CLASSES, clip="fake-clip", grid=(4, 4))
    assert {"versions", "seed", "prompt", "centroids", "mask_threshold", "per_class", "templates"} <= set(cache.meta)
    json.dumps(cache.meta)


def test_given_masks_and_limits():
    masks = {name: [np.pad(np.ones((16, 16), bool), 8)] * 5 for name in CLASSES}
    torch.testing.assert_close(build(masks=masks).keys, build().keys, atol=1e-4, rtol=1e-3)
    assert build(images_per_class=3).meta["per_class"] == dict.fromkeys(CLASSES, 3)


def test_only_some_classes():
    cache = build(only=["green"])
    assert (cache.values[:, [0, 2]] == 0).all() and len(cache) == 3
    with pytest.raises(ValueError, match="mauve"): build(only=["mauve"])


def test_building_continues_and_notices_changes(tmp_path):
    clip, images = FakeCLIP(), pictures()
    class Stop(FakeCLIP):
        def dense(self, images, **_):
            if self.calls == 1: raise KeyboardInterrupt
            return super().dense(images)
    with pytest.raises(KeyboardInterrupt): build(Stop(), images, workdir=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["red.safetensors"]
    first = build(clip, images, workdir=tmp_path)
    assert clip.calls == 2 and torch.equal(first.keys, build(images=images).keys)
    build(clip, images, workdir=tmp_path, centroids=1)          # comes after the pooling
    assert clip.calls == 2
    build(clip, images, workdir=tmp_path, mask_threshold=.4)    # comes before it
    assert clip.calls == 5
    images["blue"][0] = images["blue"][0] // 2
    build(clip, images, workdir=tmp_path, mask_threshold=.4)
    assert clip.calls == 6
    (tmp_path / "red.safetensors").write_bytes(b"broken")
    build(clip, images, workdir=tmp_path, mask_threshold=.4)
    assert clip.calls == 7


def test_a_folder_of_files_is_read_in_the_order_of_their_numbers(tmp_path):
    from PIL import Image
    for name, shots in pictures(12).items():
        (tmp_path / name).mkdir()
        for i, shot in enumerate(shots): Image.fromarray(shot).save(tmp_path / name / f"{i}.png")
    assert all((a == b).all() for a, b in zip(class_images(tmp_path, "red", 12), pictures(12)["red"]))
    torch.testing.assert_close(build(images=tmp_path).keys, build(images=pictures(12)).keys)
    assert build(images=tmp_path).meta["prompt"] is None
    (tmp_path / "pool.json").write_text(json.dumps({"prompt": "a {category}", "seed": 3}))
    assert build(images=tmp_path).meta["prompt"] == "a {category}" and build(images=tmp_path).meta["pool"]["seed"] == 3
    with pytest.raises(ValueError, match="generate_pool"): class_images(tmp_path, "mauve", 5)
    with pytest.raises(ValueError, match="no pictures of 'red'"): build(images={"green": []})


def test_too_few_pictures_name_the_cure():
    with pytest.raises(ValueError, match="more pictures per class"): build(images_per_class=1)


def test_batches_do_not_change_the_pooling():
    p, images, clip = profile("mini", **TOY), pictures()["red"], FakeCLIP()
    for a, b in zip(pool_images(clip, None, images, clip.text(CLASSES)[0], p, batch=2), pool_images(clip, None, images, clip.text(CLASSES)[0], p, batch=5)):
        torch.testing.assert_close(a, b)


def test_pictures_of_any_size_enter_at_the_crop():
    x = batch_images([np.full((20, 30, 3), 255, np.uint8), np.zeros((32, 32, 3), np.uint8)], 32)
    assert x.shape == (2, 3, 32, 32) and x[0].min() > .999 and x[1].max() == 0


def test_tsne():
    assert tsne(unit(9, 4)).shape == (9, 2)
    with pytest.raises(ValueError, match="3 or more"): tsne(unit(2, 4))


def test_masks_can_be_refined_before_they_are_cut():
    text, grid = unit(5), (4, 4)
    x = F.normalize(torch.randn(2, 16, 5, generator=generator(1)) + 3 * text * (torch.arange(16) % 4 == 0)[:, None], dim=-1)
    same = object_masks(x, text, .5, par=lambda images, maps: maps, images=torch.zeros(2, 3, 4, 4), grid=grid)
    assert torch.equal(same, object_masks(x, text, .5))
    flipped = object_masks(x, text, .5, par=lambda images, maps: maps.flip(-1), images=torch.zeros(2, 3, 4, 4), grid=grid)
    assert torch.equal(flipped.view(2, 4, 4), same.view(2, 4, 4).flip(-1))


def test_every_setting_of_vce_is_part_of_a_caches_origin():
    from dataclasses import fields
    from diclip.cache import _RECIPE
    from diclip.config import VceSettings
    assert {f.name for f in fields(VceSettings)} | {"crop", "sd_crop"} <= set(_RECIPE)


def test_a_profile_may_refine_the_masks_of_its_cache():
    from diclip.labels import PAR
    small = dict(par_dilations=(1, 2), par_rounds=3)
    over = {**TOY, **small}
    make = lambda **how: build_cache(FakeCLIP(), None, pictures(), profile("mini", **{**over, **how.pop("settings", {})}), progress=False, **how)
    plain, switched, passed = make(), make(settings=dict(cache_par=True)), make(par=PAR(**{"dilations": (1, 2), "rounds": 3}))
    assert torch.equal(switched.keys, passed.keys) and plain.meta["masks"] == "cam" and "par" not in plain.meta
    assert switched.meta["masks"] == passed.meta["masks"] == "par" and switched.meta["par"] == [[1, 2], 3]
    assert not profile("mini").cache_par and not profile("voc").cache_par
    with pytest.raises(ValueError, match="dilations are"): make(settings=dict(cache_par=True, par_dilations=()))


def test_the_vectors_that_ship_are_those_of_the_models_that_ship(monkeypatch):
    "Nothing is pooled again for the mini profile, unless a setting that matters is another."
    from pathlib import Path
    import diclip
    from diclip.clip import load_clip
    from diclip.sd import load_sd
    p, pool = profile("mini"), Path(diclip.__file__).parent / "pool/mini"
    clip, sd = load_clip(p), load_sd(p)
    monkeypatch.setattr("diclip.cache.pool_images", lambda *a, **k: 1 / 0)
    whole = build_cache(clip, sd, pool, p, progress=False)
    assert len(whole) == len(p.classes) * (p.centroids + p.background_centroids)
    assert len(build_cache(clip, sd, pool, profile("mini", images_per_class=12, beta=2.), progress=False)) == len(whole)
    for change in (dict(alpha=1.), dict(timestep=50), dict(cache_par=True), dict(prompt_names=("tree", *p.prompt_names[1:])), dict(mask_threshold=.6)):
        with pytest.raises(ZeroDivisionError): build_cache(clip, sd, pool, profile("mini", **change), progress=False)
    class Other: fingerprint = "another"
    with pytest.raises(ZeroDivisionError): build_cache(clip, Other(), pool, p, progress=False)
