"The facade on the mini profile, and on the real profiles' true topologies at random weights."
from dataclasses import replace

import numpy as np
import pytest
import torch

from diclip import DiCLIP
from diclip.cache import cache_from_features
from diclip.config import profile
from diclip.data import MiniWorld, multi_hot
from diclip.supervision import class_maps
from diclip.vce import diffusion_attention

SIDE, GRID = profile("mini").crop, profile("mini").grid
N = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def mini():
    return DiCLIP.from_pretrained("mini")


@pytest.fixture(scope="module")
def scenes():
    return MiniWorld("train", 3)[:]


def names(model, scenes):
    return [[model.profile.classes[c] for c in s.labels] for s in scenes]


def test_attention_maps_are_what_they_say(mini, scenes):
    A = mini.attention(scenes)
    assert set(A) == {"clip", "sd", "refined", "fused"} and all(a.shape == (3, N, N) for a in A.values())
    for k in ("sd", "refined"): torch.testing.assert_close(A[k].sum(-1), torch.ones(3, N), atol=1e-4, rtol=0)
    torch.testing.assert_close(A["fused"], A["clip"] + mini.profile.alpha * A["refined"], atol=1e-5, rtol=1e-4)


def test_cams_do_not_depend_on_the_batch(mini, scenes):
    together = mini.cams(scenes, names(mini, scenes))
    for s, n, M in zip(scenes, names(mini, scenes), together):
        torch.testing.assert_close(mini.cams([s], [n])[0], M, atol=2e-3, rtol=0)
        assert M.shape == (len(n), SIDE, SIDE) and 0 <= M.min() and M.max() <= 1


def test_images_of_any_kind_and_size(mini, scenes, tmp_path):
    from PIL import Image
    image = scenes[0].image
    Image.fromarray(image).save(tmp_path / "a.png")
    n = names(mini, scenes)[:1]
    want = mini.cams([image], n)[0]
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    for other in ([Image.fromarray(image)], [str(tmp_path / "a.png")], [tmp_path / "a.png"], tensor):
        torch.testing.assert_close(mini.cams(other, n)[0], want, atol=1e-4, rtol=0)
    assert mini.cams([image[:1, :1]], n)[0].shape[1:] == (1, 1)
    assert mini.cams([np.dstack([image, image[..., 0]])[:50]], n)[0].shape[1:] == (50, SIDE)


def test_questions_without_an_answer_are_refused(mini, scenes):
    with pytest.raises(ValueError, match="unknown class 'whale'"): mini.cams(scenes[:1], [["whale"]])
    with pytest.raises(ValueError, match="name at least one class"): mini.cams(scenes[:1], [[]])
    with pytest.raises(ValueError, match="one list of class names"): mini.cams(scenes[:1], ["boat"])
    with pytest.raises(ValueError, match="at least one"): mini.cams([], [])
    with pytest.raises(ValueError, match="NaN"): mini.cams(torch.full((1, 3, 96, 96), torch.nan), [["boat"]])
    with pytest.raises(ValueError, match="choose one of"): DiCLIP.from_pretrained("giga")
    with pytest.raises(ValueError, match="unknown setting"): DiCLIP.from_pretrained("mini", depth=3)


def cache_for(model, classes=None):
    rng = torch.Generator().manual_seed(0)
    F = torch.nn.functional.normalize(torch.randn(16, N, model.clip.embed_dim, generator=rng), dim=-1)
    m = (torch.rand(16, N, generator=rng) > .5).float()
    meta = dict(clip=model.clip.fingerprint, grid=list(GRID))
    return cache_from_features(F, m, torch.arange(16) % 8, model.text, classes or model.profile.classes, centroids=2, meta=meta)


def test_a_cache_is_used_and_a_foreign_one_refused(mini, scenes, tmp_path):
    cache = cache_for(mini)
    cache.save(tmp_path / "cache.safetensors")
    n = names(mini, scenes)
    plain = mini.cams(scenes, n)
    other = DiCLIP(mini.clip, mini.sd, mini.profile, tmp_path / "cache.safetensors")
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain, other.cams(scenes, n)))
    with pytest.raises(ValueError, match="other classes|made for the classes"): other.use_cache(cache_for(mini, tuple("abcdefgh")))
    with pytest.raises(ValueError, match="rebuild"): other.use_cache(replace(cache, meta=dict(cache.meta, clip="another-clip")))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cache.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="no readable cache"): other.use_cache(tmp_path / "cut.safetensors")
    assert other.cache is not None and len(other.cache) == len(cache)


def test_alpha_zero_is_clip(mini, scenes):
    from diclip.vce import enhanced_features
    x, _ = mini.prepare(scenes)
    R, _ = mini.refined(x)
    F = enhanced_features(mini.clip, x, R, layers=3, alpha=0., readout="inplace")
    torch.testing.assert_close(F, mini.clip.dense(x).patches, atol=1e-5, rtol=0)


def test_true_topologies_at_random_weights_and_voc_settings(tmp_path):
    "ViT-B/16 at its true size and SD 2.1's topology at reduced width, 320 x 320, 20 x 20 patches."
    import open_clip
    from helpers_sd import random_sd21_topology_reduced_width
    from diclip.clip import DenseCLIP
    from diclip.sd import load_sd
    folder = random_sd21_topology_reduced_width(tmp_path / "sd21") or tmp_path / "sd21"
    p = profile("voc", sd=str(folder), sd_alternatives=())
    clip = DenseCLIP(open_clip.create_model("ViT-B-16-quickgelu", pretrained=None), open_clip.get_tokenizer("ViT-B-16-quickgelu"), templates=p.templates)
    model = DiCLIP(clip, load_sd(p), p)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    A = model.attention([image])
    assert all(a.shape == (1, 400, 400) for a in A.values())
    M = model.cams([image], [["boat", "person"]])[0]
    assert M.shape == (2, 60, 90) and M.isfinite().all() and 0 <= M.min() and M.max() <= 1


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_a_type_has_two_names(dtype):
    half = DiCLIP.from_pretrained("mini", dtype=dtype)
    assert next(half.clip.parameters()).dtype == half.sd.dtype == torch.bfloat16 and half.text.dtype == torch.float32


def test_bfloat16_is_close_and_answers_in_float32(mini, scenes):
    half = DiCLIP.from_pretrained("mini", dtype="bf16")
    assert half.clip.fingerprint == mini.clip.fingerprint and half.sd.fingerprint == mini.sd.fingerprint
    A, B = half.attention(scenes), mini.attention(scenes)
    for k, most in (("clip", .05), ("sd", .005)): torch.testing.assert_close(A[k], B[k], atol=most, rtol=0)
    d = torch.cat([(a - b).abs().flatten() for a, b in zip(half.cams(scenes, names(mini, scenes)), mini.cams(scenes, names(mini, scenes)))])
    assert d.dtype == torch.float32 and d.mean() < .01


def test_bfloat16_at_random_weights(tmp_path):
    "A cache, a training, a folder and a segmentation, with frozen models of random weights in bfloat16."
    from helpers_sd import random_mini_sd
    small = dict(sd=str(random_mini_sd(tmp_path / "sd")), sd_draws=1, iterations=2, head_width=32, images_per_class=2, centroids=1, par_rounds=2)
    half, whole = (DiCLIP.from_pretrained("mini", dtype=t, **small) for t in ("bf16", "fp32"))
    x, one = MiniWorld("train", 2)[:], dict(scales=(1.,), flip=False)
    A, B = half.attention(x), whole.attention(x)
    for k, most in (("clip", .05), ("sd", .005)): torch.testing.assert_close(A[k], B[k], atol=most, rtol=0)
    half.use_cache(cache_for(half))
    half.fit(MiniWorld("train", 4), tmp_path / "training", progress=False)
    assert {v.dtype for v in half.student.state_dict().values()} == {half.cache.keys.dtype} == {torch.float32}
    half.save_pretrained(tmp_path / "model")
    again = DiCLIP.from_pretrained(tmp_path / "model", dtype="bf16", trust=True)
    assert all(torch.equal(a, b) for a, b in zip(again.segment(x, **one), half.segment(x, **one)))
    same = [(a == b).float().mean() for a, b in zip(DiCLIP.from_pretrained(tmp_path / "model", trust=True).segment(x, **one), half.segment(x, **one))]
    assert min(same) > .9


def test_a_cache_says_that_it_was_made_of_rounded_models(mini):
    from types import SimpleNamespace
    from diclip.cache import _origin
    of = lambda **sd: _origin(mini.clip, SimpleNamespace(fingerprint="sd", **sd), mini.profile, None, None)
    assert of() == of(dtype=torch.float32) and of(dtype=torch.bfloat16) == of() | {"precision": "bfloat16"}


def test_precisions_without_sense_are_refused():
    for dtype in ("fp16", torch.float16):
        with pytest.raises(ValueError, match="choose bf16"): DiCLIP.from_pretrained("mini", dtype=dtype)
    for dtype in ("half", torch.float64):
        with pytest.raises(ValueError, match="choose one of fp32, bf16, fp16"): DiCLIP.from_pretrained("mini", dtype=dtype)


@pytest.mark.parametrize("command", ["diclip_train", "diclip_cache", "diclip_eval", "diclip_segment", "diclip_cam", "diclip_repro"])
def test_every_command_has_the_one_precision(command, tmp_path, monkeypatch):
    "It is refused, or it reaches the frozen models, which are not loaded here."
    from diclip.app import commands, repro
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    run, seen = getattr(commands, command, None) or repro.diclip_repro, []
    args = (["a.png"],) if command in ("diclip_segment", "diclip_cam") else ()
    with pytest.raises((SystemExit, ValueError), match="choose bf16"): run(*args, precision="fp16", **({"model": "mini"} if command == "diclip_eval" or args else {}))
    def load(name, device="cpu", dtype="fp32", *rest, **more):
        seen.append(dtype)
        raise ValueError("enough")
    monkeypatch.setattr(DiCLIP, "from_pretrained", load)
    monkeypatch.setattr(commands, "_accelerator", lambda device, precision: __import__("types").SimpleNamespace(device=device))
    def notebook(name, out, **parameters):
        seen.append(parameters["precision"])
        raise ValueError("enough")
    monkeypatch.setattr(repro, "run_notebook", notebook)
    with pytest.raises((SystemExit, ValueError), match="enough"): run(*args, precision="bf16")
    assert seen == ["bf16"]


def test_images_are_made_into_squares_once(mini, scenes, monkeypatch):
    "Views of a photograph of another size come from the photograph, and the result is resized to it once."
    from diclip.train import new_student
    model = DiCLIP(mini.clip, mini.sd, replace(mini.profile, scales=(1., 1.5), view_mean="logits"), student=new_student(mini.clip, mini.profile).eval())
    photos = [np.tile(scenes[0].image, (2, 2, 1))[:200, :301], scenes[1].image]
    from diclip.infer import segment_scores
    x = [torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in photos]
    for mean in ("logits", "probabilities"):
        want = segment_scores(model.clip, model.student.head, x, SIDE, (1., 1.5), True, mean=mean)
        for how in (dict(mean=mean), *([{}] if mean == "logits" else [])):
            for a, b in zip(model.segment(photos, **how), want): assert a.shape == b.shape[1:] and torch.equal(a, b.argmax(0))
    with pytest.raises(ValueError, match="probabilities or logits"): model.segment(photos, mean="median")
    for M, p in zip(mini.cams(photos, names(mini, scenes)[:2]), photos): assert M.shape[1:] == p.shape[:2]


def test_cams_of_several_views(mini, scenes):
    n = names(mini, scenes)
    plain, views = mini.cams(scenes, n), mini.cams(scenes, n, scales=(.5, 1., 1.5), flip=True)
    for a, b in zip(plain, views):
        assert a.shape == b.shape and 0 <= b.min() and b.max() <= 1 and (a - b).abs().max() > .01
    mirrored = mini.cams([np.ascontiguousarray(s.image[:, ::-1]) for s in scenes], n, scales=(1.,), flip=True)
    for a, b in zip(mini.cams(scenes, n, scales=(1.,), flip=True), mirrored): assert (a - b.flip(-1)).abs().mean() < .02   # k-means and noise are not mirrored
    with pytest.raises(ValueError, match="give one or more numbers above 0"): mini.cams(scenes, n, scales=(-1.,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, scenes):
    "A trained model in a folder, and the same model in memory."
    folder, model = tmp_path_factory.mktemp("saved"), DiCLIP.from_pretrained("mini", iterations=2, head_width=32, images_per_class=3, centroids=2, par_rounds=2)
    model.fit(MiniWorld("train", 16), folder / "training", progress=False)
    model.save_pretrained(folder / "model")
    return folder, model


def test_a_folder_segments_without_a_diffusion_model(saved, scenes):
    folder, model = saved
    again = DiCLIP.from_pretrained(folder / "model", sd="weights/nowhere", sd_alternatives=())
    assert all(torch.equal(a, b) for a, b in zip(again.segment(scenes), model.segment(scenes))) and again.sd.fingerprint == model.sd.fingerprint
    with pytest.raises((ValueError, OSError), match="nowhere"): again.cams(scenes, names(again, scenes))
    whole = DiCLIP.from_pretrained(folder / "model")
    for a, b in zip(whole.cams(scenes, names(whole, scenes)), model.cams(scenes, names(model, scenes))): torch.testing.assert_close(a, b)


def test_the_adapter_reads_only_classes_that_are_named(saved, scenes):
    _, model = saved
    n, p = names(model, scenes), model.profile
    x, _ = model.prepare(scenes)
    labels = torch.tensor([[c in k for c in p.classes] for k in n])
    maps = model.maps(x, labels).unflatten(2, p.grid)
    assert maps[~labels].abs().sum() == 0
    for M, m, l in zip(model.cams(scenes, [[c for c in p.classes if c in k] for k in n]), maps, labels):
        torch.testing.assert_close(M, torch.nn.functional.interpolate(m[None, l], (SIDE, SIDE), mode="bilinear")[0].clamp(0, 1))


def test_a_used_folder_is_refused_before_any_work(saved):
    folder, model = saved
    model = DiCLIP(model.clip, None, model.profile)             # without a diffusion model it could not even begin
    with pytest.raises(ValueError, match="pass --resume"): model.fit(MiniWorld("train", 16), folder / "training", progress=False)


def test_damaged_images_are_skipped_or_stop_a_training_that_remembers(tmp_path, capsys):
    from diclip.data import VOC, export_voc
    export_voc(MiniWorld("train", 12)[:], tmp_path, "train")
    broken = sorted((tmp_path / "JPEGImages").glob("*.jpg"))[5]
    broken.write_bytes(broken.read_bytes()[:200])
    model = DiCLIP.from_pretrained("mini", iterations=2, head_width=32, images_per_class=3, centroids=2, par_rounds=2)
    data = VOC(tmp_path, "train", classes=model.profile.classes)
    with pytest.raises(ValueError, match=broken.name): model.fit(data, tmp_path / "stop", progress=False)
    assert len(model.fit(data, tmp_path / "skip", on_error="skip", progress=False)) == 1
    assert "skipped 1 damaged" in capsys.readouterr().out


def test_norm_and_decoder_layers_are_settings_of_the_profile(mini, scenes):
    other = DiCLIP(mini.clip, mini.sd, replace(mini.profile, norm="minmax", sd_layers=(2, 3)))
    x, _ = mini.prepare(scenes)
    torch.testing.assert_close(other.refined(x)[1], mini.sd.attention(x, mini.profile.grid, timestep=mini.profile.timestep, layers=[2, 3],
                                                                           draws=mini.profile.sd_draws))
    assert not torch.allclose(other.refined(x)[1], mini.refined(x)[1], atol=1e-4)
    assert ((mini.maps(x) == 0).float().mean(-1) >= .5).all() and ((other.maps(x) == 0).float().mean(-1) < .5).all()


def test_redundancy_removal_takes_the_background_words_along(mini, scenes):
    x, maps = mini.prepare(scenes)[0], {}
    for words in ((), mini.profile.background_words):
        maps[words] = DiCLIP(mini.clip, mini.sd, replace(mini.profile, redundancy=True, background_words=words)).maps(x)
        found = class_maps(mini.clip, mini.sd, mini.text, x, None, replace(mini.profile, redundancy=True, background_words=words))
        torch.testing.assert_close(found["cam"], maps[words])
    assert (maps[()] - maps[mini.profile.background_words]).abs().max() > .01


def test_absent_classes_have_no_map_with_a_cache_either(mini, scenes):
    model = DiCLIP(mini.clip, mini.sd, mini.profile)
    model.use_cache(cache_for(mini))
    x, labels = mini.prepare(scenes)[0], multi_hot(scenes, 8)
    assert not model.maps(x, labels)[~labels].any() and (model.maps(x)[~labels].amax(-1) > 0).all()


def test_the_attention_is_averaged_over_the_draws_of_the_profile(mini, scenes):
    x, p = mini.prepare(scenes)[0], mini.profile
    two = DiCLIP(mini.clip, mini.sd, replace(p, sd_draws=2))
    look = lambda draws: mini.sd.attention(x, p.grid, timestep=p.timestep, layers=p.sd_layers, draws=draws)
    torch.testing.assert_close(two.refined(x)[1], look(2))
    torch.testing.assert_close(mini.refined(x)[1], look(p.sd_draws))
    torch.testing.assert_close(diffusion_attention(mini.sd, x, p.grid, p, draws=2), look(2))
    assert not torch.allclose(look(1), look(2), atol=1e-4)
