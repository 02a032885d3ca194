"""The backbone and the EMA unit: against recorded values, against plain
references, and by their properties.

    python -m pytest tests/test_network.py
"""
import copy
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import network
from lib.folding import fold_batch_norm
from lib.pretrained import load_backbone
from tools.bench import count_saved_bytes

COMBINATIONS = list(itertools.product(network.KEEPS, network.NORMS,
                                      (False, True)))


def unit(c=6, k=3, **words):
    torch.manual_seed(0)
    return network.EMAU(c, k, **words).double()


def plain_em(x, mu, stages, norm):
    """EM as the paper writes it, one image, in numpy: x (c, n), mu (c, k)."""
    (c, n), k = x.shape, mu.shape[1]
    for _ in range(stages):
        z = np.zeros((n, k))
        for i in range(n):
            e = np.exp([x[:, i] @ mu[:, j] for j in range(k)])
            z[i] = e / e.sum()
        new = np.zeros((c, k))
        for j in range(k):
            weight = z[:, j] / (1e-6 + z[:, j].sum())
            new[:, j] = sum(weight[i] * x[:, i] for i in range(n))
            if norm == 'l2':
                new[:, j] /= 1e-6 + math.sqrt((new[:, j] ** 2).sum())
            if norm == 'layer':
                new[:, j] = (new[:, j] - new[:, j].mean()) / math.sqrt(
                    new[:, j].var() + 1e-5)
        mu = new
    return z, mu


# ------------------------------------------------- EMA unit
def test_emau_agrees_with_the_recorded_unit(shared):
    recorded = np.load(os.path.join(shared, 'vectors', 'emau.npz'))
    want = {key: torch.from_numpy(recorded[key]) for key in recorded}
    emau = network.EMAU(32, 8)
    network.set_bn_momentum(emau, 3e-4)
    emau.load_state_dict({key[2:]: value for key, value in want.items()
                          if key.startswith('w:')})
    bases = []
    emau.update_bases = lambda mu: (
        bases.append(mu), network.EMAU.update_bases(emau, mu))
    x = want['x'].clone().requires_grad_()

    def same(got, name):
        scale = want[name].abs().max()
        assert (got - want[name]).abs().max() < 1e-5 * scale, name
    y = emau(x)
    y.square().mean().backward()
    same(y, 'train_y')
    same(bases[0], 'train_mu')
    same(x.grad, 'train_grad_x')
    same(emau.conv2[0].weight.grad, 'train_grad_conv2')
    same(emau.mu, 'buffer_after')
    emau.eval()
    same(emau(want['x']), 'eval_y')
    start = emau.mu.expand(2, -1, -1)
    *_, (_, mu) = emau.em(emau.conv1(want['x']).flatten(2), start)
    same(mu, 'eval_mu')


@pytest.mark.parametrize('norm', network.NORMS)
@pytest.mark.parametrize('stages', (1, 2, 5))
def test_em_agrees_with_plain_loops(norm, stages):
    emau = unit(stage_num=stages, norm=norm)
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    seen = list(emau.em(x, emau.mu.expand(2, -1, -1)))
    assert len(seen) == stages
    for i in range(2):
        z, mu = plain_em(x[i].numpy(), emau.mu[0].numpy(), stages, norm)
        np.testing.assert_allclose(seen[-1][0][i], z, rtol=1e-9)
        np.testing.assert_allclose(seen[-1][1][i], mu, rtol=1e-9)


def test_em_properties():
    emau = unit(c=16, k=5)
    x = torch.randn(3, 16, 20, dtype=torch.float64)
    mu = emau.mu.expand(3, -1, -1)
    shuffle = torch.randperm(20)
    for (z, bases), (z2, bases2) in zip(emau.em(x, mu),
                                        emau.em(x[..., shuffle], mu)):
        torch.testing.assert_close(z.sum(2), torch.ones_like(z[..., 0]))
        length = bases.norm(dim=1)
        torch.testing.assert_close(length, torch.ones_like(length),
                                   atol=1e-4, rtol=0)
        torch.testing.assert_close(z[:, shuffle], z2)
        torch.testing.assert_close(bases, bases2)


def test_a_batch_equals_its_singles():
    emau = unit().eval()
    x = torch.randn(4, 6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(emau(x), torch.cat([emau(y[None])
                                                   for y in x]))


def test_bases_are_drawn_with_length_one():
    mu = network.EMAU(512, 64).mu
    assert mu.shape == (1, 512, 64)
    torch.testing.assert_close(mu.norm(dim=1), torch.ones(1, 64))


def test_moving_average_by_hand():
    emau = unit(c=2, k=1)
    emau.mu.copy_(torch.tensor([[[1.0], [0.0]]]))
    emau.update_bases(torch.tensor([[[0.0], [1.0]], [[0.0], [3.0]]]))
    torch.testing.assert_close(emau.mu.flatten().float(),
                               torch.tensor([0.9, 0.2]))


def test_the_unit_moves_its_bases_in_training_alone():
    emau = unit()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    before = emau.mu.clone()
    emau.eval()(x)
    assert torch.equal(emau.mu, before)
    y = emau.conv1(x).flatten(2)
    *_, (_, mu) = emau.em(y, before.expand(2, -1, -1))
    emau.train()(x)
    torch.testing.assert_close(emau.mu,
                               0.9 * before + 0.1 * mu.mean(0, keepdim=True))


@pytest.mark.parametrize('keep, norm, grad', COMBINATIONS)
def test_every_combination_moves_what_it_should(keep, norm, grad):
    emau = unit(keep=keep, norm=norm, grad=grad)
    before = {key: value.clone() for key, value in emau.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in emau.parameters() if p.requires_grad], 0.1)
    loss = emau(torch.randn(2, 6, 4, 4, dtype=torch.float64)).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = {key for key, value in emau.state_dict().items()
             if not torch.equal(value, before[key])}
    want = {key for key in before if key.startswith('conv2')}
    if keep != 'fixed':
        want.add('mu')
    if grad or keep == 'learned':
        want |= {'conv1.weight', 'conv1.bias'}
    assert moved == want
    assert all(value.isfinite().all() for value in emau.state_dict().values())


@pytest.mark.parametrize('keep, free', (('moving_avg', 1), ('learned', 3)))
def test_how_many_iterations_are_differentiated(keep, free):
    """Against autograd through a plain unrolling of the last `free`."""
    emau = unit(keep=keep, grad=keep == 'moving_avg')
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    start = emau.mu.expand(2, -1, -1)
    *_, (z, mu) = emau.em(x, start)
    got, = torch.autograd.grad((mu @ z.mT).square().sum(), x)

    y, mu = x.detach(), start
    for stage in range(3):
        if stage == 3 - free:
            y = x
        z = F.softmax(y.mT @ mu, 2)
        mu = y @ (z / (1e-6 + z.sum(1, keepdim=True)))
        mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
    want, = torch.autograd.grad((mu @ z.mT).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_as_released_no_gradient_reaches_the_first_convolution():
    emau = unit()
    assert not any(p.requires_grad for p in emau.conv1.parameters())
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    assert all(not z.requires_grad and not mu.requires_grad
               for z, mu in emau.em(emau.conv1(x).flatten(2), emau.mu))


def test_iterations_of_training_and_of_evaluation():
    emau = unit(stage_num=2, stage_num_eval=5)
    x, mu = torch.randn(1, 6, 9, dtype=torch.float64), emau.mu
    assert len(list(emau.em(x, mu))) == 2
    assert len(list(emau.eval().em(x, mu))) == 5
    assert len(list(unit(stage_num=4).eval().em(x, mu))) == 4


def test_em_runs_in_float32_under_autocast():
    emau = network.EMAU(6, 3)
    seen = []
    inner = emau.em

    def em(x, start, stage_num):
        for z, mu in inner(x, start, stage_num):
            seen.extend([x.dtype, z.dtype, mu.dtype])
            yield z, mu
    emau.em = em
    with torch.autocast('cpu', torch.bfloat16):
        emau(torch.randn(2, 6, 4, 4))
    assert set(seen) == {torch.float32}
    seen.clear()
    emau.double()(torch.randn(2, 6, 4, 4, dtype=torch.float64))
    assert set(seen) == {torch.float64}


# ------------------------------------------------- backbone
@pytest.mark.parametrize('n_layers', (18, 50))
def test_plain_resnet_agrees_with_torchvision(n_layers):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f'resnet{n_layers}')().eval()
    ours = network.ResNet(n_layers, stride=32, stem='plain').eval()
    missing = load_backbone(ours, theirs.state_dict(), 'file')
    assert missing == []
    image = torch.randn(1, 3, 65, 97)
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(ours(image), trunk(image))


@pytest.mark.parametrize('stride, layer3, layer4', (
    (8, [1] + [2] * 5, [2, 8, 16]), (16, [1] * 6, [1, 4, 8]),
    (32, [1] * 6, [1, 1, 1])))
def test_dilations_by_hand(stride, layer3, layer4):
    with torch.device('meta'):
        net = network.ResNet(50, stride)
        features = net(torch.zeros(1, 3, 129, 193))
    assert [b.conv2.dilation[0] for b in net[6]] == layer3
    assert [b.conv2.dilation[0] for b in net[7]] == layer4
    assert features.shape == (1, 2048, 128 // stride + 1, 192 // stride + 1)


def test_basic_blocks_keep_their_reach_when_dilated():
    """A stride taken out dilates all that follows it: before multi-grid, a
    stride-8 net seen at every second point is the stride-16 net."""
    torch.manual_seed(0)
    fine, coarse = (nn.Sequential(*list(network.ResNet(18, stride))[:7])
                    .eval() for stride in (8, 16))
    coarse.load_state_dict(fine.state_dict())
    image = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(fine(image)[..., ::2, ::2], coarse(image),
                                   atol=1e-4, rtol=1e-4)


def test_initial_weights():
    torch.manual_seed(0)
    net = network.EMANet(21, 18, k=64)
    for conv in (net.extractor[7][1].conv2, net.emau.conv1,
                 net.emau.conv2[0]):
        fan = conv.kernel_size[0] ** 2 * conv.out_channels
        assert abs(conv.weight.std() / math.sqrt(2 / fan) - 1) < 0.02
    # PyTorch's own: uniform within 1 / sqrt(fan in)
    bound = 1 / math.sqrt(9 * 512)
    assert net.fc0.conv.weight.abs().max() <= bound
    assert net.emau.conv1.bias.abs().max() <= 1 / math.sqrt(512)
    assert all(m.momentum == 3e-4 for m in net.modules()
               if isinstance(m, nn.BatchNorm2d))


# ------------------------------------------------- the whole network
def test_keys_are_those_of_published_checkpoints(shared):
    path = os.path.join(shared, 'vectors', 'state_dict_keys.json')
    with open(path) as file:
        published = json.load(file)
    for n_layers, want in published.items():
        with torch.device('meta'):
            net = network.EMANet(21, int(n_layers))
        assert {key: list(value.shape) for key, value
                in net.state_dict().items()} == want


@pytest.mark.parametrize('c', (256, 512))
def test_logits_have_the_images_size(c):
    with torch.device('meta'):
        net = network.EMANet(5, 50, 16, c=c)
        assert net(torch.zeros(2, 3, 65, 50)).shape == (2, 5, 65, 50)
    assert net.emau.mu.shape == (1, c, 64)


@pytest.mark.parametrize('words, told', (
    (dict(n_layers=37), '37'), (dict(stride=4), '4'),
    (dict(stem='wide'), 'wide'), (dict(keep='learnt'), 'learnt'),
    (dict(norm='l1'), 'l1'), (dict(stage_num=0), '0')))
def test_unknown_parts_are_refused(words, told):
    with torch.device('meta'), pytest.raises(ValueError, match=told):
        network.EMANet(21, **{'n_layers': 18, **words})


# ------------------------------------------------- fast paths
@pytest.mark.parametrize('size', ((33, 49), (17, 49), (34, 50), (9, 7),
                                  (1, 1)))
@pytest.mark.parametrize('dtype', (torch.float64, torch.float32,
                                   torch.bfloat16))
def test_upsample_agrees_with_torch(size, dtype):
    """In float32 at least, with gradients and without, channels last too."""
    torch.manual_seed(0)
    for shape in ((2, 3, 5, 7), (1, 2, 1, 3)):
        x = torch.randn(shape, dtype=dtype)
        wide = x.float() if dtype == torch.bfloat16 else x
        want = F.interpolate(wide, size, mode='bilinear', align_corners=True)
        for y in (x, x.to(memory_format=torch.channels_last)):
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    got = network.upsample(y, size)
                torch.testing.assert_close(got, want)


def state_after_a_step(recompute):
    """Return gradients, statistics and bases after a step of a small net."""
    torch.manual_seed(0)
    net = network.EMANet(5, 18, 16, 'plain', 32, 8, dropout=0.0)
    net.extractor.recompute = recompute
    torch.manual_seed(1)
    net.train()(torch.randn(2, 3, 33, 33)).square().mean().backward()
    return {**{f'{name}.grad': p.grad for name, p in net.named_parameters()
               if p.requires_grad}, **dict(net.named_buffers())}


def test_blocks_computed_again_change_nothing():
    """Gradients, running statistics and their counts, bases."""
    plain, again = state_after_a_step(False), state_after_a_step(True)
    assert plain.keys() == again.keys() and len(plain) > 100
    for name in plain:
        assert torch.equal(plain[name], again[name]), name
    assert again['extractor.4.0.bn1.num_batches_tracked'] == 1


def test_what_is_kept_for_the_backward_pass():
    """In bfloat16, and with blocks computed again; tools/bench.py has the
    figures of a larger image."""
    torch.manual_seed(0)
    net = network.EMANet(21, 50, 16).train()
    image = torch.randn(2, 3, 65, 65)
    _, plain = count_saved_bytes(net, image, None)
    _, half = count_saved_bytes(net, image, torch.bfloat16)
    net.extractor.recompute = True
    _, less = count_saved_bytes(net, image, None)
    _, both = count_saved_bytes(net, image, torch.bfloat16)
    assert half < 0.6 * plain and less < 0.6 * plain and both < 0.4 * plain


def test_folded_batch_norm_changes_nothing_but_rounding():
    for stem, layers in (('deep', 50), ('plain', 18)):
        torch.manual_seed(0)
        net = network.EMANet(5, layers, 16, stem, 32, 8).double()
        for name, value in net.state_dict().items():
            if name.endswith(('running_mean', 'running_var', 'bias')):
                value.uniform_(0.5, 1.5)
        before = copy.deepcopy(net.state_dict())
        folded = fold_batch_norm(net)
        x = torch.randn(1, 3, 33, 49, dtype=torch.float64)
        with torch.no_grad():
            want = net.eval()(x)
            torch.testing.assert_close(folded(x), want)
        assert not [m for m in folded.modules() if isinstance(
            m, torch.nn.BatchNorm2d)]
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])
