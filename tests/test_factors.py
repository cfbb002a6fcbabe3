"""The channel split, the encoders and the paraphraser, against the numbers of the papers."""

import math

import pytest
import torch
from conftest import same
from torch import nn

from iekd_hf import (
    ChannelSplit,
    CifarResNetConfig,
    CifarResNetForImageClassification,
    FactorEncoder,
    Paraphraser,
)


@pytest.mark.parametrize(
    "channels, ratio, inherits", [(64, 0.5, 32), (7, 0.5, 4), (9, 0.01, 1), (9, 0.99, 8), (5, 0, 0), (5, 1, 5)]
)
def test_split_is_a_partition(channels, ratio, inherits):
    split = ChannelSplit(channels, ratio, seed=3)
    assert len(split.inheritance_indices) == inherits
    together = torch.cat([split.inheritance_indices, split.exploration_indices])
    assert together.sort().values.tolist() == list(range(channels))
    feature_map = torch.randn(2, channels, 3, 5)
    f_inh, f_exp = split(feature_map)
    assert torch.equal(f_inh, feature_map[:, split.inheritance_indices])
    assert torch.equal(f_exp, feature_map[:, split.exploration_indices])


def test_split_is_state_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = ChannelSplit(64), ChannelSplit(64), ChannelSplit(64, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first.state_dict(), again.state_dict()) and not same(first.state_dict(), other.state_dict())
    other.load_state_dict(first.state_dict())
    assert same(first.state_dict(), other.state_dict())
    natural = ChannelSplit(6, 0.5, mode="natural")
    assert natural.inheritance_indices.tolist() == [0, 1, 2]


def test_a_linear_decoder_reaches_negative_values_as_positive_ones():
    """The last thing that it does is BatchNorm; it has the same weights."""
    linear, conv = Paraphraser(8, 4, decoder="linear"), Paraphraser(8, 4)
    linear.load_state_dict(conv.state_dict())
    f_T = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(nn.functional.leaky_relu(linear.eval()(f_T), 0.1), conv.eval()(f_T))
    assert isinstance(linear.decoder[-1], nn.BatchNorm2d)


def test_smaller_convolutions_have_a_ninth_of_the_weights():
    """Weights ~ N(0, sqrt(2 / (k^2 C_out))); a 1x1 encoder sees one position at a time."""
    torch.manual_seed(0)
    for module in (Paraphraser(64, 32, kernel_size=1), FactorEncoder(64, 32, kernel_size=1)):
        convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        for convolution in convolutions:
            assert (convolution.kernel_size, convolution.padding) == ((1, 1), (0, 0))
            std = math.sqrt(2 / convolution.out_channels)
            assert convolution.weight.std().item() == pytest.approx(std, rel=0.1)
    f_S = torch.randn(1, 64, 5, 7)
    encoder = FactorEncoder(64, 32, kernel_size=1).eval()
    torch.testing.assert_close(encoder(f_S)[..., 2:3, 4:5], encoder(f_S[..., 2:3, 4:5]))


def test_the_authors_autoencoder():
    """129,600 parameters at 64 -> 32; LeakyReLU first, no bias, weights ~ N(0, sqrt(2 / (9 C_out)))."""
    torch.manual_seed(0)
    paraphraser = Paraphraser(64, 32)
    assert sum(p.numel() for p in paraphraser.parameters()) == 129_600
    assert sum(p.numel() for p in paraphraser.encoder.parameters()) == 64_768
    block = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    for coder, widths in ((paraphraser.encoder, [64, 64, 32, 32]), (paraphraser.decoder, [32, 32, 64, 64])):
        assert [type(layer) for layer in coder] == [nn.LeakyReLU, *block * 3]
        convolutions = [layer for layer in coder if isinstance(layer, nn.Conv2d)]
        assert [c.in_channels for c in convolutions] + [convolutions[-1].out_channels] == widths
        for convolution in convolutions:
            assert convolution.bias is None
            assert (convolution.kernel_size, convolution.stride, convolution.padding) == ((3, 3), (1, 1), (1, 1))
            std = math.sqrt(2 / (9 * convolution.out_channels))
            assert convolution.weight.std().item() == pytest.approx(std, rel=0.05)
        assert all(layer.negative_slope == 0.1 for layer in coder if isinstance(layer, nn.LeakyReLU))
    f_T = torch.randn(2, 64, 5, 7)
    assert paraphraser.encode(f_T).shape == (2, 32, 5, 7) and paraphraser(f_T).shape == f_T.shape
    assert [p.shape for p in FactorEncoder(64, 32).parameters()] == [p.shape for p in paraphraser.encoder.parameters()]


def test_transposed_decoder():
    paraphraser = Paraphraser(8, 4, decoder="transposed")
    assert [type(m) for m in paraphraser.decoder if hasattr(m, "kernel_size")] == [nn.ConvTranspose2d] * 3
    assert paraphraser(torch.randn(2, 8, 5, 7)).shape == (2, 8, 5, 7)
    with pytest.raises(ValueError, match="conv, transposed, linear; got 'mlp'"):
        Paraphraser(8, 4, decoder="mlp")


def test_paraphraser_is_saved_in_safetensors_and_comes_back_frozen(tmp_path):
    paraphraser = Paraphraser(8, 4, decoder="transposed")
    paraphraser(torch.randn(4, 8, 6, 6))  # moves the BatchNorm statistics, which must travel too
    paraphraser.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    loaded = Paraphraser.from_pretrained(tmp_path)
    assert not loaded.training
    assert same(loaded.state_dict(), paraphraser.state_dict())
    assert (loaded.in_channels, loaded.factor_channels) == (8, 4)
    (tmp_path / "model.safetensors").unlink()
    torch.save(paraphraser.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"got no model\.safetensors"):
        Paraphraser.from_pretrained(tmp_path)


@pytest.mark.parametrize("depth, parameters", [(20, 272_474), (32, 466_906), (56, 855_770), (110, 1_730_714)])
def test_cifar_resnets_have_the_literatures_sizes(depth, parameters):
    model = CifarResNetForImageClassification(CifarResNetConfig.from_depth(depth, num_labels=10))
    assert model.num_parameters() == parameters
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == depth
    assert model.resnet(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 64, 8, 8)


def test_cifar_resnet_depths():
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        CifarResNetConfig.from_depth(18)
