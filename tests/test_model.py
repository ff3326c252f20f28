"The facade on the mini profile, and on the real profiles' true topologies at random weights."
from dataclasses import replace

import numpy as np
import pytest
import torch

from diclip import DiCLIP
from diclip.cache import cache_from_features
from diclip.config import profile
from diclip.data import MiniWorld


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
    assert set(A) == {"clip", "sd", "refined", "fused"} and all(a.shape == (3, 144, 144) for a in A.values())
    for k in ("sd", "refined"): torch.testing.assert_close(A[k].sum(-1), torch.ones(3, 144), atol=1e-4, rtol=0)
    torch.testing.assert_close(A["fused"], A["clip"] + mini.profile.alpha * A["refined"], atol=1e-5, rtol=1e-4)


def test_cams_do_not_depend_on_the_batch(mini, scenes):
    together = mini.cams(scenes, names(mini, scenes))
    for s, n, M in zip(scenes, names(mini, scenes), together):
        torch.testing.assert_close(mini.cams([s], [n])[0], M, atol=2e-3, rtol=0)
        assert M.shape == (len(n), 96, 96) and 0 <= M.min() and M.max() <= 1


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
    assert mini.cams([np.dstack([image, image[..., 0]])[:50]], n)[0].shape[1:] == (50, 96)


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
    F = torch.nn.functional.normalize(torch.randn(16, 144, model.clip.embed_dim, generator=rng), dim=-1)
    m = (torch.rand(16, 144, generator=rng) > .5).float()
    meta = dict(clip=model.clip.fingerprint, grid=[12, 12])
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
