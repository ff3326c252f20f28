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
