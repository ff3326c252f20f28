"Segmentation heads: shapes, the published size, equivariance, refusals."
import pytest
import torch

from diclip.head import HEADS, ConvHead, LayerFusion, TransformerHead


def tokens(B=2, L=3, grid=(4, 5), dim=16): return torch.randn(B, L, grid[0] * grid[1], dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", HEADS)
def test_logits_have_the_grid_and_a_background(name):
    head = HEADS[name](16, 3, 4, width=32)
    out = head(tokens(), (4, 5))
    assert out.shape == (2, 5, 4, 5)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_transformer_head_has_the_size_of_the_published_decoder():
    assert sum(p.numel() for p in TransformerHead(768, 12, 20).parameters()) == 6_313_237


@pytest.mark.parametrize("name, act", [("gelu", torch.nn.functional.gelu), ("quickgelu", lambda x: x / (1 + torch.exp(-1.702 * x)))])
def test_transformer_head_is_the_published_decoder_in_plain_operations(name, act):
    "Perceptrons, mix, then per layer: x + attention(LN x), x + MLP(LN x); with QuickGELU these are the family's outputs."
    head, x = TransformerHead(16, 3, 4, width=32, heads=8, activation=name).double().eval(), tokens().double()
    w = dict(head.named_parameters())
    linear = lambda x, key: torch.einsum("...i,oi->...o", x, w[f"{key}.weight"].flatten(1)) + w[f"{key}.bias"]
    def norm(x, key):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{key}.weight"] + w[f"{key}.bias"]
    parts = [linear(linear(x[:, l], f"fusion.mlps.{l}.0").clamp_min(0), f"fusion.mlps.{l}.2") for l in range(3)]
    y = linear(torch.cat(parts, -1), "fusion.fuse")
    for l in range(3):
        at = f"decoder.layers.{l}"
        qkv = torch.einsum("bni,oi->bno", norm(y, f"{at}.norm1"), w[f"{at}.self_attn.in_proj_weight"]) + w[f"{at}.self_attn.in_proj_bias"]
        q, k, v = qkv.unflatten(-1, (3, 8, 4)).permute(2, 0, 3, 1, 4)
        A = torch.exp(q @ k.mT / 2)
        y = y + linear(((A / A.sum(-1, keepdim=True)) @ v).permute(0, 2, 1, 3).flatten(2), f"{at}.self_attn.out_proj")
        y = y + linear(act(linear(norm(y, f"{at}.norm2"), f"{at}.linear1")), f"{at}.linear2")
    expected = linear(y, "classify").mT.unflatten(2, (4, 5))
    with torch.no_grad(): torch.testing.assert_close(head(x, (4, 5)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_its_fusion_and_its_decoder(name):
    head, x = HEADS[name](16, 3, 4, width=32).eval(), tokens()
    with torch.no_grad(): assert torch.equal(head.decode(head.fusion(x, (4, 5))), head(x, (4, 5)))


def test_the_profiles_choose_the_activation():
    from types import SimpleNamespace
    from diclip.config import profile
    from diclip.head import ACTIVATIONS
    from diclip.train import new_head
    clip = SimpleNamespace(width=16, depth=3)
    for name, act in dict(mini="gelu", voc="quickgelu", coco="quickgelu").items():
        assert all(l.activation is ACTIVATIONS[act] for l in new_head(clip, profile(name, head_width=32)).decoder.layers)
    assert new_head(clip, profile("voc", head="conv", head_width=8)).classify.out_channels == 21


def test_transformer_head_knows_no_positions_of_its_own():
    head, x, p = TransformerHead(16, 3, 4, width=32).eval(), tokens(), torch.randperm(20)
    with torch.no_grad():
        torch.testing.assert_close(head(x[:, :, p], (4, 5)).flatten(2), head(x, (4, 5)).flatten(2)[:, :, p], atol=1e-5, rtol=1e-4)


def test_convolutional_head_moves_with_the_image():
    head, x = ConvHead(16, 3, 4, width=8, hidden=8, dilation=1).eval(), tokens(grid=(9, 9))
    with torch.no_grad():
        moved = head(x.unflatten(2, (9, 9)).roll(1, 3).flatten(2, 3), (9, 9))
        torch.testing.assert_close(moved[..., 3:-2], head(x, (9, 9)).roll(1, 3)[..., 3:-2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [dict(L=2), dict(dim=8), dict(grid=(4, 4))])
def test_tokens_of_another_clip_are_refused(wrong):
    with pytest.raises(ValueError, match="stack all layers"): LayerFusion(16, 3, 8)(tokens(**wrong), (4, 5))


def test_a_width_that_the_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="width of 63 is not shared by 8 heads"): HEADS["transformer"](32, 3, 4, width=63)
    HEADS["conv"](32, 3, 4, width=63)
