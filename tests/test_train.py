"""The recipe's parts by hand; runs that learn, stop, go on and are refused.

    python -m pytest tests/test_train.py
"""
import csv
import http.server
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import baselines
import dataset
import eval
import network
import settings
import train
import utils
from conftest import REPO, SMALL, run, words


def go(monkeypatch, *arguments):
    """Run train.py in this process; return {step: row of log.csv}."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    train.main()
    with open(os.path.join(settings.LOG_DIR, 'log.csv')) as file:
        return {int(row['step']): row for row in csv.DictReader(file)}


def state(path):
    """Return all that a checkpoint holds of a run, in comparable form."""
    saved = utils.load(path)
    return {**saved['net'], 'momentum': [
        s['momentum_buffer'] for s in saved['optimizer']['state'].values()],
        'random': saved['random'], 'step': saved['step'],
        'rates': [g['lr'] for g in saved['optimizer']['param_groups']]}


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
        net = baselines.build_network()
    names = {param: name for name, param in net.named_parameters()}
    groups = train.param_groups(net)
    decayed, rest, biases = ([names[p] for p in group['params']]
                             for group in groups)
    assert [g['weight_decay'] for g in groups] == [1e-4, 0, 0]
    assert [g['times'] for g in groups] == [1, 1, 2]
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


def test_the_rate_of_each_group():
    vars(settings).update(LR=1.0, ITER_MAX=100, LR_DECAY=10, POLY_POWER=0.9)
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{'params': [a], 'times': 1},
                                 {'params': [b], 'times': 2}], 0.1)
    for step, want in ((1, 1), (9, 1), (10, 0.9 ** 0.9), (19, 0.9 ** 0.9),
                       (50, 0.5 ** 0.9), (100, 0)):
        assert train.set_rate(optimizer, step) == pytest.approx(want)
        assert [g['lr'] for g in optimizer.param_groups] == pytest.approx(
            [want, 2 * want])


# ------------------------------------------------- pretrained weights
def test_usual_weights_follow_the_network(monkeypatch, small):
    asked = []
    monkeypatch.setattr(utils, 'download', lambda *a: asked.append(a))
    settings.PRETRAINED = 'auto'
    for stem, n_layers, name in (('deep', 101, 'resnet101-2a57e44d'),
                                 ('plain', 18, 'resnet18-f37072fd')):
        vars(settings).update(STEM=stem, N_LAYERS=n_layers)
        assert train.pretrained_file() == f'models/{name}.pth'
        url, path, digest = asked[-1]
        assert url.endswith(f'/{name}.pth') and path.endswith(url[-20:])
        assert digest.split(':')[1].startswith(name.split('-')[1])
    vars(settings).update(STEM='deep', N_LAYERS=18)
    with pytest.raises(ValueError, match='N_LAYERS=18 with STEM=deep'):
        train.pretrained_file()
    settings.PRETRAINED = 'resnet18-f3707'
    with pytest.raises(ValueError, match='nearest known is resnet18-f37072fd'):
        train.pretrained_file()


def test_known_weights_are_fetched_checked_and_reused(monkeypatch, small):
    """From a server on localhost: the file is taken once, and not again."""
    os.makedirs('served')
    weights = network.ResNet(18, stem='plain')
    names = ['conv1', 'bn1', '', '', 'layer1', 'layer2', 'layer3', 'layer4']
    torch.save({names[int(key[0])] + key[1:]: value for key, value
                in weights.state_dict().items()}, 'served/mine-0.pth')
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory='served')

        def log_message(self, *a):
            asked.append(self.path)
    server = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import hashlib
    with open('served/mine-0.pth', 'rb') as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    url = f'http://localhost:{server.server_port}/'
    monkeypatch.setitem(network.KNOWN, 'mine-0', (url, f'sha256:{digest}'))
    settings.PRETRAINED = 'mine-0'
    for _ in range(2):
        net = baselines.build_network()
        train.load_pretrained(net)
        assert torch.equal(net.extractor[7][1].conv2.weight,
                           weights[7][1].conv2.weight)
    assert asked == ['/mine-0.pth']
    with open('models/mine-0.pth', 'ab') as file:
        file.write(b'more')
    with pytest.raises(ValueError, match='models/mine-0.pth has the sha256'):
        train.load_pretrained(net)
    server.shutdown()
    os.remove('models/mine-0.pth')
    server.server_close()
    with pytest.raises(OSError, match='put it at models/mine-0.pth'):
        train.load_pretrained(net)


# ------------------------------------------------- runs
@pytest.mark.parametrize('stop, stopped, workers', ((4, 5, (2, 0)),
                                                    (6, 6, (0, 2))))
def test_a_stopped_run_goes_on_bit_for_bit(small, monkeypatch, stop, stopped,
                                           workers):
    """5 or 6 steps, then the rest of 8, equal 8 in one go: 12 images in
    batches of 2 end an epoch at step 6; dropout is on. A stop is read a step
    after it was asked for, but at once where the step is one that saves."""
    changes = {'ITER_MAX': 8, 'DROPOUT': 0.5, 'ITER_VAL': 3, 'ITER_SAVE': 60}
    vars(settings).update(changes, MODEL_DIR='whole', LOG_DIR='whole')
    whole = go(monkeypatch)

    def stopping(optimizer, step, set_rate=train.set_rate):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return set_rate(optimizer, step)
    vars(settings).update(MODEL_DIR='parts', LOG_DIR='parts',
                          NUM_WORKERS=workers[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, 'set_rate', stopping)
        go(monkeypatch)
    assert end.value.code == utils.STOPPED == 75
    assert utils.load('parts/latest.pth')['step'] == stopped
    settings.NUM_WORKERS = workers[1]
    with open('parts/log.csv', 'a') as file:        # as a crash may leave it
        file.write(f'{stopped + 1},9.9,9.9,,,9.9\n')
    parts = go(monkeypatch)

    a, b = state('whole/latest.pth'), state('parts/latest.pth')
    assert a.keys() == b.keys() and a['step'] == 8
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    for step in range(1, 9):
        for name in ('loss', 'lr', 'val_mIoU'):
            assert whole[step][name] == parts[step][name]
    assert [step for step, row in whole.items() if row['val_mIoU']] == [
        3, 6, 8]


def test_files_of_a_run(small, monkeypatch):
    vars(settings).update(ITER_SAVE=2, ITER_VAL=2)
    go(monkeypatch)
    assert sorted(os.listdir('models')) == [
        'best.pth', 'final.pth', 'latest.pth', 'step_2.pth', 'step_4.pth']
    final = utils.load('models/final.pth')
    assert final['settings'] == settings.as_dict() and final['step'] == 4
    assert final['classes'][1] == 'disc' and len(final['colours']) == 6
    assert 'optimizer' not in final
    assert utils.load('models/step_2.pth')['step'] == 2
    assert any(name.startswith('events') for name in os.listdir('logdir'))


def test_a_rewound_run_goes_on_from_an_older_checkpoint(small, monkeypatch):
    vars(settings).update(ITER_SAVE=2)
    go(monkeypatch)
    want = state('models/latest.pth')
    os.replace('models/step_2.pth', 'models/latest.pth')
    go(monkeypatch)
    for key, value in state('models/latest.pth').items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=0)


def test_a_changed_setting_stops_a_resume(small, monkeypatch):
    go(monkeypatch)
    vars(settings).update(LR=0.5, NUM_WORKERS=1)
    with pytest.raises(ValueError, match=r'\(LR 0.009 -> 0.5\)'):
        go(monkeypatch)


def test_a_loss_that_is_not_finite_stops_the_run(small, monkeypatch):
    """The images are named and no checkpoint holds the spoilt weights."""
    vars(settings).update(LR=1e30, ITER_SAVE=10)
    with pytest.raises(RuntimeError, match=r'step \d, images toy_\d+, toy_'):
        go(monkeypatch)
    for value in utils.load('models/latest.pth')['net'].values():
        assert value.isfinite().all()


@pytest.mark.parametrize('step', (2, 3))
def test_a_loss_is_read_a_step_late_but_before_a_save(small, monkeypatch,
                                                      step):
    """One that is not finite at step 2 is found at step 3, or, where step 3
    saves, before it does."""
    vars(settings).update(ITER_MAX=6, ITER_SAVE=30)     # saves every 3 steps
    steps = []

    def spoil(logits, label, weight, loss=train.segmentation_loss):
        steps.append(loss(logits, label, weight) * (
            math.nan if len(steps) + 1 == step else 1))
        return steps[-1]
    monkeypatch.setattr(train, 'segmentation_loss', spoil)
    with pytest.raises(RuntimeError, match=f'is nan at step {step}, images'):
        go(monkeypatch)
    assert len(steps) == 3
    assert not os.path.exists('models/latest.pth')


def test_a_run_that_computes_blocks_again_is_the_same(small, monkeypatch):
    go(monkeypatch)
    want = state('models/latest.pth')
    vars(settings).update(RECOMPUTE=True, MODEL_DIR='b', LOG_DIR='b')
    go(monkeypatch)
    for key, value in state('b/latest.pth').items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=0)


def test_compile_takes_the_backbone(small, monkeypatch):
    """Validation, of images of many sizes, does without."""
    calls = []

    def compile(net):
        def forward(x, forward=net.forward):
            calls.append(x.shape)
            return forward(x)
        net.forward = torch.compiler.disable(forward)
    monkeypatch.setattr(network.ResNet, 'compile', compile)
    settings.COMPILE = True
    net, *_ = train.build(torch.device('cpu'), fresh=True)
    net(torch.zeros(2, 3, 33, 33))
    assert calls == [(2, 3, 33, 33)]
    settings.RECOMPUTE = True
    with pytest.raises(ValueError, match='do not go together'):
        train.check_settings()
    settings.RECOMPUTE = False
    monkeypatch.setattr(train.shutil, 'which', lambda name: None)
    with pytest.raises(ValueError, match=r'needs a C\+\+ compiler'):
        train.check_settings()


def test_it_learns(small, monkeypatch, toy):
    """Two pictures by heart: a small EMANet, to a high mIoU on them, which
    the fast ways of inference give as well."""
    lists = os.path.join(toy, 'ImageSets', 'Segmentation')
    with open(os.path.join(lists, 'train.txt')) as file:
        few = file.read().split()[:2]
    with open(os.path.join(lists, 'few.txt'), 'w') as file:
        file.write('\n'.join(few))
    vars(settings).update(
        TRAIN_SPLIT='few', VAL_SPLIT='few', ALLOW_OVERLAP=True,
        CROP_SIZE=97, STRIDE=8,
        BATCH_SIZE=2, LR=0.01, ITER_MAX=60, SCALES=(1.0,), EM_CHANNELS=64,
        EM_BASES=16, DROPOUT=0.0)
    rows = go(monkeypatch)
    assert float(rows[60]['val_mIoU']) > 0.7
    before = sum(float(rows[step]['loss']) for step in range(1, 6))
    after = sum(float(rows[step]['loss']) for step in range(56, 61))
    assert after < before / 4

    net, _ = eval.load_network('models/final.pth', 'cpu')
    data = dataset.Segmentation('val', train=False)     # of any pictures
    found = {}
    for settings.INFERENCE in eval.INFERENCES:
        run = eval.prepared(net)
        with torch.no_grad():
            found[settings.INFERENCE] = torch.cat([eval.classify(
                run, dataset.normalise(image[None], 'cpu')).flatten()
                for image, _, _ in (data[0], data[1])])
    for name, least in (('folded', 0.9999), ('bf16', 0.995)):
        agree = (found[name] == found['plain']).float().mean()
        assert agree >= least, (name, agree)


def test_the_net_that_is_not_resumed_is_seeded(small):
    nets = []
    for number in (1, 1, 2):
        utils.seed(number, False)
        nets.append(baselines.build_network().fc2.weight)
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


# ------------------------------------------------- as a user
def test_train_eval_predict_as_a_user(toy, tmp_path):
    given = words({**SMALL, 'DATA_ROOT': toy, 'ITER_VAL': 2,
                   'NUM_WORKERS': 2})
    done = run('train.py', *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r'step 2: val mIoU \d', done.stdout)
    assert 'device: ' in done.stdout and '4/4' in done.stderr
    done = run('eval.py', f'DATA_ROOT={toy}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r'mIoU \d+\.\d\d', done.stdout)
    picture = os.path.join(toy, 'JPEGImages', 'toy_0000.jpg')
    done = run('predict.py', picture, '--to', 'out', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / 'out')) == [
        'toy_0000.overlay.jpg', 'toy_0000.png']
    label = dataset.read_label(tmp_path / 'out' / 'toy_0000.png')
    assert label.shape == dataset.read_image(picture).shape[:2]
    assert label.max() < 6


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(toy, tmp_path):
    """To the whole process group, as a terminal sends it."""
    given = words({**SMALL, 'DATA_ROOT': toy, 'ITER_MAX': 5000,
                   'NUM_WORKERS': 1})
    process = subprocess.Popen(
        [sys.executable, os.path.join(REPO, 'train.py'), *given],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / 'logdir' / 'log.csv'
    for _ in range(600):
        if log.exists() and log.read_text().count('\n') > 3:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == utils.STOPPED, err
    assert 'Traceback' not in err and 'python train.py goes on' in out
    steps = log.read_text().strip().splitlines()[-1].split(',')[0]
    assert utils.load(str(tmp_path / 'models' / 'latest.pth'))['step'] == int(
        steps)


def test_predictions_of_a_picture_that_is_turned(small, tmp_path):
    """A phone's upright picture is stored lying, with a note in its EXIF."""
    from PIL import Image
    import predict
    lying = Image.new('RGB', (40, 20), 'red')
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save('p.jpg', exif=exif)
    assert predict.read_picture('p.jpg').shape == (40, 20, 3)
    Image.new('LA', (9, 7)).save('grey.png')
    assert predict.read_picture('grey.png').shape == (7, 9, 3)
    net = baselines.build_network().eval()
    pred = predict.segment(net, [predict.read_picture('p.jpg')], 'cpu')
    assert pred.shape == (1, 40, 20)
    assert eval.classify
