"""Rivals: each rule against a restatement of its formula, CLIP left as it was, and what they refuse."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diclip.data import MiniWorld, batch_images, multi_hot
from diclip.model import DiCLIP
from diclip.rivals import PLACES, RIVALS, Proxied, clearclip, early_attention, grad_cam, maskclip, naclip, place, proxied_features, proxyclip, rival_cache, rival_output, sclip, voting, word_attention

SCENES = MiniWorld("train", 12)[:]


@pytest.fixture(scope="module")
def m(): return DiCLIP.from_pretrained("mini", sd_draws=1, images_per_class=2, centroids=1, background_centroids=1)


@pytest.fixture(scope="module")
def x(m): return batch_images(SCENES[:2], m.profile.crop)


def softmax(z):
    "Row by row, in float64."
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_proxies_are_their_formulas(seed):
    torch.manual_seed(seed)
    h, w, d = 3, 5, 6
    q, k, v = torch.randn(3, 2, 2, h * w, d)
    a, b = q.double().numpy(), k.double().numpy()
    same = lambda z: np.einsum("bhid,bhjd->bhij", z, z) / np.sqrt(d)
    at = np.array([(i, j) for i in range(h) for j in range(w)])
    window = np.exp(-((at[:, None] - at[None]) ** 2).sum(-1) / (2 * 5.0 ** 2))
    for found, wanted in ((sclip(q, k, v), softmax(same(a)) + softmax(same(b))), (clearclip(q, k, v), softmax(same(a))), (naclip(q, k, v, grid=(h, w)), softmax(same(b) + window)),
                          (maskclip(q, k, v), np.broadcast_to(np.eye(h * w), (2, 2, h * w, h * w)))):
        assert np.abs(found.numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_proxyclip_is_its_formula(seed):
    torch.manual_seed(seed)
    f = torch.randn(2, 12, 5)
    z = f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=-1, keepdims=True)
    found = proxyclip(None, None, None, f)[:, 0].numpy()
    for i in range(2):
        s = z[i] @ z[i].T
        A = 3.0 * (s - 1.2 * s.mean())
        assert np.abs(found[i] - softmax(np.where(A < 0, -np.inf, A))).max() < 1e-5
    assert torch.equal(proxyclip(None, None, None, torch.ones(1, 4, 2))[0, 0], torch.eye(4)), "where all is alike, a patch keeps itself"


def test_voting_is_the_mean_of_a_group(m, x):
    from diclip.acr import cluster_attention
    A = torch.rand(2, 30, 30).softmax(-1)
    groups, f = cluster_attention(A, 4), torch.randn(2, 30, 3)
    voted = voting(A, 4) @ f
    for b in range(2):
        for g in groups[b].unique(): assert torch.allclose(voted[b, groups[b] == g], f[b, groups[b] == g].mean(0), atol=1e-5)


def test_early_layers_are_clips_own(m, x):
    maps = m.clip.dense(x, keep=("attention",)).attention
    mean = sum(A.mean(1)[:, 1:, 1:] for A in maps[1:4]) / 3
    assert torch.allclose(early_attention(m.clip, x, 1, 4), mean / mean.sum(-1, keepdim=True), atol=1e-5)


def test_the_gradient_is_that_of_the_probability(m, x):
    "Finite differences of the probability along every channel of the first norm's output, summed over patches."
    clip, text, y = m.clip, m.text, multi_hot(SCENES[:2], 8)
    found = grad_cam(clip, x, text, y, token="class")
    h, block = clip.dense(x, keep=("tokens",)).tokens[-2].double(), clip.blocks[-1]
    import copy
    block, visual = copy.deepcopy(block).double(), copy.deepcopy(clip.visual).double()
    a = block.ln_1(h)

    def probability(a):
        attn = block.attn
        q, k, v = F.linear(a, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = attn.out_proj((torch.softmax(q @ k.mT / q.shape[-1] ** .5, -1) @ v).transpose(1, 2).flatten(2))
        z = h + out
        z = visual.ln_post((z + block.mlp(block.ln_2(z)))[:, 0]) @ visual.proj
        s = clip.model.logit_scale.exp() * F.normalize(z, dim=-1) @ text.T.double()
        return torch.where(y, s, -torch.inf).softmax(-1)

    with torch.enable_grad(): J = torch.autograd.functional.jacobian(lambda e: probability(a + torch.cat([torch.zeros_like(e), e.expand(-1, a.shape[1] - 1, -1)], 1)), torch.zeros(2, 1, a.shape[-1], dtype=torch.float64))
    for b in range(2):
        wanted = (J[b, :, b, 0] @ a[b, 1:].T).relu()
        assert (found[b].double() - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


def test_words_are_found_in_the_prompt(m, x):
    X, S = word_attention(m.sd, x, "cat", (20, 20))
    assert X.shape == (2, 400) and (X >= 0).all() and (X <= 1).all() and torch.allclose(S.sum(-1), torch.ones(2, 400), atol=1e-4)
    other = word_attention(m.sd, x, "boat", (20, 20))[0]
    assert not torch.allclose(X, other)
    with pytest.raises(ValueError, match="use a prompt with"): word_attention(m.sd, x, "cat", (20, 20), prompt="a photo")


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_leaves_the_models_as_they_were(m, x, name):
    before, fingerprints = m.clip.dense(x).patches, (m.clip.fingerprint, m.sd.fingerprint)
    hooks = lambda: sum(len(n._forward_hooks) for part in (m.clip, m.sd.pipe.unet) for n in part.modules())
    held, y = hooks(), multi_hot(SCENES[:2], 8)
    f, scores = rival_output(m, x, name, y)
    again = rival_output(m, x, name, y)
    assert f.shape == (2, 400, m.clip.embed_dim) and scores.shape == (2, 8, 400) and scores.isfinite().all()
    assert torch.equal(f, again[0]) and torch.equal(scores, again[1]), "no chance in it"
    refined = rival_output(m, x, name, y, acr=True)[1]
    assert refined.shape == scores.shape and refined.isfinite().all()
    assert torch.equal(m.clip.dense(x).patches, before) and hooks() == held and (m.clip.fingerprint, m.sd.fingerprint) == fingerprints


def test_places(m, x):
    edit = Proxied(maskclip)
    plain = m.clip.dense(x, None, m.clip.depth, "surgery").patches
    assert torch.allclose(proxied_features(m.clip, x, edit, **place(m.clip, "map")), plain, atol=1e-5), "who looks at himself spreads nothing"
    for name in PLACES: assert proxied_features(m.clip, x, edit, **place(m.clip, name)).isfinite().all()
    with pytest.raises(ValueError, match="unknown place 'first': choose one of last, block"): place(m.clip, "first")


def test_what_is_refused(m, x):
    with pytest.raises(ValueError, match="unknown rival 'CLIP': choose one of MaskCLIP"): rival_output(m, x, "CLIP")
    with pytest.raises(ValueError, match="unknown switch 'width'"): rival_output(m, x, "SCLIP", width=3)


def test_a_cache_of_a_rivals_features(m):
    pool = {c: [s.image for s in SCENES[:2]] for c in m.profile.classes}
    cache = rival_cache(m, pool, "ClearCLIP", at="all")
    assert len(cache) == 16 and cache.meta["rival"] == "ClearCLIP" and cache.classes == m.profile.classes
    assert torch.equal(cache.keys, rival_cache(m, pool, "ClearCLIP", at="all").keys)
