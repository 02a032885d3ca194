"""The recipe's parts by hand, metrics, weights to start from; runs that learn.

    python -m pytest tests/test_train.py
"""
import hashlib
import http.server
import math
import os
import re
import threading

import pytest
import torch

import dataset
import eval
import heads
import network
import settings
import train
import utils
from conftest import SMALL, run, words
from lib import pretrained
from lib.images import read_image, read_label
from training import assert_equal_runs, run_state, train_here
from utils import RunError, UserError


# ------------------------------------------------- the recipe's parts
def test_loss_by_hand():
    """Two pixels of four are void: they cost 0 and count in the mean."""
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0, 0] = math.log(2)        # p = 1/4, 2/4, 1/4
    label = torch.tensor([[[1, 255], [255, 2]]], dtype=torch.uint8)
    want = (math.log(2) + math.log(3)) / 4
    assert train.segmentation_loss(logits, label).item() == pytest.approx(
        want)
    logits.requires_grad_()
    train.segmentation_loss(logits, label).backward()
    assert logits.grad[0, :, 0, 1].eq(0).all()


@pytest.mark.parametrize('keep', network.KEEPS)
def test_param_groups(keep):
    vars(settings).update(N_LAYERS=50, EM_KEEP=keep)
    with torch.device('meta'):
        net = heads.build_network()
    names = {param: name for name, param in net.named_parameters()}
    groups = train.param_groups(net)
    decayed, rest, biases = ([names[p] for p in group['params']]
                             for group in groups)
    assert [g['weight_decay'] for g in groups] == [1e-4, 0, 0]
    assert [g['lr_factor'] for g in groups] == [1, 1, 2]
    convs = [f'{name}.weight' for name, m in net.named_modules()
             if isinstance(m, torch.nn.Conv2d)]
    norms = [f'{name}.weight' for name, m in net.named_modules()
             if isinstance(m, torch.nn.BatchNorm2d)]
    if keep == 'learned':
        norms.append('emau.mu')
    else:
        convs.remove('emau.conv1.weight')           # frozen: in no group
        assert 'emau.conv1.bias' not in biases
    assert sorted(decayed) == sorted(convs)
    assert sorted(rest) == sorted(norms)
    assert all(name.endswith('bias') for name in biases)
    assert len(decayed + rest + biases) + (keep != 'learned') * 2 == len(
        list(net.parameters()))


def test_the_learning_rate_of_each_group():
    vars(settings).update(LR=1.0, ITER_MAX=100, LR_DECAY=10, POLY_POWER=0.9)
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{'params': [a], 'lr_factor': 1},
                                 {'params': [b], 'lr_factor': 2}], 0.1)
    for step, want in ((1, 1), (9, 1), (10, 0.9 ** 0.9), (19, 0.9 ** 0.9),
                       (50, 0.5 ** 0.9), (100, 0)):
        assert train.set_learning_rate(optimizer, step) == pytest.approx(want)
        assert [g['lr'] for g in optimizer.param_groups] == pytest.approx(
            [want, 2 * want])


# ------------------------------------------------- reading metrics
def pending_steps(losses):
    """Return steps as train.py keeps them; one has a metric more."""
    pending = [(step, [f'a{step}', f'b{step}'], step / 100, {
        'loss': torch.tensor(loss), 'grad_norm': torch.tensor(10.0 * step)})
        for step, loss in losses.items()]
    pending[0][3]['EM/entropy'] = torch.tensor(0.5, dtype=torch.float64)
    return pending


def test_metrics_of_several_steps_by_hand():
    pending = pending_steps({7: 0.1, 8: 0.2, 9: 0.7})
    rows, is_stopping = train.run.read_metrics(pending, False)
    loss = [float(torch.tensor(x)) for x in (0.1, 0.2, 0.7)]    # float32
    assert rows == [
        (7, {'loss': loss[0], 'grad_norm': 70, 'EM/entropy': 0.5,
             'lr': 0.07}),
        (8, {'loss': loss[1], 'grad_norm': 80, 'lr': 0.08}),
        (9, {'loss': loss[2], 'grad_norm': 90, 'lr': 0.09})]
    assert pending == [] and is_stopping is False
    assert train.run.read_metrics(pending_steps({1: 1.0}), True)[1] is True


@pytest.mark.parametrize('mine, others, want', (
    (False, 0, False), (True, 0, True), (False, 1, True)))
def test_metrics_are_means_over_processes(monkeypatch, mine, others, want):
    """In one exchange, for the stop request as well."""
    exchanged = []

    def all_reduce(values):
        exchanged.append(values.tolist())
        values += torch.tensor([3.0, 10.0, 0.25, 5.0, 30.0, others])
    monkeypatch.setattr(utils, 'world', lambda: 2)
    monkeypatch.setattr(train.run, 'world', lambda: 2)
    monkeypatch.setattr(train.run.dist, 'all_reduce', all_reduce)
    rows, is_stopping = train.run.read_metrics(pending_steps({1: 1.0, 2: 2.0}),
                                           mine)
    assert exchanged == [[1, 10, 0.5, 2, 20, mine]]
    assert rows == [
        (1, {'loss': 2, 'grad_norm': 10, 'EM/entropy': 0.375, 'lr': 0.01}),
        (2, {'loss': 3.5, 'grad_norm': 25, 'lr': 0.02})]
    assert is_stopping is want


@pytest.mark.parametrize('value', (math.nan, math.inf))
def test_a_loss_that_is_not_finite_is_named_by_step_and_images(value):
    """The first of two, among others."""
    pending = pending_steps({4: 1.0, 5: value, 6: 2.0, 7: math.nan})
    with pytest.raises(RunError, match=f'^the loss is {value} at step 5, '
                                       f'images a5, b5; .* lower LR$'):
        train.run.read_metrics(pending, False)


def test_a_gradient_that_is_not_finite_stops_nothing():
    """As the first of fp16, which the loss scaler skips."""
    pending = pending_steps({1: 1.0})
    pending[0][3]['grad_norm'] = torch.tensor(math.inf)
    assert train.run.read_metrics(pending, False)[0][0][1]['loss'] == 1.0


# ------------------------------------------------- pretrained weights
def test_auto_weights_follow_the_network(monkeypatch, small):
    asked = []
    monkeypatch.setattr(pretrained, 'download', lambda *a: asked.append(a))
    settings.PRETRAINED = 'auto'
    for stem, n_layers, name in (('deep', 101, 'resnet101-2a57e44d'),
                                 ('plain', 18, 'resnet18-f37072fd')):
        vars(settings).update(STEM=stem, N_LAYERS=n_layers)
        assert pretrained.find_weights() == f'models/{name}.pth'
        url, path, digest = asked[-1]
        assert url.endswith(f'/{name}.pth') and path.endswith(url[-20:])
        assert digest.split(':')[1].startswith(name.split('-')[1])
    vars(settings).update(STEM='deep', N_LAYERS=18)
    with pytest.raises(UserError, match='N_LAYERS=18 with STEM=deep'):
        pretrained.find_weights()
    settings.PRETRAINED = 'resnet18-f3707'
    with pytest.raises(UserError, match='nearest known is resnet18-f37072fd'):
        pretrained.find_weights()


@pytest.fixture
def served():
    """Serve the folder `served` on localhost; return (its URL, the paths that
    were asked for, a function that ends it)."""
    os.makedirs('served')
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory='served')

        def log_message(self, *a):
            asked.append(self.path)
    server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def close():
        server.shutdown()
        server.server_close()
    yield f'http://localhost:{server.server_port}/', asked, close
    close()


def test_known_weights_are_fetched_checked_and_reused(monkeypatch, small,
                                                      served):
    """From a server on localhost: the file is taken once, and not again."""
    url, asked, close = served
    weights = network.ResNet(18, stem='plain')
    names = ['conv1', 'bn1', '', '', 'layer1', 'layer2', 'layer3', 'layer4']
    torch.save({names[int(key[0])] + key[1:]: value for key, value
                in weights.state_dict().items()}, 'served/mine-0.pth')
    with open('served/mine-0.pth', 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    monkeypatch.setitem(pretrained.KNOWN, 'mine-0', (url, f'sha256:{digest}'))
    settings.PRETRAINED = 'mine-0'
    for _ in range(2):
        net = heads.build_network()
        pretrained.load_initial_weights(net)
        assert torch.equal(net.extractor[7][1].conv2.weight,
                           weights[7][1].conv2.weight)
    assert asked == ['/mine-0.pth']
    with open('models/mine-0.pth', 'ab') as file:
        file.write(b'more')
    with pytest.raises(UserError, match='models/mine-0.pth has the sha256'):
        pretrained.load_pretrained(net)
    close()
    os.remove('models/mine-0.pth')
    with pytest.raises(RunError, match='put it at models/mine-0.pth'):
        pretrained.load_pretrained(net)


# ------------------------------------------------- runs
def test_a_run_that_computes_blocks_again_is_the_same(small, monkeypatch):
    settings.VAL_SPLIT = ''
    train_here(monkeypatch)
    want = run_state('models/latest.pth')
    vars(settings).update(RECOMPUTE=True, MODEL_DIR='b', LOG_DIR='b')
    train_here(monkeypatch)
    assert_equal_runs('b/latest.pth', want)


def test_torch_compile_needs_a_compiler(small, monkeypatch, capsys):
    monkeypatch.setattr(utils.shutil, 'which', lambda name: None)
    train.check_run(1)
    settings.COMPILE = True
    with pytest.raises(UserError, match=r'COMPILE=True: .* a C\+\+ compiler'):
        train.check_run(1)
    settings.INFERENCE = 'compiled'
    with pytest.raises(UserError, match='INFERENCE=compiled: torch.compile'):
        eval.prepare_network(heads.build_network())


def test_it_learns(small, monkeypatch, toy):
    """Overfitting two images: a small EMANet, to a high mIoU on them, which
    every INFERENCE gives as well."""
    lists = os.path.join(toy, 'ImageSets', 'Segmentation')
    with open(os.path.join(lists, 'train.txt')) as file:
        few = file.read().split()[:2]
    with open(os.path.join(lists, 'few.txt'), 'w') as file:
        file.write('\n'.join(few))
    vars(settings).update(
        TRAIN_SPLIT='few', VAL_SPLIT='few', ALLOW_OVERLAP=True,
        CROP_SIZE=97, BATCH_SIZE=2, LR=0.04, ITER_MAX=80, SCALES=(1.0,),
        EM_CHANNELS=64, EM_BASES=16, DROPOUT=0.0)
    rows = train_here(monkeypatch)
    assert float(rows[80]['val_mIoU']) > 0.7
    before = sum(float(rows[step]['loss']) for step in range(1, 6))
    after = sum(float(rows[step]['loss']) for step in range(76, 81))
    assert after < before / 4

    net, _ = heads.load_network('models/final.pth', 'cpu')
    data = dataset.Segmentation('val', train=False)     # of any images
    preds = {}
    for name in ('plain', 'folded', 'bf16'):
        settings.INFERENCE = name
        prepared = eval.prepare_network(net)
        with torch.no_grad():
            preds[name] = torch.cat([eval.predict_classes(
                prepared, dataset.normalise(image[None], 'cpu')).flatten()
                for image, _, _ in (data[0], data[1])])
    for name, least in (('folded', 0.9999), ('bf16', 0.995)):
        agree = (preds[name] == preds['plain']).float().mean()
        assert agree >= least, (name, agree)


def test_the_net_that_is_not_resumed_is_seeded(small):
    nets = []
    for number in (1, 1, 2):
        utils.seed_everything(number, False)
        nets.append(heads.build_network().fc2.weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


# ------------------------------------------------- as a user
def test_train_eval_predict_as_a_user(toy, tmp_path):
    given = words({**SMALL, 'DATA_ROOT': toy, 'NUM_WORKERS': 2,
                   'EVAL_SCALES': 0.5})
    done = run('train.py', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r'step 4: val mIoU \d', done.stdout)
    assert 'device: ' in done.stdout and '4/4' in done.stderr
    done = run('eval.py', f'DATA_ROOT={toy}', 'EVAL_SCALES=0.5',
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r'mIoU \d+\.\d\d', done.stdout)
    path = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    done = run('predict.py', path, '--to', 'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == [
        'toy_0000.overlay.jpg', 'toy_0000.png']
    label = read_label(tmp_path / 'out' / 'toy_0000.png')
    assert label.shape == read_image(path).shape[:2]
    assert label.max() < 6
