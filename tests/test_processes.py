"""Several processes equal one: in training, on the CPU by gloo, and in
evaluation. Accumulation, frozen parts, averaged weights, mixed precision.

Dropout is off where processes are compared: each draws its own.

    python -m pytest tests/test_processes.py
"""
import csv
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import eval
import heads
import network
import settings
import train
import utils
from conftest import REPO, SMALL, run, words
from lib import checkpoint
from training import train_here

# train.py as it is, in a float type of the test's, each process keeping what
# its network holds after each step
CHILD = '''
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_default_dtype(getattr(torch, sys.argv[2]))
import train, utils
inner = train.run.capture
def capture(parts, step, *rest):
    torch.save(parts['net'].state_dict(), f'rank{utils.rank()}_{step}.pth')
    return inner(parts, step, *rest)
train.run.capture = capture
train.validation_images = lambda *_: ()             # takes long to draw
sys.argv = ['train.py', *sys.argv[3:]]
utils.run_main(train.main)
'''


def train_in(folder, count, dtype, **changes):
    """Train in `count` processes; return log.csv's rows and latest.pth."""
    os.makedirs(folder)
    given = words({**SMALL, 'DATA_ROOT': settings.DATA_ROOT, 'DROPOUT': 0.0,
                   'BATCH_SIZE': 4, 'ITER_SAVE': 10, 'CROP_SIZE': 33,
                   **changes})
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    launcher = {} if count == 1 else {'WORLD_SIZE': str(count),
                                      'MASTER_ADDR': 'localhost',
                                      'MASTER_PORT': port}
    running = []
    for i in range(count):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', **launcher}
        if count > 1:
            env.update(RANK=str(i), LOCAL_RANK=str(i))
        running.append(subprocess.Popen(
            [sys.executable, '-c', CHILD, REPO, dtype, *given], cwd=folder,
            env=env, text=True, stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL))
    for process in running:
        error = process.communicate(timeout=280)[1]
        assert process.returncode == 0, error[-3000:]
    with open(os.path.join(folder, 'logdir', 'log.csv')) as file:
        return list(csv.DictReader(file)), checkpoint.load(
            os.path.join(folder, 'models', 'latest.pth'))


def same(a, b, rtol):
    """Compare tensors by name, each by the norm of the difference."""
    assert a.keys() == b.keys()
    for key in a:
        if a[key].is_floating_point():
            assert (a[key] - b[key]).norm() <= rtol * a[key].norm(), key
        else:
            assert torch.equal(a[key], b[key]), key


def weights(net, by_tensor):
    """A net's state; in single precision, where a bias is its gradient and
    nothing else after a step, weights and biases are joined as well."""
    params = [key for key in net if key.endswith(('weight', 'bias'))]
    return net if by_tensor else {
        'all': torch.cat([net[key].flatten() for key in params]),
        **{key: net[key] for key in net if key not in params}}


def gradient(checkpoint, by_tensor):
    """SGD's momentum, which after a step is the gradient: tensor by tensor,
    or as the one vector that it is."""
    state = checkpoint['optimizer']['state']
    found = {str(i): state[i]['momentum_buffer'] for i in state}
    return found if by_tensor else {
        'all': torch.cat([value.flatten() for value in found.values()])}


@pytest.mark.parametrize('dtype, steps, changes', (
    ('float64', 3, {'ITER_VAL': 3, 'AVERAGE': 0.5, 'EVAL_SCALES': 0.5}),
    # a seed by which no ReLU's input is 0 to rounding: that may be on or off
    pytest.param('float32', 1, {'VAL_SPLIT': '', 'SEED': 1},
                 marks=pytest.mark.long)))
def test_two_processes_equal_one(small, dtype, steps, changes):
    """Loss, gradients (as momentum), weights, bases, BN's buffers."""
    one, a = train_in('one', 1, dtype, ITER_MAX=steps, **changes)
    two, b = train_in('two', 2, dtype, ITER_MAX=steps, **changes)
    assert len(one) == len(two) == steps
    for x, y in zip(one, two):
        for name in ('loss', 'grad_norm'):
            assert float(x[name]) == pytest.approx(float(y[name]), rel=1e-5)
        if x['val_mIoU'] or y['val_mIoU']:
            assert x['val_mIoU'] == y['val_mIoU']
    same(*(weights(x['net'], dtype == 'float64') for x in (a, b)), 1e-5)
    same(*(gradient(x, dtype == 'float64') for x in (a, b)), 1e-5)
    if 'AVERAGE' in changes:
        same(a['average'], b['average'], 1e-5)
    for step in range(1, steps + 1):
        ranks = [torch.load(f'two/rank{i}_{step}.pth', weights_only=True)
                 for i in (0, 1)]
        for key, value in ranks[0].items():
            assert torch.equal(value, ranks[1][key]), (key, step)
    start = heads.build_network().state_dict()
    assert not torch.equal(a['net']['fc2.weight'].float(),
                           start['fc2.weight'])


@pytest.mark.long
@pytest.mark.parametrize('accum', (1, 2))
def test_train_spawns_a_process_for_each_device(toy, tmp_path, accum):
    """And a resume of it, bit for bit, with dropout on. A sum over three
    depends on its order."""
    given = words({**SMALL, 'DATA_ROOT': toy, 'VAL_SPLIT': '', 'ITER_SAVE': 2,
                   'DROPOUT': 0.5, 'DEVICES': '-1,-1,-1', 'BATCH_SIZE': 6,
                   'ACCUM': accum, 'CROP_SIZE': 33})
    done = run('train.py', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('; 3 training and 0 loader') == 1
    models = tmp_path / 'models'
    want = checkpoint.load(str(models / 'final.pth'))['net']
    os.replace(models / 'step_2.pth', models / 'latest.pth')
    done = run('train.py', *given, cwd=tmp_path)
    assert 'resumed after step 2' in done.stdout, done.stderr
    got = checkpoint.load(str(models / 'final.pth'))['net']
    for key in want:
        assert torch.equal(got[key], want[key]), key


TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node', '3']


@pytest.mark.parametrize('launcher, changes', (
    ([], ['DEVICES=-1,-1,-1']),
    pytest.param(TORCHRUN, [], marks=pytest.mark.long)),
    ids=('spawned', 'torchrun'))
def test_three_processes_count_every_image_once(small, toy, launcher,
                                                changes):
    """5 images of val over 3 processes, which eval.py or torchrun starts."""
    settings.INFERENCE = 'plain'
    torch.manual_seed(0)
    net = heads.build_network()
    torch.save({'net': net.state_dict(), 'step': 1}, 'a.pth')
    want = eval.evaluate(net, dataset.Segmentation('val', False))
    done = subprocess.run(
        [sys.executable, *launcher, os.path.join(REPO, 'eval.py'), 'a.pth',
         f'DATA_ROOT={toy}', 'STRIDE=16', 'NUM_WORKERS=0',
         'INFERENCE=plain', 'LOG_DIR=logdir', *changes], text=True,
        capture_output=True)
    assert done.returncode == 0, done.stderr
    with open('logdir/eval.json') as file:
        np.testing.assert_array_equal(json.load(file)['confusion'], want)
    with open('results.csv', newline='') as file:
        assert [row['images'] for row in csv.DictReader(file)] == ['5']


def test_a_batch_that_does_not_divide_is_refused(small):
    vars(settings).update(BATCH_SIZE=6, ACCUM=2)
    train.check_run(3)
    with pytest.raises(utils.UserError, match='BATCH_SIZE=6 .* 4 processes'):
        train.check_run(4)


# ------------------------------------------------- one small GPU
def test_parts_of_a_step_have_the_whole_gradient(small):
    """ACCUM=2 against the plain sum over both parts, in float64; all start
    from the same bases, which move once, by the mean."""
    settings.FREEZE = 'bn'
    torch.manual_seed(0)
    net = heads.build_network().double()
    net.emau.accum = 2
    train.set_train_mode(net)
    for m in net.modules():         # the head's too: then parts are exact
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.eval()
    net.fc1[1].p = 0.0
    x = torch.randn(4, 3, 33, 33, dtype=torch.float64)
    label = torch.randint(0, 6, (4, 33, 33))
    before = net.emau.mu.clone()
    bases = []
    inner = net.emau.em

    def em(*a):
        for z, mu in inner(*a):
            yield z, mu
        bases.append(mu)
    net.emau.em = em
    for part in (0, 2):
        share = train.segmentation_loss(net(x[part:part + 2]),
                                        label[part:part + 2]) / 2
        share.backward()
        if part == 0:
            assert torch.equal(net.emau.mu, before)
    parts = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    want = 0.9 * before + 0.1 * torch.cat(bases).mean(0, keepdim=True)
    torch.testing.assert_close(net.emau.mu, want)

    net.zero_grad()
    net.emau.mu.copy_(before)
    net.emau.accum = 1
    train.segmentation_loss(net(x), label).backward()
    whole = [p.grad for p in net.parameters() if p.grad is not None]
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(net.emau.mu, want)


@pytest.mark.parametrize('what', ('bn', 'backbone'))
def test_frozen_parts_do_not_move(small, what, monkeypatch):
    """Over a validation as well, which turns modes about."""
    vars(settings).update(FREEZE=what, ITER_VAL=1, ITER_MAX=2, CROP_SIZE=33)
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    utils.seed_everything(settings.SEED, False)
    before = heads.build_network().state_dict()
    train_here(monkeypatch)
    after = checkpoint.load('models/final.pth')['net']
    moved = {key for key in before if not torch.equal(before[key],
                                                      after[key])}
    backbone = {key for key in moved if key.startswith('extractor')}
    assert not any('running' in key for key in backbone)
    assert (not backbone) == (what == 'backbone')
    assert {'fc0.bn.running_mean', 'fc2.weight', 'emau.mu'} <= moved


# ------------------------------------------------- averaged weights
def test_averaged_weights_by_hand(small, monkeypatch):
    """a <- d a + (1 - d) w after each step; buffers are copied; both nets
    are scored; a run resumes bit for bit."""
    vars(settings).update(AVERAGE=0.75, ITER_SAVE=1, ITER_MAX=3, ITER_VAL=3,
                          CROP_SIZE=33, EVAL_SCALES=(0.5,))
    monkeypatch.setattr(train, 'validation_images', lambda *a: ())
    rows = train_here(monkeypatch)
    steps = [checkpoint.load(f'models/step_{i}.pth') for i in (1, 2, 3)]
    want = steps[0]['net']['fc2.weight']
    for state in steps:
        want = 0.75 * want + 0.25 * state['net']['fc2.weight']
        torch.testing.assert_close(state['average']['fc2.weight'], want)
        for name in ('emau.mu', 'fc0.bn.running_var'):
            assert torch.equal(state['average'][name], state['net'][name])
    assert rows[3]['val_mIoU'] and rows[3]['val_mIoU_average']
    os.replace('models/step_2.pth', 'models/latest.pth')
    train_here(monkeypatch)
    again = checkpoint.load('models/latest.pth')['average']
    for key, value in again.items():
        assert torch.equal(value, steps[2]['average'][key]), key
    monkeypatch.setattr(sys, 'argv', ['eval.py'])
    eval.main()
    with open('logdir/eval.json') as file:
        result = json.load(file)
    assert result['average']['mIoU'] == pytest.approx(
        float(rows[3]['val_mIoU_average']), rel=1e-6)


# ------------------------------------------------- mixed precision
def test_amp_types(small):
    cpu = torch.device('cpu')
    for name, want in (('auto', None), ('off', None),
                       ('bf16', torch.bfloat16), ('fp16', torch.float16)):
        settings.AMP = name
        assert train.amp_dtype(cpu) is want


@pytest.mark.parametrize('name', ('bf16', 'fp16'))
def test_mixed_precision_trains_on_what_it_should(small, name, monkeypatch):
    """Convolutions in the short type, EM and loss in float32."""
    seen = {}

    def note(what, module, inner):
        def call(*a, **k):
            seen[what] = next(x for x in a if torch.is_tensor(x)).dtype
            return inner(*a, **k)
        monkeypatch.setattr(module, what, call)
    note('upsample', network, network.upsample)
    note('cross_entropy', train.F, train.F.cross_entropy)
    inner = network.EMAU.em
    monkeypatch.setattr(network.EMAU, 'em', lambda unit, x, mu, stage_num: (
        seen.update(em=x.dtype), inner(unit, x, mu, stage_num))[1])
    vars(settings).update(AMP=name, ITER_MAX=1, VAL_SPLIT='', CROP_SIZE=33)
    train_here(monkeypatch)
    short = {'bf16': torch.bfloat16, 'fp16': torch.float16}[name]
    assert seen['em'] == seen['cross_entropy'] == torch.float32
    state = checkpoint.load('models/latest.pth')
    assert all(v.isfinite().all() and v.dtype != short
               for v in state['net'].values())
    assert bool(state['scaler']) == (name == 'fp16')


@pytest.mark.long
def test_labels_are_checked_before_several_processes_score(small, toy,
                                                           tmp_path):
    """Masks of 0 and 255 alone are refused, as by one process."""
    root = tmp_path / 'set'
    shutil.copytree(toy, root)
    for path in (root / 'SegmentationClassAug').iterdir():
        label = np.array(Image.open(path))
        Image.fromarray(np.uint8(255 * (label > 0))).save(path)
    torch.save({'net': heads.build_network().state_dict(), 'step': 1},
               'a.pth')
    done = run('eval.py', 'a.pth', f'DATA_ROOT={root}', 'STRIDE=16',
               'NUM_WORKERS=0', 'DEVICES=-1,-1', cwd='.')
    assert done.returncode == 2 and 'val hold class 0 alone' in done.stderr
