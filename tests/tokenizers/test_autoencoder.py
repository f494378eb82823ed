"""What trained tokenizers share: codebooks in use, an adversary weighed as the papers define it; and their losses."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from multidiff_autoencoder.adversary import (
    Balancer,
    adaptive_weight,
    adversarial_loss,
    feature_matching,
    frozen,
    hinge_loss,
)
from multidiff_autoencoder.codebook import Codebook, usage
from multidiff_vq.losses import PatchDiscriminator, PerceptualLoss, gradient_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_code_out_of_use_moves_to_a_latent_and_the_others_follow_the_mean_of_theirs():
    latents_ND = random(64, 4)
    book = Codebook(torch.zeros(8, 4), torch.zeros(8), torch.zeros(8, 4))
    assert not book.started
    book.start(latents_ND, torch.Generator().manual_seed(0))
    assert book.started
    book.codes_VD[3] = 1e3
    book.count_V[3] = 0
    book.sum_VD[3] = 0
    before_VD = book.codes_VD.clone()
    book.follow(latents_ND, 0.0, 0.01, torch.Generator().manual_seed(0))
    assert (latents_ND == book.codes_VD[3]).all(1).any()
    nearest_N = (latents_ND[:, None] - before_VD).square().sum(-1).argmin(1)
    for code in set(nearest_N.tolist()):
        torch.testing.assert_close(book.codes_VD[code], latents_ND[nearest_N == code].mean(0))


def test_usage_and_perplexity_of_counts():
    used, perplexity = usage(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    assert (float(used), float(perplexity)) == (0.5, pytest.approx(2.0))
    assert float(usage(torch.tensor([10.0, 10.0, 0.01, 10.0]), above=0.1)[0]) == 0.75


def test_hinges_of_an_undecided_discriminator_and_of_a_sure_one():
    zero, sure = torch.zeros(2, 1, 4), torch.full((2, 1, 3), 3.0)
    assert float(hinge_loss([zero, zero], [zero, zero])) == 2.0
    assert float(hinge_loss([sure], [-sure])) == 0.0
    assert float(adversarial_loss([sure, -sure])) == 0.0
    assert float(adversarial_loss([-sure])) == 3.0
    assert float(feature_matching([[sure], [sure]], [[sure * 2], [sure]])) == 0.5


def test_the_adaptive_weight_makes_both_pull_equally_hard():
    last = nn.Linear(3, 5)
    output = last(random(7, 3))
    one, other = output.square().mean(), -(output @ random(5, 1)).mean()
    weight = adaptive_weight(one, other, last.weight)
    pulls = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (one, weight * other)]
    torch.testing.assert_close(*pulls, rtol=1e-4, atol=0)


def test_a_frozen_module_sends_its_gradient_on_but_keeps_none():
    module, signal = nn.Linear(3, 1), random(2, 3).requires_grad_()
    with frozen(module):
        module(signal).sum().backward()
    assert module.weight.grad is None
    torch.testing.assert_close(signal.grad, module.weight.expand(2, 3))
    assert module.weight.requires_grad


def test_the_balancer_gives_each_loss_its_share_whatever_its_scale():
    balancer = Balancer({"one": 3.0, "other": 1.0, "absent": 5.0}, decay=0.5)
    norms = {"one": [], "other": []}
    for step in range(3):
        output = random(4, 2, 6, seed=step).requires_grad_()
        losses = {
            "one": 1e4 * output.square().mean(),
            "other": 1e-4 * (output * random(2, 6, seed=9)).sum() / (step + 1),
        }
        (found,) = torch.autograd.grad(balancer(losses, output), output, retain_graph=True)
        expected = torch.zeros_like(output)
        for name, share in (("one", 0.75), ("other", 0.25)):
            (gradient,) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norms[name].append(gradient.flatten(1).norm(dim=1).mean())
            # The moving average written out: weights ½, ¼ … of the latest first, made to add up to 1.
            weights = [0.5 ** (1 + age) for age in range(step + 1)]
            average = sum(w * n for w, n in zip(weights, reversed(norms[name]), strict=True)) / sum(weights)
            expected += share * gradient / average
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_gradient_loss_is_blind_to_brightness_and_counts_each_edge():
    signal_BCHW = random(2, 3, 8, 8)
    assert float(gradient_loss(signal_BCHW + 0.3, signal_BCHW)) < 1e-6
    edge = torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1.0
    # One of 7, 3 and 1 differences across is 1, at each of three scales; none down.
    assert float(gradient_loss(edge, torch.zeros_like(edge))) == pytest.approx((1 / 7 + 1 / 3 + 1) / 3)
    assert float(gradient_loss(signal_BCHW[..., :1, :1], signal_BCHW[..., 1:2, 1:2])) == 0.0


@pytest.mark.parametrize("side", [16, 32, 50])
def test_a_discriminator_scores_patches(side):
    scores = PatchDiscriminator(3, width=8)(random(2, 3, side, side))
    assert scores.shape[:2] == (2, 1)
    assert scores[0].numel() > 1


def test_a_perceptual_loss_reads_its_backbone_from_a_file_and_nothing_else(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_layers(cfgs["D"], batch_norm=False)
    state = {f"features.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "vgg.safetensors")
    torch.save(state, tmp_path / "vgg.pth")
    one, other = random(2, 1, 16, 16).clamp(-1, 1), random(2, 1, 16, 16, seed=1).clamp(-1, 1)
    losses = [PerceptualLoss(str(tmp_path / name)) for name in ("vgg.safetensors", "vgg.pth")]
    assert float(losses[0](one, one)) == 0.0
    assert not losses[0].state_dict()
    assert not list(losses[0].parameters())
    assert float(losses[0](one, other)) == float(losses[1](one, other)) > 0

    # The definition, layer by layer.
    deviation, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    features = [((x.repeat(1, 3, 1, 1) + 1) / 2 - mean[:, None, None]) / deviation[:, None, None] for x in (one, other)]
    parts = []
    with torch.no_grad():
        for layer in model[:23]:
            features = [layer(x) for x in features]
            if layer in (model[3], model[8], model[15], model[22]):
                unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in features]
                parts.append((unit[0] - unit[1]).square().sum(1).mean())
    torch.testing.assert_close(losses[0](one, other), torch.stack(parts).mean())

    (tmp_path / "cut.pth").write_bytes((tmp_path / "vgg.pth").read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"run": print}, tmp_path / "code.pth")
    for name, words in {
        "cut.pth": "cannot be read", "cut.safetensors": "cannot be read", "other.pth": "is not torchvision's VGG-16",
        "code.pth": "not loaded", "none.pth": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            PerceptualLoss(str(tmp_path / name))
