"""Encoders of timm as backbones: where their cells lie, what is refused, what
of batch norm, layouts and weights would go wrong in silence.

    python -m pytest tests/test_backbones.py
"""
import copy
import http.server
import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval
import heads
import network
import settings
import train
from conftest import SMALL, refused, run, run_tool, words
from lib import backbones, distributed, folding, pretrained
from lib.download import file_hash
from lib.folding import fold_batch_norm
from lib.inference import fit_grid, pad_to_grid, predict_logits
from training import assert_equal_runs, run_state, train_here
from utils import RunError, UserError

timm = pytest.importorskip('timm')
TINY = {'N_CLASSES': 5, 'EM_CHANNELS': 16, 'EM_BASES': 4, 'CROP_SIZE': 64,
        'DROPOUT': 0.0}


def build(name, stride, **more):
    """Return the settings' network on an encoder, its batch norm and the
    head's scaled so that a mistake in either shows."""
    vars(settings).update(TINY, BACKBONE=name, STRIDE=stride, **more)
    torch.manual_seed(0)
    net = heads.build_network().eval()
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.2, 0.2)
    return net


# ------------------------------------------------- the grid
@pytest.mark.parametrize('name, stride, extra, low, channels', (
    ('resnet10t', 8, 1, 64, 512),
    ('regnetx_002', 16, 1, 24, 368),
    ('mobilenetv3_small_050', 32, 1, 8, 288),       # EfficientNetFeatures
    ('tf_efficientnet_lite0', 16, 1, 24, 320),      # padding by the size
    ('convnext_atto', 8, 0, 40, 320),
    ('densenet121', 16, 0, 256, 1024),              # a level within
    ('swin_tiny_patch4_window7_224', 16, 0, 96, 384),   # NHWC
    ('vit_tiny_patch16_224', 16, 0, 0, 192),
    ('vit_small_patch14_dinov2', 14, 0, 0, 384)))
def test_an_encoder_is_what_a_forward_pass_shows(name, stride, extra, low,
                                                 channels):
    """Cells and channels; at a size of the grid, and another."""
    about = backbones.describe(name, stride)
    assert about['channels'] == (low, channels)
    assert about['align_corners'] == (extra == 1)
    with torch.device('meta'):
        net = backbones.Encoder(name, stride).eval()
    image = torch.zeros(1, 3, 6 * stride + extra, 5 * stride + extra,
                        device='meta')
    assert net(image).shape == (1, channels, 6 + extra, 5 + extra)
    if low:
        first, _ = net(image, low=True)
        assert first.shape == (1, low, *(
            k * stride // 4 + extra for k in (6, 5)))
    settings.BACKBONE, settings.STRIDE = name, stride
    assert fit_grid(2 * stride + 2) == 3 * stride + extra
    assert pad_to_grid(torch.zeros(1, 3, 70, 3 * stride)).shape[3] == (
        3 * stride + extra)


@pytest.mark.parametrize('name, stride, told', (
    ('hrnet_w18_small', 32, 'images need sides of k * 32 + 1 pixels'),
    ('dla34', 32, 'images need sides of k * 32 + 1 pixels'),
    ('tresnet_m', 32, 'images need sides of k * 32 + 1 pixels'),
    ('ese_vovnet19b_slim', 32, "lie 28 pixels from the image's edge"),
    ('cait_xxs24_224', 16, 'it takes no images of any size (Input height'),
    ('maxvit_nano_rw_256', 32, 'it takes no images of any size'),
    ('legacy_xception', 32, 'docs/backbones.md'),
    ('dpn48b', 8, 'cannot be built at that output stride; it can take '
     'STRIDE=32'),
    ('convnext_atto', 14, 'it can take STRIDE=8, STRIDE=16, STRIDE=32')))
def test_what_does_not_fit_says_why(name, stride, told):
    with pytest.raises(UserError) as error:
        backbones.describe(name, stride)
    text = str(error.value)
    assert text.startswith(f'BACKBONE={name} with STRIDE={stride}: ')
    assert told in text and '\n' not in text


@pytest.mark.parametrize('name, stride, is_symmetric', (
    ('resnet18', 16, True), ('convnext_atto', 32, True),
    ('convnext_atto', 8, False)))       # see docs/backbones.md
@torch.no_grad()
def test_a_shift_of_the_image_shifts_the_prediction(name, stride,
                                                    is_symmetric):
    """By one stride; where weights are symmetric, a flip flips it, so cells
    are upsampled to where they lie. Far from the borders, which differ; with
    a classifier as the head."""
    net = build(name, stride, HEAD='fcn')
    for part in net.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.copy_((part.weight + part.weight.flip(3)) / 2)
    far, extra = 256, backbones.grid_extra()
    sides = (2 * far + 4 * stride + extra, 2 * far + 6 * stride + extra)
    image = F.avg_pool2d(torch.randn(1, 3, *(s + 10 for s in sides)), 11, 1)

    def predict(x, left=0, right=0):
        return predict_logits(net, x)[..., far:-far, far + left:-far - right]
    want = predict(image, right=stride)
    bound = 1e-3 * (want - want.mean()).abs().max()
    got = predict(image.roll(stride, 3), left=stride)
    assert (want - got).abs().max() < bound
    if is_symmetric:
        want, got = predict(image), predict(image.flip(3)).flip(3)
        assert (want - got).abs().max() < bound


@pytest.mark.parametrize('stride, extra', ((8, 0), (8, 1), (14, 0), (32, 1)))
def test_a_cell_is_upsampled_to_where_it_lies(stride, extra):
    """The mean place of a cell's pixels: k * stride, or its patch's middle.
    """
    cells = torch.zeros(1, 1, 6 + extra, 5 + extra)
    cells[..., 2, 3] = 1
    shown = network.upsample(cells, (6 * stride + extra, 5 * stride + extra),
                             bool(extra))[0, 0]
    for axis, cell in ((1, 2), (0, 3)):
        share = shown.sum(axis) / shown.sum()
        place = (share * torch.arange(len(share))).sum()
        assert place == pytest.approx(
            cell * stride + (0 if extra else (stride - 1) / 2), abs=1e-3)


@pytest.mark.parametrize('align_corners', (True, False))
def test_products_upsample_as_interpolate_does(align_corners):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    for size in ((56, 40), (57, 33), (7, 5), (3, 2), (1, 64)):
        want = F.interpolate(x, size, mode='bilinear',
                             align_corners=align_corners)
        torch.testing.assert_close(network.upsample_by_products(
            x, size, align_corners), want)


# ------------------------------------------------- heads, modes
@pytest.mark.parametrize('head', heads.HEADS)
@pytest.mark.parametrize('name', ('resnet10t', 'convnext_atto'))
@torch.no_grad()
def test_every_head_stands_on_an_encoder(head, name):
    net = build(name, 16, HEAD=head)
    x = torch.randn(1, 3, 70, 50)
    assert predict_logits(net, x).shape == (1, 5, 70, 50)


def test_deeplabv3plus_needs_features_of_stride_4():
    with pytest.raises(UserError, match='no features of stride 4'):
        build('vit_tiny_patch16_224', 16, HEAD='deeplabv3plus')


def test_a_frozen_transformer_keeps_nothing_for_the_backward_pass():
    """And has its final norm."""
    net = build('vit_tiny_patch16_224', 16)
    assert any(key.endswith('norm.weight') and 'blocks' not in key
               for key in net.extractor.state_dict())
    net.extractor.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        features = net.extractor(torch.randn(2, 3, 64, 48))
    assert kept == [] and not features.requires_grad


@pytest.mark.parametrize('name, stride', (
    ('resnet10t', 16), ('mobilenetv3_small_050', 16), ('resnest14d', 16),
    ('vit_tiny_patch16_224', 16), ('convnext_atto', 16)))
def test_recomputed_steps_equal_others(name, stride):
    """Gradients, and running statistics: no second update."""
    net = build(name, stride).double().train()
    network.set_bn_momentum(net, 0.3)
    nets = [net, copy.deepcopy(net)]
    nets[1].extractor.recompute = True
    side = 64 + backbones.grid_extra()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    for _ in range(2):
        for each in nets:
            each(x).square().mean().backward()
    (a, b), kept = ([p.grad for p in each.parameters()] for each in nets), []
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    for (key, x), y in zip(net.named_buffers(), nets[1].buffers(),
                           strict=True):
        if 'num_batches' not in key:
            torch.testing.assert_close(x, y, msg=key)
    for each in nets:
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept[-1].append(x.nbytes) or x, lambda x: x):
            kept.append([])
            each.extractor(torch.randn(2, 3, side, side,
                                       dtype=torch.float64))
    assert sum(kept[1]) < 0.8 * sum(kept[0])


def test_frozen_statistics_are_those_of_batch_norm_alone(small):
    """FREEZE=bn leaves what else an encoder does in training."""
    settings.FREEZE = 'bn'
    net = build('resnet10t', 16)
    train.set_train_mode(net)
    for part in net.extractor.modules():
        assert part.training != isinstance(part, nn.BatchNorm2d)
    settings.FREEZE = 'backbone'
    train.set_train_mode(net)
    assert not any(part.training for part in net.extractor.modules())
    assert net.fc0.training


# ------------------------------------------------- batch norm
@pytest.mark.parametrize('name, is_folded', (
    ('resnet10t', True), ('regnety_002', True), ('res2net50_14w_8s', True),
    ('dpn48b', False), ('efficientnet_lite0', True), ('densenet121', False),
    ('nf_resnet26', False), ('resnetv2_50d_gn', True)))
@torch.no_grad()
def test_folding_changes_no_logits(name, is_folded, capsys):
    """Activations within batch norm, pairs that no order shows, batch norm
    before a convolution, weights that are standardised."""
    backbones_log()
    net = build(name, 32)
    folded = fold_batch_norm(net)
    x = torch.randn(1, 3, 97, 65)
    want, got = predict_logits(net, x), predict_logits(folded, x)
    assert (want - got).abs().max() < 1e-4 * want.abs().max()
    left, all_of = (sum(isinstance(m, nn.modules.batchnorm._BatchNorm)
                        for m in each.modules()) for each in (folded, net))
    if is_folded:
        assert left == 0
    assert left <= all_of


def backbones_log():
    """Forget which lines were said once."""
    folding.log_once.cache_clear()


def test_what_cannot_be_folded_is_run_as_it_is_and_said(capsys):
    """As a batch norm whose convolution is used elsewhere too."""
    backbones_log()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 5, 3, 1, 1), nn.BatchNorm2d(5)

        def forward(self, x):
            y = self.conv(x)
            return y + self.bn(y)
    net = Twice().eval()
    nn.init.uniform_(net.bn.running_var, 2, 3)
    x = torch.randn(1, 3, 33, 33)
    torch.testing.assert_close(fold_batch_norm(net)(x), net(x))
    assert 'cannot be folded' in capsys.readouterr().out


def test_batch_norm_over_processes_keeps_the_activation(monkeypatch):
    """Which timm's batch norm holds; one of another type is refused."""
    monkeypatch.setattr(distributed.dist, 'get_world_size', lambda: 1)
    monkeypatch.setattr(distributed.dist, 'all_reduce', lambda x: None)
    monkeypatch.setattr(distributed.dist, 'all_gather_into_tensor',
                        lambda out, x: out.copy_(x))
    net = build('regnety_002', 32).double()
    both = distributed.sync_batch_norm(copy.deepcopy(net)).train()
    net.train()
    kinds = {type(m).__name__ for m in both.modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {'GlobalBatchNorm', 'GlobalBatchNormAct'}
    x = torch.randn(3, 3, 65, 65, dtype=torch.float64)
    torch.testing.assert_close(both(x), net(x))
    for (key, a), b in zip(both.state_dict().items(),
                           net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    net.extractor.net.extra = nn.BatchNorm1d(3)
    with pytest.raises(UserError, match='BatchNorm1d, cannot be taken over'):
        distributed.sync_batch_norm(net)


def test_momentum_reaches_an_encoders_batch_norm():
    net = build('regnety_002', 32, BN_MOM=0.123)
    assert {m.momentum for m in net.modules() if isinstance(
        m, nn.modules.batchnorm._BatchNorm)} == {0.123}


def test_one_image_at_a_time_is_refused_where_it_cannot_train(
        small, monkeypatch, capsys):
    words = 'BACKBONE=resnest14d', 'BATCH_SIZE=4', 'ACCUM=4'
    status, line = refused(train.main, *words, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'it needs at least 2 images at a time' in line


# ------------------------------------------------- settings
def test_settings_take_what_is_the_weights_own(capsys):
    vars(settings).update(BACKBONE='vit_tiny_patch16_224', MEAN=(), STD=())
    backbones.complete_settings()
    assert settings.MEAN == settings.STD == (0.5, 0.5, 0.5)
    assert settings.STRIDE == 16                # the only one
    assert capsys.readouterr().out == (
        'MEAN = (0.5, 0.5, 0.5) (vit_tiny_patch16_224)\n'
        'STD = (0.5, 0.5, 0.5) (vit_tiny_patch16_224)\n'
        'STRIDE = 16 (vit_tiny_patch16_224)\n')
    settings.override(['STRIDE=8'])
    backbones.complete_settings()
    assert settings.STRIDE == 8                 # and build_network refuses it
    vars(settings).update(BACKBONE='', MEAN=(), STD=())
    backbones.complete_settings()
    assert settings.MEAN == (0.485, 0.456, 0.406)


@pytest.mark.parametrize('given, told', (
    (['BACKBONE=convnext_tinny'], 'timm ' + timm.__version__ + ' has no net '
     'of that name; the nearest is convnext_tiny'),
    (['BACKBONE=convnext_atto', 'STRIDE=14'], 'it can take STRIDE=8, '),
    (['STRIDE=14'], 'STRIDE=14: the ResNet has 8, 16 or 32'),
    (['BACKBONE=convnext_atto', 'PRETRAINED_PARTIAL=True'],
     'it is of the ResNet alone'),
    (['BACKBONE=convnext_atto', 'PRETRAINED=lost.pth'], 'PRETRAINED=lost.pth '
     'is no file, here or in models')))
def test_bad_input_is_refused_in_a_line(small, monkeypatch, capsys, given,
                                        told):
    status, line = refused(train.main, *given, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and told in line


def test_without_timm_the_line_to_install_it(small, monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'timm', None)
    status, line = refused(train.main, 'BACKBONE=convnext_atto',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'python -m pip install timm' in line


# ------------------------------------------------- weights
def save_weights(path, name='convnext_atto', drop=(), **more):
    """Save a net of timm with weights of its own; return its state."""
    torch.manual_seed(1)
    state = timm.create_model(name).state_dict()
    for key in [key for key in state if key.startswith(tuple(drop) or '-')]:
        del state[key]
    torch.save({**state, **more}, path)
    return state


@pytest.mark.parametrize('name, stride', (
    ('convnext_atto', 16), ('vit_tiny_patch16_224', 16), ('resnet10t', 8),
    ('mobilenetv3_small_050', 16), ('swin_tiny_patch4_window7_224', 16)))
def test_every_weight_of_an_encoder_comes_from_the_file(tmp_path, name,
                                                        stride):
    path = str(tmp_path / 'a.pth')
    state = save_weights(path, name)
    net = build(name, stride)
    settings.PRETRAINED = path
    pretrained.load_pretrained(net)
    flat = {key.replace('.', '_'): value for key, value in state.items()}
    for key, value in net.extractor.net.state_dict().items():
        own = flat[key.removeprefix('model.').replace('.', '_')]
        assert torch.equal(value, own), key


@pytest.mark.parametrize('name, drop, more, told', (
    ('convnext_atto', ('stages.3.',), {}, 'it lacks stages.3'),
    ('convnext_atto', ('head.fc.',), {}, 'it lacks head.fc.weight, '
     'head.fc.bias'),
    ('convnext_atto', (), {'other': torch.ones(1)}, 'unknown to that, other'),
    ('convnext_femto', (), {}, 'it has other shapes, '),
    ('resnet10t', (), {}, 'it lacks '),
    ('convnext_atto', ('stem.0.weight',), {'stem.0.weight': torch.full(
        (40, 3, 4, 4), torch.nan)}, 'numbers that are not finite')))
def test_weights_that_do_not_fit_are_refused(tmp_path, name, drop, more,
                                             told):
    """Without the last stage too, which timm's own features_only takes."""
    path = str(tmp_path / 'a.pth')
    save_weights(path, name, drop, **more)
    net = build('convnext_atto', 16)
    settings.PRETRAINED = path
    with pytest.raises(UserError) as error:
        pretrained.load_pretrained(net)
    assert told in str(error.value) and '\n' not in str(error.value)
    assert path in str(error.value)


def test_another_normalisation_than_the_weights_own_is_warned_of(
        tmp_path, capsys):
    path = str(tmp_path / 'a.pth')
    save_weights(path, 'vit_tiny_patch16_224')
    net = build('vit_tiny_patch16_224', 16, PRETRAINED=path)
    pretrained.load_pretrained(net)
    out = capsys.readouterr().out
    assert out.count('warning: MEAN=(0.485, 0.456, 0.406), but weights of '
                     'vit_tiny_patch16_224 are trained with (0.5, 0.5, 0.5)'
                     ) == 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that has files as the hub of timm's weights has them."""
    served = tmp_path / 'hub'
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pretrained, '_HUB',
                        f'http://localhost:{server.server_port}')
    monkeypatch.chdir(tmp_path)
    yield served / 'timm' / 'convnext_atto.d2_in1k'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('fault', ('', 'damaged', 'no pointer', 'lost'))
def test_weights_are_fetched_checked_and_kept(hub, fault):
    from safetensors.torch import save_file

    for kind in ('raw', 'resolve'):
        (hub / kind / 'main').mkdir(parents=True)
    path = hub / 'resolve' / 'main' / 'model.safetensors'
    torch.manual_seed(1)
    save_file(timm.create_model('convnext_atto').state_dict(), path)
    digest = file_hash(path)
    if fault == 'damaged':
        path.write_bytes(path.read_bytes()[:-1] + b'x')
    (hub / 'raw' / 'main' / 'model.safetensors').write_text(
        'version https://git-lfs.github.com/spec/v1\n'
        f'oid sha256:{digest}\nsize 1\n' if fault != 'no pointer' else 'text')
    if fault == 'lost':
        path.unlink()
    net = build('convnext_atto', 16, PRETRAINED='auto')
    kept = os.path.join('models', 'convnext_atto.d2_in1k.safetensors')
    if fault in ('damaged', 'lost'):
        with pytest.raises((UserError, RunError)) as error:
            pretrained.load_pretrained(net)
        assert not os.path.exists(kept)
        assert (kept if fault == 'lost' else 'sha256') in str(error.value)
        return
    pretrained.load_pretrained(net)
    assert os.listdir('models') == ['convnext_atto.d2_in1k.safetensors']
    path.unlink()                       # the kept one does
    pretrained.load_pretrained(net)


def test_a_checkpoint_of_another_encoder_is_refused_unbuilt(
        tmp_path, monkeypatch, capsys):
    """One of billions of parameters would take all memory."""
    monkeypatch.setattr(heads, 'load_strict', None)
    build('convnext_atto', 16)
    path = str(tmp_path / 'a.pth')
    recorded = {**settings.network_settings(), 'STRIDE': 16,
                'BACKBONE': 'convnext_femto'}
    torch.save({'net': heads.build_network().state_dict(), 'step': 1,
                'settings': recorded}, path)
    status, line = refused(eval.main, path, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert status == 2 and 'does not fit the network' in line


# ------------------------------------------------- runs
FAMILIES = {            # (stride, changes)
    'resnet10t': (16, {}), 'resnext26ts': (16, {}), 'regnety_002': (16, {}),
    'efficientnet_lite0': (16, {}), 'mobilenetv3_small_050': (16, {}),
    'convnext_atto': (16, {}), 'resnest14d': (16, {}),
    'res2net50_14w_8s': (32, {}), 'fastvit_t8': (32, {}),
    'vit_tiny_patch16_224': (16, {'FREEZE': ''})}


@pytest.mark.long
@pytest.mark.parametrize('name', ('convnext_atto',))
def test_a_run_on_an_encoder_resumes_bit_for_bit(small, monkeypatch, name):
    given = [f'BACKBONE={name}', 'STRIDE=16', 'CROP_SIZE=64', 'MEAN=()',
             'STD=()', 'AVERAGE=0.9', 'RECOMPUTE=True']
    train_here(monkeypatch, *given, 'ITER_SAVE=2')
    want = run_state('models/step_4.pth')
    os.replace('models/step_2.pth', 'models/latest.pth')
    os.remove('models/final.pth')
    train_here(monkeypatch, *given, 'ITER_SAVE=2')
    assert_equal_runs('models/step_4.pth', want)
    eval.main.__globals__['sys'].argv[:] = ['eval.py']
    eval.main()


@pytest.mark.long
@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_trains_resumes_scores_predicts_and_exports(toy, tmp_path,
                                                             name):
    """30 steps with a falling loss; what is exported is checked by the tool:
    99.9% of the pixels have the class that PyTorch gives them."""
    stride, changes = FAMILIES[name]
    with torch.device('meta'):
        side = 4 * stride + backbones.describe(name, stride)['align_corners']
    given = words({**SMALL, 'DATA_ROOT': toy, 'VAL_SPLIT': 'val',
                   'BACKBONE': name, 'STRIDE': stride, 'CROP_SIZE': side,
                   'BATCH_SIZE': 4, 'ITER_MAX': 30, 'ITER_SAVE': 15,
                   'LR': 0.02, 'CLIP_GRAD': 5.0, **changes})
    done = run('train.py', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'logdir' / 'log.csv') as file:
        losses = [float(line.split(',')[1]) for line in [*file][1:]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    models = tmp_path / 'models'
    want = run_state(models / 'step_30.pth')
    os.replace(models / 'step_15.pth', models / 'latest.pth')
    os.remove(models / 'final.pth')
    done = run('train.py', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(models / 'step_30.pth', want)
    image = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    for script, *rest in (('eval.py',), ('predict.py', image, '--attention',
                                         '--to', 'out')):
        done = run(script, *rest, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / 'out')) == 3
    done = run_tool('export', 'net.onnx', image, cwd=tmp_path)
    if done.returncode:
        assert done.returncode == 1 and done.stderr.count('\n') == 1, (
            done.stderr)
        assert 'cannot be exported' in done.stderr
        return
    done = run('eval.py', 'net.onnx', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
