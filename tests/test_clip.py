"DenseCLIP equals open_clip where open_clip has an answer, and says clearly why where it refuses."
import copy, gzip, json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from fastcore.test import test_close as close
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diclip.clip import (READOUTS, ConvStem, DenseCLIP, WeightsError, attention_output, embed_image, load_clip, load_tokenizer, mini_clip,
                         mix_values, resize_positions, self_attention)
from diclip.engine.clip_weights import find_folder, folder_clip, hub_clip
from diclip.config import profile

MERGES = ["b o", "bo a", "boa t</w>", "b i", "r d</w>", "bi rd</w>"]
CONFIG = dict(model_cfg=dict(embed_dim=128, quick_gelu=True,
                             vision_cfg=dict(image_size=96, layers=6, width=128, head_width=64, patch_size=8),
                             text_cfg=dict(context_length=77, vocab_size=514 + len(MERGES), width=64, heads=2, layers=2)),
              preprocess_cfg=dict(mean=[.5, .5, .5], std=[.25, .25, .25]), stem=dict(widths=[24, 64]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A model folder with random weights, half precision, as the shipped one."
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    torch.manual_seed(0)
    model = mini_clip(CONFIG)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d): module.running_mean.normal_(); module.running_var.uniform_(.5, 2)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    (path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES]).encode(), mtime=0))
    return path


@pytest.fixture(scope="module")
def clip(folder): return load_clip(profile("mini", clip=str(folder)))


@pytest.fixture
def broken(folder, tmp_path):
    "A copy of the folder to damage."
    for f in folder.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    return tmp_path


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No network, and an empty cache."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def images(): return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def theirs(clip, x):
    with torch.no_grad(): return clip.model.encode_image(clip.normalize(x), normalize=True)


# ---- equality with open_clip

@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-16-quickgelu"])
def test_equals_open_clip_and_takes_any_grid(name):
    torch.manual_seed(0)
    clip = DenseCLIP(open_clip.create_model(name), open_clip.get_tokenizer(name), name=name)
    x = torch.rand(1, 3, 224, 224)
    out = clip.dense(x)
    assert out.patches.shape == (1, 196, 512) and out.grid == (14, 14) and clip.patch == 16
    close(out.cls, theirs(clip, x), eps=1e-5)
    with torch.no_grad():
        _, tokens = clip.visual._pool(clip.visual.transformer(clip.visual._embeds(clip.normalize(x))))
        close(out.patches, F.normalize(tokens @ clip.visual.proj, dim=-1), eps=1e-5)
    if name == "ViT-B-16":
        assert clip.dense(torch.rand(1, 3, 320, 320)).grid == (20, 20)
        assert clip.dense(torch.rand(1, 3, 96, 128)).patches.shape == (1, 48, 512)


def test_mini_equals_open_clip(clip, images): close(clip.dense(images).cls, theirs(clip, images), eps=1e-5)


def test_shipped_mini_equals_open_clip():
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    try: clip = load_clip(profile("mini"))
    except WeightsError: pytest.skip("the mini CLIP's weights are not in this checkout")
    close(clip.dense(images).cls, theirs(clip, images), eps=1e-5)
    assert clip.text(profile("mini").classes).shape == (8, clip.embed_dim)


def test_equals_open_clip_told_the_size_in_advance():
    "A 12x12 model on 20x8 is what open_clip makes of its weights when the config says 160x64."
    torch.manual_seed(0)
    a, config = mini_clip(CONFIG), copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"]["image_size"] = (160, 64)
    b, weights = mini_clip(config), a.state_dict()
    open_clip.model.resize_pos_embed(weights, b)
    b.load_state_dict(weights)
    clip, x = DenseCLIP(a, None), torch.rand(2, 3, 160, 64)
    with torch.no_grad(): close(clip.dense(x).cls, b.eval().encode_image(clip.normalize(x), normalize=True), eps=1e-5)


@pytest.mark.parametrize("extra", [dict(ls_init_value=.1), dict(no_ln_pre=True), dict(final_ln_after_pool=True), dict(mlp_ratio=2.), dict(pos_embed_type="sin_cos_2d"),
                                   dict(patch_dropout=.5), dict(image_size=[64, 96])])
def test_variants_of_open_clip(extra):
    "Layer scale, no first layer norm, pooling before the last one, patch dropout: whatever a config may ask of a plain ViT."
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"].update(layers=2, **extra)
    clip = DenseCLIP(mini_clip(config), None)
    x = torch.rand(2, 3, *clip.visual.image_size)
    close(clip.dense(x).cls, theirs(clip, x), eps=1e-5)


def test_batch_first_or_not(clip, images):
    "The blocks' own layout flag does not matter: attention is written out by hand."
    other = copy.deepcopy(clip)
    other.visual.transformer.batch_first = False
    for block in other.blocks: block.attn.batch_first = False
    close(other.dense(images).cls, theirs(other, images), eps=1e-5)
    close(other.dense(images).patches, clip.dense(images).patches, eps=1e-6)


def test_images_are_independent(clip, images):
    close(clip.dense(images).patches[1:], clip.dense(images[1:]).patches, eps=1e-5)


def test_leaves_the_model_as_it_was(folder, images):
    model = folder_clip(folder)["model"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    DenseCLIP(model, None).train().dense(images, edit=lambda A: A.mul_(0), layers=3, keep=("attention", "tokens"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, clip, images, dtype):
    half = load_clip(profile("mini", clip=str(folder)), dtype=dtype)
    out, full = half.dense(images), clip.dense(images)
    assert out.patches.dtype == torch.float32 and half.fingerprint == clip.fingerprint
    assert (out.patches * full.patches).sum(-1).min() > .99
    assert (half.text(["boat"]) * clip.text(["boat"])).sum() > .99


# ---- attention, edits, readouts

def test_kept_attention_and_tokens(clip, images):
    out = clip.dense(images, keep=("attention", "tokens"))
    assert len(out.attention) == len(out.tokens) == 6
    assert out.attention[0].shape == (2, 2, 145, 145) and out.tokens[0].shape == (2, 145, 128)
    close(torch.stack(out.attention).sum(-1), torch.ones(6, 2, 2, 145), eps=1e-5)
    close(clip.project(out.tokens[-1])[:, 1:], out.patches, eps=1e-6)
    assert clip.dense(images).attention == []


def test_attention_is_torch_attention(clip, images):
    "The same maps as nn.MultiheadAttention gives when asked."
    block = clip.blocks[0]
    with torch.no_grad():
        h, _ = embed_image(clip.visual, clip.normalize(images))
        out, A = block.attn(*[block.ln_1(h)] * 3, average_attn_weights=False)
        mine, v = self_attention(block, h)
        close(mine, A, eps=1e-5)
        close(mix_values(block, mine, v), out, eps=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("layers", [1, 3, 6])
def test_identity_edit_changes_nothing(clip, images, readout, layers):
    a, b = [clip.dense(images, edit=e, layers=layers, readout=readout) for e in (None, lambda A: A)]
    close(a.patches, b.patches, eps=1e-5)
    close(a.cls, b.cls, eps=1e-5)


def uniform(A): return torch.full_like(A, 1 / A.shape[-1])


def test_readouts_differ(clip, images):
    for edit in (None, uniform):
        out = {r: clip.dense(images, edit=edit, layers=3, readout=r).patches for r in READOUTS}
        same = {frozenset((a, b)) for a in out for b in out if a < b and (out[a] - out[b]).abs().max() < 1e-4}
        assert same == ({frozenset(("last", "progressive"))} if edit is None else set())


def test_readouts_by_hand(clip, images):
    "The table of the notebook, written without the loop."
    keep = clip.dense(images, keep=("tokens", "attention"))
    before = [None, *keep.tokens]
    outs = []
    with torch.no_grad():
        for i in (3, 4, 5): outs.append(mix_values(clip.blocks[i], uniform(keep.attention[i]), self_attention(clip.blocks[i], before[i])[1]))
        want = dict(surgery=sum(outs), dual=before[3] + sum(outs), last=outs[-1])
        for r, z in want.items(): close(clip.dense(images, edit=uniform, layers=3, readout=r).patches, clip.project(z[:, 1:]), eps=1e-5)


def test_raw_path_runs_on(clip, images):
    raw = clip.dense(images, keep=("tokens",))
    for r in ("dual", "surgery", "last"):
        out = clip.dense(images, edit=uniform, layers=3, readout=r, keep=("tokens",))
        close(out.cls, raw.cls, eps=1e-5)
        for a, b in zip(out.tokens, raw.tokens): close(a, b, eps=1e-5)
    out = clip.dense(images, edit=uniform, layers=3, keep=("tokens",))
    assert torch.equal(out.tokens[2], raw.tokens[2]) and not torch.allclose(out.tokens[3], raw.tokens[3])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("layers", range(1, 7))
def test_one_pass_gives_what_two_give(clip, images, readout, layers):
    """Features of the edited layers and what plain CLIP keeps, every readout, every number of layers."""
    features = clip.dense(images, uniform, layers, readout).patches
    for keep in (("tokens",), ("attention",), ("tokens", "attention")):
        one, plain = clip.dense(images, uniform, layers, readout, keep, raw=True), clip.dense(images, keep=keep)
        close(one.patches, features, eps=1e-5)
        assert len(one.tokens) == len(plain.tokens) and len(one.attention) == len(plain.attention)
        for a, b in zip(one.tokens + one.attention, plain.tokens + plain.attention): close(a, b, eps=1e-5)


@pytest.mark.parametrize("readout, layers, blocks", [("surgery", 6, 6), ("last", 3, 6), ("progressive", 2, 8), ("inplace", 6, 12)])
def test_one_pass_runs_shared_layers_once(clip, images, readout, layers, blocks):
    ran = []
    spies = [b.mlp.register_forward_hook(lambda *a: ran.append(1)) for b in clip.blocks]
    clip.dense(images, uniform, layers, readout, keep=("tokens",), raw=True)
    for spy in spies: spy.remove()
    assert len(ran) == blocks


def test_the_map_is_made_where_it_is_read_only(clip, images, monkeypatch):
    import diclip.clip as module
    made, true = [], module.self_attention
    monkeypatch.setattr(module, "self_attention", lambda block, x: made.append(block) or true(block, x))
    where = lambda **how: (made.clear(), clip.dense(images, **how), [[b is block for b in clip.blocks].index(True) for block in made])[2]
    assert where() == [] and where(keep=("tokens",)) == []
    assert where(keep=("attention",)) == list(range(6))
    for r in READOUTS: assert where(edit=uniform, layers=2, readout=r) == ([5] if r == "last" else [4, 5])


def test_fused_attention_is_the_written_one(clip, images):
    """Softmax of scaled products, head by head, from the block's own matrices."""
    block, d = clip.blocks[2], 64
    with torch.no_grad():
        x = torch.randn(2, 20, 128, generator=torch.Generator().manual_seed(0))
        W, b, y = block.attn.in_proj_weight, block.attn.in_proj_bias, block.ln_1(x)
        q, k, v = [y @ W[i * 128:(i + 1) * 128].T + b[i * 128:(i + 1) * 128] for i in range(3)]
        heads = [torch.softmax(q[..., s] @ k[..., s].mT / 8, -1) @ v[..., s] for s in (slice(0, d), slice(d, 2 * d))]
        close(attention_output(block, x), block.attn.out_proj(torch.cat(heads, -1)), eps=1e-5)


def test_edit_acts_in_the_last_layers_only(clip, images):
    calls = []
    clip.dense(images, edit=lambda A: calls.append(A.shape) or A, layers=2)
    assert calls == [(2, 2, 145, 145)] * 2


def test_edit_in_place_does_not_leak(clip, images):
    raw = clip.dense(images, keep=("attention",)).attention[-1]
    assert torch.equal(clip.dense(images, edit=lambda A: A.zero_(), layers=1, keep=("attention",)).attention[-1], raw)


# ---- positions and stem

def test_positions():
    P = torch.randn(1 + 12 * 12, 7)
    assert torch.equal(resize_positions(P, (12, 12), (12, 12)), P)
    assert resize_positions(P, (12, 12), (5, 9)).shape == (46, 7)
    assert torch.equal(resize_positions(P, (12, 12), (5, 9))[0], P[0])
    turned = torch.cat([P[:1], P[1:].reshape(12, 12, 7).transpose(0, 1).reshape(144, 7)])
    close(resize_positions(turned, (12, 12), (9, 5))[1:].reshape(9, 5, 7), resize_positions(P, (12, 12), (5, 9))[1:].reshape(5, 9, 7).transpose(0, 1), eps=1e-5)


def test_stem():
    assert ConvStem((16,), 32, 4)(torch.rand(2, 3, 20, 36)).shape == (2, 32, 5, 9)
    with pytest.raises(ValueError, match="log2"): ConvStem((24, 64), 128, 16)


# ---- text

def test_text_ensemble(clip):
    names, templates = ["boat", "a white bird"], ["a photo of a {}.", "{}", "a clean origami {}."]
    T = clip.text(names, templates)
    assert T.shape == (2, 128)
    close(T.norm(dim=-1), torch.ones(2), eps=1e-5)
    with torch.no_grad(): E = torch.stack([clip.model.encode_text(clip.tokenizer([t.format(n) for n in names]), normalize=True) for t in templates])
    close(T, F.normalize(E.mean(0), dim=-1), eps=1e-5)
    close(clip.text(names[::-1], templates), T.flip(0), eps=1e-5)
    close(clip.text(names, templates[::-1]), T, eps=1e-5)
    assert clip.templates == profile("mini").templates


@pytest.mark.parametrize("names, templates", [([], None), ("boat", None), (["boat", ""], None), ([1], None), (["boat"], []), (["boat"], "a {}")])
def test_text_refuses(clip, names, templates):
    with pytest.raises(ValueError, match="one or more words"): clip.text(names, templates)


def test_template_without_a_gap(clip):
    with pytest.raises(ValueError, match="where the class name goes"): clip.text(["boat"], ["a photo"])


# ---- wrong images and switches

@pytest.mark.parametrize("x, message", [
    (torch.full((1, 3, 96, 96), float("nan")), "NaN"),
    (torch.full((1, 3, 96, 96), float("inf")), "NaN or infinity"),
    (torch.rand(1, 3, 90, 96), "multiple of 8: resize, e.g. to 88x96"),
    (torch.rand(1, 3, 2, 96), "8x96"),
    (torch.rand(1, 1, 96, 96), "RGB tensor"), (torch.rand(1, 96, 96, 3), "permute"), (torch.rand(3, 96, 96), "batch dimension"),
    (torch.rand(0, 3, 96, 96), "RGB tensor"), ([1, 2], "not list"),
    (torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "float\\(\\) / 255"),
    (torch.rand(1, 3, 96, 96) * 255, "in \\[0, 1\\]"), (torch.randn(1, 3, 96, 96) * 2, "normalize them themselves"),
])
def test_wrong_images(clip, x, message):
    with pytest.raises(ValueError, match=message): clip.dense(x)


@pytest.mark.parametrize("switches, message", [
    (dict(readout="best"), "choose one of inplace"), (dict(layers=7), "6 blocks"), (dict(layers=-1), "choose 0 to 6"),
    (dict(edit=lambda A: A), "layers=3"), (dict(readout="surgery"), "layers >= 1"), (dict(keep="tokens"), "tuple"), (dict(keep=("maps",)), "tuple"),
    (dict(edit=lambda A: A[:, :, 1:, 1:], layers=1), "class token"), (dict(edit=lambda A: A / 0, layers=1), "divided by zero"),
])
def test_wrong_switches(clip, images, switches, message):
    with pytest.raises(ValueError, match=message): clip.dense(images, **switches)


def test_not_a_plain_vit():
    with pytest.raises(ValueError, match="plain ViT"): DenseCLIP(SimpleNamespace(visual=torch.nn.Linear(2, 2)), None)
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"].update(pool_type="avg")
    with pytest.raises(ValueError, match="class token"): DenseCLIP(mini_clip(config), None)


def test_frozen(clip):
    assert not clip.train().training and not clip.visual.training
    assert not any(p.requires_grad for p in clip.parameters())
    assert len(clip.state_dict()) == len(clip.model.state_dict())


# ---- loading

def test_folder_round_trip(clip, folder):
    weights = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(clip.model.state_dict()[k], w.to(clip.model.state_dict()[k].dtype)) for k, w in weights.items())
    assert clip.name == "tiny" and clip.mean == (.5, .5, .5)
    assert clip.tokenizer(["boat"])[0, 1] == clip.tokenizer.encoder["boat</w>"]


def test_fingerprint_names_the_weights(clip, broken):
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1
    save_file(weights, broken / "open_clip_model.safetensors")
    other = load_clip(profile("mini", clip=str(broken)))
    assert other.fingerprint.split("-")[-1] != clip.fingerprint.split("-")[-1] and clip.fingerprint.startswith("tiny-")


def damage(name, how):
    def run(folder): (folder / name).write_bytes(how((folder / name).read_bytes()))
    return run


WEIGHTS = "open_clip_model.safetensors"
DAMAGES = {
    "truncated": (damage(WEIGHTS, lambda b: b[:-100]), "damaged"),
    "cut in the header": (damage(WEIGHTS, lambda b: b[:50]), "damaged"),
    "empty file": (damage(WEIGHTS, lambda b: b""), "damaged"),
    "garbage": (damage(WEIGHTS, lambda b: b"\x80\x04 not a model " * 99), "damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no open_clip_model.safetensors: copy it"),
    "pickle only": (lambda f: (f / WEIGHTS).rename(f / "open_clip_pytorch_model.bin"), "never read here"),
    "no config": (lambda f: (f / "open_clip_config.json").unlink(), "has no open_clip_config.json"),
    "config is not JSON": (damage("open_clip_config.json", lambda b: b[:40]), "not a CLIP config"),
    "config of something else": (damage("open_clip_config.json", lambda b: b"{}"), "not a CLIP config"),
    "config of another width": (damage("open_clip_config.json", lambda b: b.replace(b'"width": 128', b'"width": 192')), "does not fit its config"),
    "broken merges": (damage("bpe.txt.gz", lambda b: b[:-9]), "bpe.txt.gz is missing or damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folder(broken, case):
    hurt, message = DAMAGES[case]
    hurt(broken)
    with pytest.raises(WeightsError, match=message): load_clip(profile("mini", clip=str(broken)))


def test_wrong_vocabulary(broken):
    damage("bpe.txt.gz", lambda b: gzip.compress(b"#version: 0.2\na b"))(broken)
    with pytest.raises(ValueError, match="the merges it was trained with"): load_clip(profile("mini", clip=str(broken)))
    with pytest.raises(WeightsError, match="missing or damaged"): load_tokenizer(broken / "none.gz", CONFIG)


def test_pickles_are_never_loaded(broken, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    (broken / WEIGHTS).rename(broken / "model.pth")
    with pytest.raises(WeightsError): folder_clip(broken)


def test_no_such_folder():
    with pytest.raises(WeightsError, match="neither an open_clip model nor a folder"): find_folder("weights/nothing_here")


def test_offline_without_weights(offline):
    with pytest.raises(WeightsError, match="about 600 MB.*hf download timm/vit_base_patch16_clip_224.openai open_clip_model.safetensors") as e: load_clip(profile("voc"))
    assert isinstance(e.value, OSError) and "\n" not in str(e.value)


def test_wrong_pairs_of_model_and_weights(offline):
    with pytest.raises(ValueError, match="choose ViT-B-16-quickgelu"): hub_clip("ViT-B-16", "openai")
    with pytest.raises(ValueError, match="give a .safetensors file"): hub_clip("ViT-B-16-quickgelu", "mine")
    with pytest.raises(ValueError, match="give a .safetensors file"): hub_clip("ViT-B-16-quickgelu", None)
    with pytest.raises(ValueError, match="not a plain ViT CLIP"): hub_clip("ViT-B-16-SigLIP", "webli")
