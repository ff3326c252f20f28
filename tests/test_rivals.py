"""Rivals: each of the nine at its first values against a restatement in float64, models left as they were, and what they refuse."""
import copy
import hashlib
from dataclasses import replace

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


# ---- all nine at their first values, from the tokens that enter CLIP's last block on, head by head and row by row

def last_block(clip, x, P, alone):
    "Patch features where P(q, k) (N, N) of a head stands for the attention between patches; `alone`: of the attention's output and nothing else."
    block, visual = copy.deepcopy(clip.blocks[-1]).double(), copy.deepcopy(clip.visual).double()
    h = clip.dense(x, keep=("tokens",)).tokens[-2].double()
    a, z = block.attn, block.ln_1(h)
    q, k, v = (t.unflatten(-1, (a.num_heads, -1)) for t in F.linear(z, a.in_proj_weight, a.in_proj_bias).chunk(3, -1))
    out, scale = torch.zeros_like(v), q.shape[-1] ** -.5
    for b in range(len(h)):
        for head in range(a.num_heads):
            A = torch.softmax(q[b, :, head] @ k[b, :, head].T * scale, -1)
            A[1:, 0], A[1:, 1:] = 0, torch.as_tensor(P(q[b, 1:, head], k[b, 1:, head], b))
            out[b, :, head] = A @ v[b, :, head]
    new = a.out_proj(out.flatten(2))
    y = new if alone else h + new + block.mlp(block.ln_2(h + new))
    return F.normalize(visual.ln_post(y)[:, 1:] @ visual.proj, dim=-1)


def like(a): return lambda q, k, b: softmax(dict(q=q, k=k)[a] @ dict(q=q, k=k)[a].T / q.shape[-1] ** .5)


def both(q, k, b): return like("q")(q, k, b) + like("k")(q, k, b)


def near_keys(q, k, b):
    at = np.array([divmod(i, 20) for i in range(400)])
    return softmax(k @ k.T / q.shape[-1] ** .5 + np.exp(-((at[:, None] - at) ** 2).sum(-1) / 50))


def by_proxyclip(m, x):
    unet, kept = m.sd.pipe.unet, []
    z = m.sd.encode(x)
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0))
    keep = m.sd.pipe.scheduler.alphas_cumprod[0]
    hook = unet.up_blocks[-2].register_forward_hook(lambda _, i, out: kept.append(out))
    unet(keep ** .5 * z + (1 - keep) ** .5 * noise, 0, encoder_hidden_states=m.sd.null_prompt.expand(len(z), -1, -1))
    hook.remove()
    f = F.interpolate(kept[0], (20, 20), mode="bilinear", antialias=True).flatten(2).mT.double().numpy()
    f = f / np.linalg.norm(f, axis=-1, keepdims=True)
    P = []
    for s in f @ f.transpose(0, 2, 1): P.append(softmax(np.where(s > 1.2 * s.mean(), 3 * (s - 1.2 * s.mean()), -np.inf)))
    return last_block(m.clip, x, lambda q, k, b: P[b], True)


def diffusion(m, x):
    from diclip.vce import diffusion_attention
    return diffusion_attention(m.sd, x, (20, 20), m.profile).double()


def by_cliper(m, x):
    maps = m.clip.dense(x, keep=("attention",)).attention[:-1]
    A = sum(a.double().mean(1)[:, 1:, 1:] for a in maps).numpy()
    A = A / A.sum(-1, keepdims=True)
    for axis in (1, 2): A = A / A.sum(axis, keepdims=True)
    A = (A + A.transpose(0, 2, 1)) / 2
    A = np.maximum(A - A.mean(1, keepdims=True), 0)
    A = A / A.sum(-1, keepdims=True)
    return diffusion(m, x) @ last_block(m.clip, x, lambda q, k, b: A[b], True)


def by_lavg(m, x):
    from diclip.acr import cluster_attention
    f, groups = last_block(m.clip, x, both, False), cluster_attention(diffusion(m, x).float(), 9)
    out = f.clone()
    for b in range(len(f)):
        for g in groups[b].unique(): out[b, groups[b] == g] = f[b, groups[b] == g].mean(0)
    return out


BY_COSINES = {"MaskCLIP": lambda m, x: last_block(m.clip, x, lambda q, k, b: np.eye(400), False), "SCLIP": lambda m, x: last_block(m.clip, x, both, False),
              "ClearCLIP": lambda m, x: last_block(m.clip, x, like("q"), True), "NACLIP": lambda m, x: last_block(m.clip, x, near_keys, True), "ProxyCLIP": by_proxyclip, "CLIPer": by_cliper, "LaVG": by_lavg}


@pytest.mark.parametrize("name", BY_COSINES)
def test_a_rival_of_features_is_its_formula(m, x, name):
    "Scores are cosines with the words; maps that are spread are not normalized again."
    f, scores = rival_output(m, x, name, multi_hot(SCENES[:2], 8))
    wanted = BY_COSINES[name](m, x)
    assert (f - F.normalize(wanted, dim=-1)).abs().max() < 1e-5
    assert (scores - (wanted @ m.text.T.double()).mT).abs().max() < 1e-5


def test_clip_es_is_its_formula(m, x):
    from diclip.affinity import confident_boxes
    clip, y, T = m.clip, multi_hot(SCENES[:2], 8), m.text.double()
    block, visual, h = copy.deepcopy(clip.blocks[-1]).double(), copy.deepcopy(clip.visual).double(), clip.dense(x, keep=("tokens",)).tokens[-2].double()
    words = clip.text(m.profile.background_words).double() if m.profile.background_words else T[:0]
    wanted = torch.zeros(2, 8, 400, dtype=torch.float64)
    for b in range(2):
        classes = y[b].nonzero().flatten().tolist()
        with torch.enable_grad():
            a = block.ln_1(h[b:b + 1]).detach().requires_grad_()
            q, k, v = F.linear(a, block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            z = h[b:b + 1] + block.attn.out_proj((torch.softmax(q @ k.mT / q.shape[-1] ** .5, -1) @ v).transpose(1, 2).flatten(2))
            z = visual.ln_post(z + block.mlp(block.ln_2(z)))[0, 1:].mean(0) @ visual.proj           # the norm, the mean, the projection
            logits = clip.model.logit_scale.exp().double() * torch.cat([T[classes], words]) @ F.normalize(z, dim=-1)
            for i, c in enumerate(classes):
                g = torch.autograd.grad(logits.softmax(-1)[i], a, retain_graph=True)[0][0, 1:].sum(0)
                wanted[b, c] = (a[0, 1:].detach() @ g).relu()
    low, high = wanted.amin(-1, keepdim=True), wanted.amax(-1, keepdim=True)
    wanted = torch.where(high > low, (wanted - low) / (high - low).clamp_min(1e-300), 0.)
    maps = clip.dense(x, keep=("attention",)).attention
    A = np.mean([t.double().mean(1)[:, 1:, 1:].numpy() for t in maps[len(maps) // 3:]], 0)
    A = A / A.sum(-1, keepdims=True)
    for _ in range(3):
        A = A / A.sum(1, keepdims=True)
        A = A / A.sum(2, keepdims=True)
    A = torch.from_numpy((A + A.transpose(0, 2, 1)) / 2)
    walked = A[:, None] @ (A[:, None] @ (confident_boxes(wanted.float(), (20, 20), .4) * wanted)[..., None])
    walked = walked[..., 0]
    low, high = walked.amin(-1, keepdim=True), walked.amax(-1, keepdim=True)
    walked = torch.where(high > low, (walked - low) / (high - low).clamp_min(1e-300), 0.)
    found = rival_output(m, x, "CLIP-ES", y)[1]
    assert (found[y] - walked[y]).abs().max() < 1e-5


def test_diffsegmenter_is_its_formula(m, x):
    from diclip.vce import sd_images
    y, pipe, unet = multi_hot(SCENES[:2], 8), m.sd.pipe, m.sd.pipe.unet
    images = sd_images(x, m.profile, m.sd.factor)
    c = y.any(0).nonzero().flatten().tolist()[0]
    z, word = m.sd.encode(images[y[:, c]]), (m.profile.image_names or m.profile.classes)[c]
    ids = pipe.tokenizer(f"a photo of a {word}.").input_ids
    at = [i for i, t in enumerate(ids) if t in pipe.tokenizer(word, add_special_tokens=False).input_ids and i > 4]
    keep = pipe.scheduler.alphas_cumprod[100]
    noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(0))
    states, seen, hooks = pipe.encode_prompt(f"a photo of a {word}.", m.sd.device, 1, False)[0], [], []
    for block in unet.up_blocks:
        for name, part in block.named_modules():
            if name.endswith(("attn1", "attn2")): hooks.append(part.register_forward_hook(lambda part, args, kw, out: seen.append((part, args[0], kw["encoder_hidden_states"])), with_kwargs=True))
    unet(keep ** .5 * z + (1 - keep) ** .5 * noise, 100, encoder_hidden_states=states.expand(len(z), -1, -1))
    for hook in hooks: hook.remove()
    cross, own = [], []

    def grid_of(t):
        "(B, T, heads * d) on the patches' grid."
        side = int(t.shape[1] ** .5)
        return F.interpolate(t.mT.unflatten(-1, (side, side)), (20, 20), mode="bilinear").flatten(2).mT

    for part, tokens, words in seen:
        q, k = grid_of(part.to_q(tokens)), part.to_k(tokens if words is None else words)
        k = grid_of(k) if words is None else k
        q, k = (t.double().unflatten(-1, (part.heads, -1)).transpose(1, 2).numpy() for t in (q, k))
        A = softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** .5).mean(1)
        cross.append(A[..., at].mean(-1)) if words is not None else own.append(A)
    X, S = np.mean(cross, 0), np.mean(own, 0)
    wanted = np.einsum("bij,bj->bi", S, X)
    assert np.abs(rival_output(m, x, "DiffSegmenter", y)[1][y[:, c], c].numpy() - wanted).max() < 1e-5 and len(own) and len(cross)


def bytes_of(m):
    "A digest of all weights as they are now."
    found = hashlib.sha256()
    for part in (m.clip.model, m.sd.pipe.unet, m.sd.pipe.vae, m.sd.pipe.text_encoder):
        for _, w in sorted(part.state_dict().items()): found.update(w.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_leaves_the_models_as_they_were(m, x, name):
    before, weights, modules = m.clip.dense(x).patches, bytes_of(m), [n for part in (m.clip, m.sd.pipe.unet) for n in part.modules()]
    state = lambda: (sum(len(n._forward_hooks) for n in modules), [n.training for n in modules], [p.requires_grad for n in modules for p in n.parameters(False)])
    held, y = state(), multi_hot(SCENES[:2], 8)
    f, scores = rival_output(m, x, name, y)
    again = rival_output(m, x, name, y)
    assert f.shape == (2, 400, m.clip.embed_dim) and scores.shape == (2, 8, 400) and scores.isfinite().all()
    assert torch.equal(f, again[0]) and torch.equal(scores, again[1]), "no chance in it"
    refined, mean = (rival_output(m, x, name, y, attention=a)[1] for a in ("acr", "mean"))
    assert refined.shape == scores.shape and refined.isfinite().all()
    assert torch.allclose(mean, scores, atol=1e-5) != RIVALS[name].heads, "the mean over heads is another attention where heads differ"
    assert torch.equal(m.clip.dense(x).patches, before) and state() == held and bytes_of(m) == weights


def test_places(m, x):
    edit = Proxied(maskclip)
    plain = m.clip.dense(x, None, m.clip.depth, "surgery").patches
    assert torch.allclose(proxied_features(m.clip, x, edit, **place(m.clip, "map")), plain, atol=1e-5), "who looks at himself spreads nothing"
    for name in PLACES: assert proxied_features(m.clip, x, edit, **place(m.clip, name)).isfinite().all()
    with pytest.raises(ValueError, match="unknown place 'first': choose one of last, block"): place(m.clip, "first")


def test_what_is_refused(m, x):
    with pytest.raises(ValueError, match="unknown rival 'CLIP': choose one of MaskCLIP"): rival_output(m, x, "CLIP")
    with pytest.raises(ValueError, match="unknown switch 'width'"): rival_output(m, x, "SCLIP", width=3)
    with pytest.raises(ValueError, match="unknown attention 'ACR': choose one of own, mean, acr"): rival_output(m, x, "SCLIP", attention="ACR")


def test_answers_are_kept_in_a_folder(m, x, tmp_path):
    from diclip.rivals import Folder, Remembering
    calls, plain = [], rival_output(m, x, "CLIPer")[1]
    asked = m.sd.pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    for spread in (1, 2): rival_output(Remembering(m, Folder(tmp_path)), x, "CLIPer", spread=spread)
    once = len(calls)
    assert torch.equal(rival_output(Remembering(m, Folder(tmp_path)), x, "CLIPer")[1], plain) and len(calls) == once
    other = DiCLIP(m.clip, m.sd, replace(m.profile, timestep=m.profile.timestep + 1))
    rival_output(Remembering(other, Folder(tmp_path)), x, "CLIPer")
    asked.remove()
    assert len(calls) > once and len(list(tmp_path.iterdir())) == 2, "another setting is another question"


def test_a_cache_of_a_rivals_features(m):
    pool = {c: [s.image for s in SCENES[:2]] for c in m.profile.classes}
    cache = rival_cache(m, pool, "ClearCLIP", at="all")
    assert len(cache) == 16 and cache.meta["rival"] == "ClearCLIP" and cache.classes == m.profile.classes
    assert torch.equal(cache.keys, rival_cache(m, pool, "ClearCLIP", at="all").keys)
