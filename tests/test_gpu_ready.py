"""Is what would go wrong on a GPU alone kept from it? Without one: by what
torch is asked for, by layouts, overflows and threads that a CPU has too.

    python -m pytest tests/test_gpu_ready.py
"""
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dataset
import eval
import heads
import network
import settings
import train
import utils
from conftest import REPO
from files import add, empty_set
from lib import checkpoint, distributed, run
from training import save_network, train_here


# ------------------------------------------------- devices
@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that there are two GPUs; return the calls that choose one."""
    calls = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', calls.append)
    return calls


def test_the_gpu_of_a_single_process_is_its_own(two_gpus):
    """Else streams, events and random state are those of GPU 0."""
    device = distributed.join(distributed.pick_devices([1]))
    assert device == torch.device('cuda', 1) and two_gpus == [device]
    distributed.join(distributed.pick_devices([-1]))
    assert two_gpus == [device]


def test_the_process_group_knows_its_device(two_gpus, monkeypatch):
    """Else NCCL guesses it by the rank, which is another on node 2."""
    for name, value in zip(('RANK', 'LOCAL_RANK', 'WORLD_SIZE'), '314'):
        monkeypatch.setenv(name, value)
    found = {}
    monkeypatch.setattr(dist, 'init_process_group',
                        lambda backend, **given: found.update(
                            given, backend=backend))
    device = distributed.join(distributed.pick_devices([]))
    assert device == found['device_id'] == torch.device('cuda', 1)
    assert found['backend'] == 'nccl' and two_gpus == [device]


def test_a_checkpoint_names_gpu_cuda_and_cudnn(monkeypatch):
    assert run.versions()['gpu'] is None
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'H200')
    found = run.versions()
    assert found['gpu'] == 'H200' and found['cuda'] == torch.version.cuda
    assert found['cudnn'] == torch.backends.cudnn.version()


def test_the_tests_use_no_gpu():
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''


# ------------------------------------------------- from one device to another
@pytest.fixture
def float64():
    """Compute in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('first, then', (('last', 'contiguous'), pytest.param(
    'contiguous', 'last', marks=pytest.mark.long)))
def test_a_run_resumes_on_another_kind_of_device(small, monkeypatch, float64,
                                                 first, then):
    """Momentum is laid out as the weights are there: in torch's fused step
    their memory is read side by side."""
    layouts = {'last': torch.channels_last,
               'contiguous': torch.contiguous_format}
    vars(settings).update(ITER_MAX=5, ITER_SAVE=3, VAL_SPLIT='', DROPOUT=0.0,
                          CROP_SIZE=33)

    def losses(layout):
        monkeypatch.setattr(train, 'memory_format', lambda _: layouts[layout])
        return [float(row['loss']) for row in train_here(
            monkeypatch).values()]
    want = losses(then)
    for name in ('latest.pth', 'final.pth'):
        os.remove(f'models/{name}')
    losses(first)
    os.remove('models/final.pth')
    os.replace('models/step_3.pth', 'models/latest.pth')
    assert losses(then) == pytest.approx(want, rel=1e-6)


def test_an_overflow_in_the_first_step_alters_nothing(small):
    """float16's scaler skips the step; the momentum is zero, then g."""
    net, optimizer, _, _ = train.build(torch.device('cpu'), is_new=True)
    scaler = torch.amp.GradScaler('cpu', enabled=True)
    scaler.scale(torch.ones(()))
    params = [p for p in net.parameters() if p.requires_grad]
    for group in optimizer.param_groups:
        group.update(weight_decay=0.0, lr=0.5)
    before = [p.detach().clone() for p in params]
    for value in (float('inf'), 1.0):
        for param in params:
            param.grad = torch.full_like(param, value * scaler.get_scale())
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = 0.5 * (value == 1)
        for param, old in zip(params, before):
            torch.testing.assert_close(param, old - moved)
            momentum = optimizer.state[param]['momentum_buffer']
            assert (momentum == (value == 1)).all()


# ------------------------------------------------- batch norm over processes
def test_batch_norm_over_processes_is_ours_on_a_gpu_too():
    """torch's own waits for the device three times a layer."""
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode(), torch.device('cuda'):
        net = distributed.sync_batch_norm(nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert type(net[1]) is distributed.GlobalBatchNorm


COMPILED = '''
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import heads, settings, train, utils
from lib import distributed
vars(settings).update(N_CLASSES=6, N_LAYERS=18, STEM='plain', PRETRAINED='',
                      STRIDE=16, EM_CHANNELS=32, EM_BASES=8, DROPOUT=0.0)
device = distributed.join([torch.device('cpu')] * 2)
results = []
for way in ('eager', 'network', 'step'):
    net, optimizer, _, _ = train.build(device, is_new=True)
    if way == 'network':
        net.compile(backend='aot_eager', fullgraph=True)
    compute = train.forward_loss if way != 'step' else torch.compile(
        train.forward_loss, backend='aot_eager')
    model, found = distributed.wrap_ddp(net), []
    for step in range(3):
        torch.manual_seed(10 * step + utils.rank())
        image, label = torch.randn(2, 3, 33, 33), torch.randint(0, 6, (
            2, 33, 33), dtype=torch.uint8)
        loss = compute(model, image, label, None, None)
        loss.backward()
        found += [loss.detach(), net.fc0.conv.weight.grad.norm()]
        optimizer.step()
        optimizer.zero_grad()
    results.append(torch.stack(found + [b.double().norm().float()
                                        for b in net.buffers()]))
    torch.testing.assert_close(results[-1], results[0], rtol=1e-3, atol=1e-4)
'''


@pytest.mark.long
def test_two_processes_compile_without_a_break(tmp_path):
    """The network, its batch norm and its bases over both processes, is one
    graph; the step, as train.py compiles it, breaks only where DDP prepares
    itself. Three steps equal eager ones."""
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=2',
         '--standalone', '--no-python', sys.executable, '-c', COMPILED, REPO],
        capture_output=True, text=True, timeout=280, cwd=tmp_path,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-4000:]


# ------------------------------------------------- searches, host copies
def test_cudnn_searches_no_kernels_in_a_validation(small, monkeypatch):
    """Whose sizes all differ; afterwards it is as before."""
    found = []

    def measure(net, data):
        found.append(torch.backends.cudnn.benchmark)
        return torch.eye(6, dtype=torch.int64), 1.0
    monkeypatch.setattr(eval, 'measure', measure)
    logger = type('Logger', (), {'add_images': lambda *a: None})()
    net, data = heads.build_network(), dataset.Segmentation('val', False)
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, 'benchmark', before)
        train.validate({'val_mIoU': net}, data, 1, logger)
        assert torch.backends.cudnn.benchmark == before
    assert found == [False, False]


def test_mean_and_std_are_copied_to_a_device_once(monkeypatch):
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    want = (1 - np.array(settings.MEAN)) / settings.STD
    found = dataset.normalise(image, torch.device('cpu'))
    assert found[0, :, 0, 0].tolist() == pytest.approx(want.tolist(), rel=1e-6)
    monkeypatch.setattr(torch, 'tensor', None)
    assert torch.equal(dataset.normalise(image, torch.device('cpu')), found)
    monkeypatch.undo()
    settings.MEAN = (1.0, 1.0, 1.0)
    assert not dataset.normalise(image, torch.device('cpu')).any()


# ------------------------------------------------- upsampling
@pytest.mark.parametrize('size, to', (((5, 7), (33, 50)), ((1, 1), (4, 3)),
                                      ((9, 4), (1, 1)), ((65, 65), (513, 513)),
                                      ((3, 5), (3, 5)), ((9, 9), (4, 5))))
def test_upsampling_by_products_is_interpolation(size, to):
    """Values and gradients, in float64; 1e-6 in float32."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    a = network.upsample_by_products(x, to)
    b = F.interpolate(x, to, mode='bilinear', align_corners=True)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grad = torch.randn_like(a)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0]
                                 for y in (a, b)), rtol=1e-12, atol=1e-10)
    assert network.upsample_by_products(x.detach().float(), to).double(
        ).sub(b).abs().max() < 1e-6


def test_upsampling_is_by_products_on_a_gpu_alone(monkeypatch):
    from torch._subclasses import FakeTensorMode
    monkeypatch.setattr(F, 'interpolate', None)
    with FakeTensorMode(), torch.device('cuda'):
        x = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16)
        y = network.upsample(x, (9, 9))
    assert y.shape == (1, 2, 9, 9) and y.dtype == torch.float32
    with pytest.raises(TypeError):
        network.upsample(torch.zeros(1, 2, 3, 3), (9, 9))


# ------------------------------------------------- saving in a thread
@pytest.fixture
def slow_disk(monkeypatch):
    """Let checkpoints be written once the returned event is set."""
    event, inner = threading.Event(), checkpoint.save

    def save(state, path):
        assert threading.current_thread() is not threading.main_thread()
        event.wait(60)
        inner(state, path)
    monkeypatch.setattr(run, 'save', save)
    yield event
    event.set()


def test_a_run_does_not_wait_for_the_disk(small, slow_disk):
    """What is written are the weights of the step that saved them."""
    net = heads.build_network()
    writer = run.CheckpointWriter({'net': net})
    want = {key: value.clone() for key, value in net.state_dict().items()}
    writer.save('a.pth', 7, 0.5)
    with torch.no_grad():
        for value in net.state_dict().values():     # the run goes on
            value.add_(1)
    assert not os.path.exists('models/a.pth')
    slow_disk.set()
    writer.save('b.pth', 8, 0.5)        # waits for the first
    first = checkpoint.load('models/a.pth')
    writer.wait()
    second = checkpoint.load('models/b.pth')
    assert (first['step'], second['step']) == (7, 8)
    for key, value in want.items():
        assert torch.equal(first['net'][key], value), key
        assert torch.equal(second['net'][key], value + 1), key


def test_a_checkpoint_that_cannot_be_written_ends_the_run(small, monkeypatch):
    """At the next one, and at the end: never in silence."""
    def save(state, path):
        raise utils.RunError(f'{path} cannot be written')
    monkeypatch.setattr(run, 'save', save)
    for then in ('save', 'wait'):
        writer = run.CheckpointWriter({'net': heads.build_network()})
        writer.save('a.pth', 1, 0.0)
        with pytest.raises(utils.RunError, match='a.pth cannot be written'):
            writer.save('b.pth', 2, 0.0) if then == 'save' else writer.wait()


def test_an_error_lets_a_checkpoint_be_finished(tmp_path):
    """Also where other processes are left at once."""
    child = '''
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import utils
utils.dist.is_initialized = lambda: True
def write():
    time.sleep(1)
    open('written', 'w').close()
def main():
    threading.Thread(target=write).start()
    raise utils.UserError('wrong')
utils.run_main(main)
'''
    done = subprocess.run([sys.executable, '-c', child, REPO], cwd=tmp_path,
                          timeout=100)
    assert done.returncode == 2 and (tmp_path / 'written').exists()


def test_a_checkpoint_is_written_whatever_interrupts_its_wait(tmp_path):
    """Python takes a thread for ended whose join() a signal interrupts."""
    child = '''
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import utils
from lib import run
def save(state, path):
    time.sleep(1)
    open('written', 'w').close()
def interrupt(number, frame):
    raise RuntimeError('DataLoader worker (pid 1) is killed')
run.save, run.capture = save, lambda *args: {}
def main():
    writer = run.CheckpointWriter({})
    writer.save('a.pth', 1, 0.0)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    writer.wait()
utils.run_main(main)
'''
    done = subprocess.run([sys.executable, '-c', child, REPO], cwd=tmp_path,
                          timeout=100)
    assert done.returncode == 1 and (tmp_path / 'written').exists()


# ------------------------------------------------- batches to score
def test_how_many_images_are_scored_at_once_on_a_gpu():
    """By their size at the largest scale; Cityscapes at scale 2 alone."""
    gpu = torch.device('cuda')
    for scales, size, count in (((1.0,), (375, 500), 8),
                                ((0.5, 1.0), (1024, 2048), 2),
                                ((0.5, 2.0), (1024, 2048), 1),
                                ((1.0,), (5000, 5000), 1)):
        settings.EVAL_SCALES = scales
        assert eval.eval_batch_size(gpu, size) == count, size
        assert eval.eval_batch_size(torch.device('cpu'), size) == 1
    settings.EVAL_BATCH = 3
    assert eval.eval_batch_size(gpu, (5000, 5000)) == 3


@pytest.mark.parametrize('changes, batches', (
    ({}, [['a', 'b', 'd'], ['c']]),
    ({'EVAL_FLIP': True}, [['a'], ['b', 'd'], ['c']]),
    ({'EVAL_SCALES': (1.0, 0.5)}, [['a'], ['b', 'd'], ['c']]),
    ({'EVAL_WINDOW': 33}, [['a'], ['b'], ['d'], ['c']])))
def test_images_padded_to_one_size_are_scored_together(small, tmp_path,
                                                       changes, batches):
    """And each as if it were alone."""
    root = empty_set(tmp_path / 'set')
    random = np.random.default_rng(0)
    for name, size in zip('abcd', ((34, 47), (40, 48), (60, 20), (40, 48))):
        add(root, name, random.integers(0, 6, size), split='val')
    vars(settings).update(DATA_ROOT=str(root), **changes)
    net = save_network()
    data = dataset.Segmentation('val', train=False)
    found = {}
    for settings.EVAL_BATCH in (1, 8):
        confusion = torch.zeros(6, 6, dtype=torch.int64)
        ids, found[settings.EVAL_BATCH] = [], {}
        for preds, label, names in eval.predictions(net, data):
            ids.append([*names])
            for pred, name in zip(preds, names):
                height, width = data.read(data.ids.index(name))[1].shape
                found[settings.EVAL_BATCH][name] = pred[:height, :width]
            confusion += utils.confusion_matrix(preds, label, 6, 255)
        assert confusion.sum() == 34 * 47 + 2 * 40 * 48 + 60 * 20
    assert ids == batches
    for name, pred in found[1].items():
        assert torch.equal(found[8][name], pred), name


# ------------------------------------------------- averaged weights
def test_an_averaged_network_shares_its_buffers(small):
    """So that no step copies them."""
    settings.AVERAGE = 0.5
    net, _, _, average = train.build(torch.device('cpu'), is_new=True)
    for (name, a), b in zip(net.named_buffers(), average.buffers()):
        assert a is b, name
    for (name, a), b in zip(net.named_parameters(), average.parameters()):
        assert a.data_ptr() != b.data_ptr() and not b.requires_grad, name


# ------------------------------------------------- a stop while writing
def test_a_stop_waits_for_latest_pth(small, slow_disk, monkeypatch):
    """Status 75 promises that the run can be resumed."""
    vars(settings).update(ITER_MAX=50, VAL_SPLIT='', ITER_SAVE=1000)
    monkeypatch.setattr(distributed.StopRequest, '__bool__', lambda _: True)

    def release():
        time.sleep(0.5)
        slow_disk.set()
    threading.Thread(target=release).start()
    with pytest.raises(SystemExit) as stop:
        train_here(monkeypatch)
    assert stop.value.code == utils.STOPPED
    assert checkpoint.load('models/latest.pth')['step'] == 1
