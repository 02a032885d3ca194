"""Training steps and predictions on fake CUDA tensors: no operator mixes
devices, waits for the GPU or copies to or from it, and each computes in its
type. No GPU is needed.

    python -m pytest tests/test_fake_gpu.py [-m long]

Without a driver a backward pass cannot run on fake CUDA tensors; gradients of
zeros stand in for it. tests/test_ratchet.py counts it on fake CPU tensors.
"""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dataset
import eval
import heads
import network
import settings
import train
from lib import cost, folding

TINY = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'CROP_SIZE': 65,
        'EM_CHANNELS': 16, 'EM_BASES': 4, 'N_CLASSES': 5, 'BATCH_SIZE': 2}
DTYPES = {'off': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
BATCHED = {torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
pytestmark = pytest.mark.filterwarnings(       # a copied network's warning
    'ignore:Accessing the data pointer')


# ------------------------------------------------- the guard
def tensors(values):
    """Return the tensors in nested lists, tuples and dicts."""
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def waits(func, inputs):
    """Tell whether an operator's result, or its shape, depends on values, for
    which the host waits. Of indices only masks do."""
    if 'index' in func.__name__:
        return any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:])
    return bool(WAITING & {*func.tags})


def is_argument(x, func):
    """Tell whether an operator passes a tensor to a GPU's kernel by value:
    one on the CPU without dimensions, of an elementwise operator (but where,
    which copies it)."""
    return (x.device.type == 'cpu' and x.ndim == 0
            and torch.Tag.pointwise in func.tags
            and 'where' not in func.__name__)


class DeviceGuard(TorchDispatchMode):
    """Raise AssertionError where an operator waits for a GPU or has tensors,
    inputs or outputs, on two devices; record operators as [(operator, dtype
    of its first output)]."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in ('prim', 'profiler'):      # compute nothing
            return func(*args, **kwargs)
        inputs = tensors((args, kwargs))
        devices = {x.device.type for x in inputs if not is_argument(x, func)}
        assert devices != {'cuda'} or not waits(func, inputs), (
            f'{func} waits for the GPU')
        out = None      # of the one operator that has no fake kernel
        if func is not torch.ops.aten._fused_sgd_.default:
            out = func(*args, **kwargs)
        outputs = tensors(out)
        devices |= {x.device.type for x in outputs}
        assert len(devices) < 2, f'{func} is on {" and ".join(devices)}'
        self.operators.append((func, outputs[0].dtype if outputs else None))
        return out

    def dtypes(self, *operators):
        """Return [dtype of the output] of all that these operators did."""
        return [dtype for func, dtype in self.operators if func in operators]


# ------------------------------------------------- a GPU that is not there
def move(net, *args, **kwargs):
    """Do what nn.Module.to does, which cannot swap fake parameters."""
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    for part in net.modules():
        for name, x in [*part.named_parameters(recurse=False),
                        *part.named_buffers(recurse=False)]:
            value = x.detach().to(
                device, dtype if x.is_floating_point() else None,
                memory_format=layout if layout and x.ndim == 4
                else torch.preserve_format)
            if name in part._parameters:
                value = nn.Parameter(value, x.requires_grad)
            setattr(part, name, value)
    return net


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU that has bfloat16; the settings of a tiny network."""
    vars(settings).update(TINY)
    common = torch.cuda.amp.common      # without a driver autocast is off
    monkeypatch.setattr(common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                        lambda including_emulation=True: True)
    monkeypatch.setattr(nn.Module, 'to', move)
    monkeypatch.setattr(eval, 'fold_batch_norm', fold_there)
    monkeypatch.setattr(FakeTensorMode, '__deepcopy__',     # of a network
                        lambda mode, memo: mode, raising=False)
    dataset._to_device.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield torch.device('cuda')
    dataset._to_device.cache_clear()    # of tensors of this mode


def fake_images(device, *size):
    """Return images uint8 (b, 3, H, W) as the loader hands them over."""
    b, height, width = size
    return torch.zeros(b, height, width, 3, dtype=torch.uint8,
                       device=device).permute(0, 3, 1, 2)


def fake_batches(device):
    """Yield micro-batches of the settings."""
    size = (settings.BATCH_SIZE // settings.ACCUM, settings.CROP_SIZE,
            settings.CROP_SIZE)
    while True:
        label = torch.zeros(size, dtype=torch.uint8, device=device)
        yield fake_images(device, *size), label, ['a', 'b']


def train_step(device, monkeypatch, weight=None):
    """Do a step of train.main under a guard; return (net, guard, metrics)."""
    settings.validate(for_training=True)
    net, optimizer, scaler, average = train.build(device, is_new=False)
    batches, guard = fake_batches(device), DeviceGuard()

    def backward(loss):
        assert loss.requires_grad and loss.dtype == torch.float32
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    train.set_train_mode(net)
    dataset.normalise(next(batches)[0], device)     # caches mean and std
    with guard:
        train.set_learning_rate(optimizer, 1)
        loss, _ = train.backward(net, batches, scaler, device, weight)
        metrics = train.step_metrics(net, loss, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average:
            train.update_average(average, net, 1)
    return net, guard, metrics


def check_convolutions(net, guard, dtype):
    """Assert that all convolutions of a net ran and gave this type."""
    dtypes = guard.dtypes(torch.ops.aten.convolution.default)
    assert {*dtypes} == {dtype}
    assert len(dtypes) >= sum(isinstance(m, nn.Conv2d) for m in net.modules())


# ------------------------------------------------- training
@pytest.mark.parametrize('amp', DTYPES)
@pytest.mark.parametrize('head', heads.HEADS)
def test_a_step_stays_on_the_device(head, amp, gpu, monkeypatch):
    vars(settings).update(HEAD=head, AMP=amp)
    net, guard, metrics = train_step(gpu, monkeypatch)
    check_convolutions(net, guard, DTYPES[amp])
    assert torch.ops.aten._fused_sgd_.default in dict(guard.operators)
    assert {'loss', 'grad_norm'} <= {*metrics}
    assert {(x.device.type, x.dtype, x.ndim) for x in metrics.values()} == {
        ('cuda', torch.float32, 0)}


@pytest.mark.parametrize('amp', (
    'bf16', *(pytest.param(amp, marks=pytest.mark.long)
              for amp in ('off', 'fp16'))))
@pytest.mark.parametrize('grad', (False, True))
@pytest.mark.parametrize('norm', network.NORMS)
@pytest.mark.parametrize('keep', network.KEEPS)
def test_em_computes_in_float32(keep, norm, grad, amp, gpu, monkeypatch):
    vars(settings).update(EM_KEEP=keep, EM_NORM=norm, EM_GRAD=grad, AMP=amp)
    net, guard, metrics = train_step(gpu, monkeypatch)
    check_convolutions(net, guard, DTYPES[amp])
    products = guard.dtypes(*BATCHED)
    assert {*products} == {torch.float32}
    assert len(products) >= 2 * settings.STAGE_NUM + 1
    assert net.emau.mu.dtype == torch.float32
    assert len(metrics) == (5 if keep == 'moving_avg' else 4)


@pytest.mark.parametrize('changes', (
    {'AMP': 'auto'}, {'RECOMPUTE': True}, {'ACCUM': 2}, {'AVERAGE': 0.9},
    {'FREEZE': 'backbone'}, {'STEM': 'deep'}, {'LOSS': 'ohem'},
    {'LOSS': 'ohem', 'CLASS_WEIGHTS': (1.0, 2.0, 1.0, 1.0, 1.0)}), ids=str)
def test_a_step_of_other_settings(changes, gpu, monkeypatch):
    vars(settings).update({'AMP': 'bf16', **changes})
    weight = train.class_weights(None, gpu)
    net, guard, _ = train_step(gpu, monkeypatch, weight)
    check_convolutions(net, guard, torch.bfloat16)


def test_saved_bytes_are_those_of_a_gpu(gpu):
    """lib.cost counts on fake CPU tensors what autocast does on a GPU."""
    vars(settings).update(
        N_LAYERS=50, STEM='deep', STRIDE=8, CROP_SIZE=513, EM_CHANNELS=512,
        EM_BASES=64, N_CLASSES=21, AMP='bf16')
    net = heads.build_network().to(
        gpu, memory_format=torch.channels_last).train()
    image, label, _ = next(fake_batches(gpu))
    image = image.float()

    def forward():
        with torch.autocast('cuda', torch.bfloat16):
            logits = net(image)
        return train.segmentation_loss(logits, label)
    counted = cost.training_cost(heads.build_network, train.segmentation_loss,
                                 image.shape, torch.bfloat16)
    assert cost.saved_bytes(net, forward) == pytest.approx(
        counted['saved'], rel=0.002)


# ------------------------------------------------- evaluation
def fold_there(net):
    """Fold a net's batch norm as fold_batch_norm does, without its check on
    the CPU, which fake weights cannot pass."""
    folded = copy.deepcopy(net).eval()
    with torch.no_grad():
        folding._fold(folded, torch.empty(1, 3, 65, 49, device='cuda'))
    return folded.to(memory_format=torch.channels_last)


def predict(device, scales=(1.0,), flip=False):
    """Predict two images of 49 x 70 pixels under a guard, as eval.py does."""
    net = heads.build_network().to(device)
    run, image = eval.prepare_network(net), fake_images(device, 2, 49, 70)
    dataset.normalise(image, device)                # caches mean and std
    with torch.no_grad(), DeviceGuard() as guard:
        pred = eval.predict_classes(run, dataset.normalise(image, device),
                                    scales, flip)
    assert (pred.device.type, pred.dtype) == ('cuda', torch.uint8)
    assert pred.shape == (2, 49, 70)
    check_convolutions(net, guard, DTYPES[
        'bf16' if settings.INFERENCE == 'bf16' else 'off'])


@pytest.mark.parametrize('inference', ('plain', 'folded', 'bf16'))
@pytest.mark.parametrize('head', heads.HEADS)
def test_a_prediction_stays_on_the_device(head, inference, gpu):
    vars(settings).update(HEAD=head, INFERENCE=inference)
    predict(gpu)


@pytest.mark.parametrize('inference', ('plain', 'folded', 'bf16'))
@pytest.mark.parametrize('scales, window', (((0.5, 1.5), 0), ((1.0,), 49)))
def test_scales_and_windows_stay_on_the_device(scales, window, inference,
                                               gpu):
    vars(settings).update(EVAL_WINDOW=window, INFERENCE=inference)
    predict(gpu, scales, flip=True)


# ------------------------------------------------- what the guard refuses
REFUSED = {
    'made on the CPU': lambda x: torch.tensor((1.0, 2.0), device=x.device),
    'a number': lambda x: torch.tensor(1.0, device=x.device),
    'to the host': lambda x: x.cpu(),
    'to the GPU': lambda x: torch.ones(3).to(x.device, non_blocking=True),
    'copied into': lambda x: x.copy_(torch.ones(3)),
    'a scalar copied': lambda x: torch.ones(()).to(x.device),
    'a scalar chosen': lambda x: torch.where(x > 0, x, torch.ones(())),
    'read': lambda x: x.sum().item(),
    'compared': lambda x: torch.equal(x, x),
    'tested': lambda x: bool(x.sum() > 0),
    'a mask': lambda x: x[x > 0],
    'assigned by a mask': lambda x: x.index_put_((x > 0,), x),
    'indices of the CPU': lambda x: x[torch.tensor([0, 1])],
    'found': lambda x: x.nonzero(),
    'counted': lambda x: x.long().bincount(),
    'mixed': lambda x: torch.cat([x, torch.ones(3)])}
ALLOWED = {
    'a number': lambda x: x * 2.0 + 1,
    'a scalar of the CPU': lambda x: x * torch.tensor(2.0),
    'made on the GPU': lambda x: torch.full((), 2.0, device=x.device) + x,
    'indices': lambda x: x[torch.zeros(2, dtype=torch.long,
                                       device=x.device)],
    'a choice': lambda x: torch.where(x > 0, x, 0.0),
    'work of the host': lambda x: torch.tensor(3.0).item()}


@pytest.mark.parametrize('do', REFUSED.values(), ids=REFUSED)
def test_the_guard_refuses(do, gpu):
    x = torch.ones(3, device=gpu)
    with pytest.raises((AssertionError, FakeTensorDeviceMismatchError),
                       match='waits for|is on|to be on'), DeviceGuard():
        do(x)


@pytest.mark.parametrize('do', ALLOWED.values(), ids=ALLOWED)
def test_the_guard_allows(do, gpu):
    x = torch.ones(3, device=gpu)
    with DeviceGuard() as guard:
        do(x)
    assert guard.operators
