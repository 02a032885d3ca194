"""Sections of tools.gpu_check: the machine's limits, and the checks.

A section is a function of a Context. It returns plain values: 'skipped', a
reason; 'checks', each as `check` returns it; 'figures', [(what, value,
unit)]. Those of the speed are in tools/gpu_check.py.
"""
import csv
import functools
import itertools
import os
import subprocess
import time
import traceback
import warnings

import torch

import dataset
import network
import settings
import train
from lib import checkpoint, run
from tools.bench_loader import write_photographs
from tools.measure import (
    Stopwatch,
    has_bfloat16,
    has_tf32,
    make_step,
    random_batch,
    start_script,
    use_tf32,
)
from utils import ROOT, STOPPED, RunError

# of every section: no files but the generated ones, weights as drawn
FIXED = {'PRETRAINED': '', 'INIT_FROM': '', 'TRAIN_SPLIT': 'val',
         'VAL_SPLIT': '', 'N_CLASSES': 21, 'IGNORE_LABEL': 255, 'LR': 1e-3}
CPU = torch.device('cpu')
TIMEOUT = 600                # seconds for one run of train.py
ROUNDING = 1e-6              # errors below are no difference in float32
FLIPS = 0.05                 # nor of a gradient, where rounding decides
#                              whether a ReLU is on; measured: 0.013


class Context:
    """What sections work with.

    Args:
        device: that is checked.
        steps: timed steps of a row; train.py itself runs ten times as many.
        work: an empty folder, for generated photographs and runs.
    """

    def __init__(self, device, steps, work):
        self.device, self.steps, self.work = device, steps, work
        self.watch = Stopwatch(device, rounds=3)
        self.fixed = {**FIXED, 'DATA_ROOT': os.path.join(work, 'photographs')}
        write_photographs(self.fixed['DATA_ROOT'],
                          max(settings.BATCH_SIZE, 2 * steps),
                          min(500, settings.CROP_SIZE))
        vars(settings).update(self.fixed)


def check(what, found, limit, is_ok=None):
    """Return a check as the report has it; is_ok: None for found <= limit."""
    return {'what': what, 'found': found, 'limit': limit,
            'ok': bool(found <= limit if is_ok is None else is_ok)}


# ------------------------------------------------- the machine
def peaks(context):
    """The machine's limits: arithmetic, memory, copies to the device."""
    device, watch, figures = context.device, context.watch, []
    is_gpu = device.type == 'cuda'
    for kind, is_there in (('float32', True), ('tf32', has_tf32(device)),
                           ('bfloat16', has_bfloat16(device)),
                           ('float16', is_gpu)):
        if is_there:
            figures += [(f'{kind}, {what}', speed / 1e12, 'TFLOP/s')
                        for what, speed in zip(
                            ('convolution', 'matrix product'),
                            watch.peak(kind))]
    x = torch.ones(2 ** (28 if is_gpu else 24), device=device)
    copies = {'memory, reading and writing': (torch.empty_like(x), x, 2)}
    if is_gpu:
        pinned = torch.empty(2 ** 26, pin_memory=True)
        copies['from pinned memory to the GPU'] = (x[:2 ** 26], pinned, 1)
    for what, (to, source, times) in copies.items():
        copy = functools.partial(to.copy_, source, non_blocking=True)
        seconds = min(watch.time(copy) for _ in range(6))
        figures.append((what, times * source.nbytes / seconds / 1e9, 'GB/s'))
    return {'figures': figures}


# ------------------------------------------------- arithmetic
def shrink(**changes):
    """Set sizes at which the CPU computes a step in seconds too, in float64;
    buffers that are the batch's; and other settings."""
    s = settings
    vars(s).update({'CROP_SIZE': min(s.CROP_SIZE, 129), 'ACCUM': 1,
                    'BATCH_SIZE': min(s.BATCH_SIZE, 2), 'DROPOUT': 0.0,
                    'BN_MOM': 1.0, 'AMP': 'off', 'COMPILE': False,
                    'RECOMPUTE': False, **changes})


@torch.no_grad()
def damp_branches(net):
    """Have residual branches add a tenth of what they would, which is nearer
    to a trained net: as drawn, rounding grows from layer to layer."""
    for part in net.modules():
        if isinstance(part, (network.BasicBlock, network.Bottleneck)):
            getattr(part, 'bn3', part.bn2).weight.fill_(0.1)


def run_pass(device, dtype=torch.float32, scale=2.0 ** 16):
    """Return what a step's forward and backward pass gives, {name: flat
    tensor, float64 on the CPU}: logits (not of a compiled network), loss,
    gradient, buffers. scale: of the loss in float16, halved while gradients
    overflow, as in training."""
    net, optimizer, scaler, _ = train.build(device, is_new=False)
    net.to(dtype)
    damp_branches(net)
    if scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), 'scale': scale})
    train.set_train_mode(net)
    logits = []
    if not settings.COMPILE:
        net.register_forward_hook(
            lambda net, args, out: logits.append(out.detach()))
    torch.set_default_dtype(dtype)          # dataset.normalise's
    try:
        loss, _ = train.backward(net, iter([random_batch(device)]), scaler,
                                 device, None)
    finally:
        torch.set_default_dtype(torch.float32)
    scaler.unscale_(optimizer)
    parts = {'logits': logits, 'loss': [loss],
             'gradient': [p.grad for p in net.parameters()
                          if p.grad is not None],
             'buffers': [x for x in net.buffers() if x.is_floating_point()]}
    found = {name: torch.cat([x.double().cpu().flatten() for x in tensors])
             for name, tensors in parts.items() if tensors}
    if scaler.is_enabled() and scale > 1 and not torch.isfinite(
            found['gradient']).all():
        return run_pass(device, dtype, scale / 2)
    return found


def relative_error(found, reference):
    """Return the norm of the difference to a reference, relative to it."""
    return float((found - reference).norm() / reference.norm())


def compare(name, found, truth, other, factor):
    """Return checks of results of run_pass: that their error is at most
    `factor` times that of others; of a loss, being one number, that of the
    others' logits. truth: in float64."""
    checks = []
    for part, value in found.items():
        like = 'logits' if part == 'loss' else part
        limit = factor * relative_error(other[like], truth[like])
        checks.append(check(f'{name}: {part}, relative error',
                            relative_error(value, truth[part]),
                            max(limit, FLIPS if part == 'gradient'
                                else ROUNDING)))
    return checks


def float32(context):
    """A step in float32, TF32 off: its error may be 16 times the CPU's (the
    fastest algorithms of cuDNN round more), TF32's would be 1,000 times."""
    shrink()
    with use_tf32(False):
        found = run_pass(context.device)
    return {'checks': compare('float32', found, run_pass(CPU, torch.float64),
                              run_pass(CPU), 16)}


def compiled_float32(context):
    """The same of the compiled network and loss."""
    shrink()
    truth, other = run_pass(CPU, torch.float64), run_pass(CPU)
    settings.COMPILE = True
    with use_tf32(False):
        found = run_pass(context.device)
    return {'checks': compare('compiled, float32', found, truth, other, 16)}


def low_precision(context):
    """A step in TF32, bfloat16 and float16: the error may be twice that of
    bfloat16, the roughest of them, on the CPU."""
    device, checks = context.device, []
    shrink()
    truth = run_pass(CPU, torch.float64)
    settings.AMP = 'bf16'
    other = run_pass(CPU)
    for name, amp, is_there in (
            ('TF32', 'off', has_tf32(device)),      # torch's default
            ('bfloat16', 'bf16', device == CPU or has_bfloat16(device)),
            ('float16', 'fp16', True)):
        if is_there:
            settings.AMP = amp
            checks += compare(name, run_pass(device), truth, other, 2)
    return {'checks': checks}


def overflow(context):
    """Gradients that overflow in float16: the step is skipped, the loss scale
    halved, until steps are taken again."""
    shrink(AMP='fp16')
    device = context.device
    built = train.build(device, is_new=False)
    net, optimizer, scaler, _ = built
    scaler.load_state_dict({**scaler.state_dict(), 'scale': 2.0 ** 32})
    step = make_step(built, itertools.repeat(random_batch(device)), device)
    before = [p.detach().clone() for p in net.parameters()]
    poison = [torch.full_like(p, torch.nan) for p in 4 * before]
    del poison              # memory that is taken and not written is seen

    def count_changed():
        return sum(not torch.equal(p, q)
                   for p, q in zip(net.parameters(), before))
    step()
    changed, scale, steps = count_changed(), scaler.get_scale(), 1
    momentum = sum(int(x.count_nonzero()) for x in momenta(optimizer))
    while steps < 40 and not count_changed():
        step()
        steps += 1
    broken = sum(int((~torch.isfinite(x)).sum()) for x in (
        *net.parameters(), *momenta(optimizer)))
    return {'checks': [
        check('overflow: tensors that the skipped step changed', changed, 0),
        check('overflow: momentum after it, values that are not 0', momentum,
              0),
        check('overflow: loss scale after it, of 2^32', scale, 2.0 ** 31,
              scale == 2.0 ** 31),
        check('overflow: steps until one is taken', steps, 30),
        check('overflow: weights and momentum that are not finite', broken,
              0)]}


def momenta(optimizer):
    """Return the momentum buffers of an optimizer that has taken a step."""
    return [state['momentum_buffer'] for state in optimizer.state.values()
            if state.get('momentum_buffer') is not None]


# ------------------------------------------------- synchronisation
def sync(context):
    """A step with the loader that waits for the device nowhere."""
    device = context.device
    if device.type != 'cuda':
        return {'skipped': 'the CPU does not work ahead'}
    data = dataset.Segmentation('val', train=True)
    built = train.build(device, is_new=False)   # the loader pins memory then
    step = make_step(built, dataset.to_device(dataset.train_loader(data),
                                              device), device)
    for _ in range(3):                          # metrics are read at the 10th
        step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step()
        found = []
    except RuntimeError as error:
        found = [describe_place(error)]
        torch.cuda.set_sync_debug_mode('default')
        step = make_step(built, itertools.repeat(random_batch(device)), device)
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            step()
        found += sorted({f'{os.path.relpath(each.filename, ROOT)}:'
                         f'{each.lineno}' for each in caught
                         if 'synchronizing' in str(each.message)})
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return {'checks': [check('synchronisations in a step',
                             ', '.join(found) or 'none', 'none', not found)]}


def describe_place(error):
    """Return an error's type, first line, and last line of our code."""
    places = [f'{os.path.relpath(frame.filename, ROOT)}:{frame.lineno}'
              for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename.startswith(ROOT)]
    first = (str(error).strip() or '-').splitlines()[0]
    return f'{type(error).__name__}: {first} ({" ".join(places[-1:])})'


# ------------------------------------------------- CPU to GPU and back
def resume_step(device, path, to):
    """Resume a checkpoint on a device, '' for none, take a step, save; return
    (the number of values that resuming altered, the momentum)."""
    built = train.build(device, is_new=False)
    net, optimizer, scaler, _ = built
    damp_branches(net)
    parts, altered, step = {'net': net, 'optimizer': optimizer,
                            'scaler': scaler}, 0, 0
    if path:
        step, _ = run.restore(run.read_latest(path), parts, path)
        altered = count_differences(
            checkpoint.load(path), {name: part.state_dict()
                                    for name, part in parts.items()})
    make_step(built, itertools.repeat(random_batch(device)), device)()
    checkpoint.save(run.capture(parts, step + 1, 0.0, True), to)
    return altered, torch.cat([x.double().cpu().flatten()
                               for x in momenta(optimizer)])


def count_differences(old, new):
    """Return how many tensors and values of nested dicts and lists are not
    the same bit for bit; of dicts, those keys that both have."""
    if isinstance(new, dict):
        return sum(count_differences(old[key], new[key])
                   for key in new if key in old)
    if isinstance(new, (list, tuple)):
        return abs(len(old) - len(new)) + sum(map(count_differences, old, new))
    if isinstance(new, torch.Tensor):
        return int(not torch.equal(old.cpu(), new.cpu()))
    return int(old != new)


def devices(context):
    """Checkpoints of the CPU resumed on the device, and back: a step there
    gives what one here gives. Momentum that is lost, or that is paired with
    other weights, is off by about its length."""
    shrink()
    first, there, here, last = (os.path.join(context.work, f'{name}.pth')
                                for name in ('first', 'there', 'here', 'last'))
    checks = []
    with use_tf32(False):
        resume_step(CPU, '', first)
        for name, path, to in (('from the CPU', first, there),
                               ('back to it', there, last)):
            altered, found = resume_step(context.device, path, to)
            same, reference = resume_step(CPU, path, here)
            checks += [
                check(f'{name}: values that resuming altered', altered + same,
                      0),
                check(f'{name}: momentum a step later, relative error',
                      relative_error(found, reference), 0.3)]
    return {'checks': checks}


# ------------------------------------------------- train.py itself
def start_training(context, name, **changes):
    """Start train.py, writing into a folder of its own; return (process,
    folder)."""
    folder, device = os.path.join(context.work, name), context.device
    os.makedirs(folder, exist_ok=True)
    given = {**settings.given(), **context.fixed, 'ITER_VAL': 0,
             'DEVICES': [-1 if device.type == 'cpu' else device.index],
             'MODEL_DIR': folder, 'LOG_DIR': folder, **changes}
    with open(os.path.join(folder, 'output.txt'), 'a') as file:
        return start_script('train.py', *(
            f'{key}={value}' for key, value in given.items()), stdout=file,
            stderr=subprocess.STDOUT), folder


def finish_training(process, folder, status=0):
    """Wait for train.py, which must end with this status."""
    try:
        found = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RunError(f'train.py took more than {TIMEOUT} s') from None
    finally:
        process.kill()
    if found != status:
        with open(os.path.join(folder, 'output.txt')) as file:
            last = file.read().strip().splitlines()[-1:]
        raise RunError(f'train.py ended with status {found}, not {status}: '
                       f'{" ".join(last)}')


def read_log(folder):
    """Return the rows of a run's log.csv, [] where there is none yet."""
    path = os.path.join(folder, 'log.csv')
    if not os.path.exists(path):
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def deterministic(context):
    """DETERMINISTIC=True: a run, the same again, the same stopped by SIGTERM
    and resumed, bit for bit."""
    s, states, checks = settings, [], []
    words = {'DETERMINISTIC': True, 'CROP_SIZE': min(s.CROP_SIZE, 129),
             'BATCH_SIZE': min(s.BATCH_SIZE, 4), 'ACCUM': 1, 'ITER_MAX': 40}
    for name in ('whole', 'again', 'stopped'):
        process, folder = start_training(context, name, **words)
        if name == 'stopped':
            while len(read_log(folder)) < 10 and process.poll() is None:
                time.sleep(0.02)
            process.terminate()
            began = time.perf_counter()
            finish_training(process, folder, STOPPED)
            checks.append(check('SIGTERM: seconds to the exit, status 75',
                                time.perf_counter() - began, 30))
            process, _ = start_training(context, name, **words)
        finish_training(process, folder)
        state = checkpoint.load(os.path.join(folder, 'latest.pth'))
        states.append({key: state[key] for key in (
            'step', 'net', 'optimizer', 'scaler', 'random')})
    return {'checks': checks + [
        check('DETERMINISTIC, the same run again: values that differ',
              count_differences(states[0], states[1]), 0),
        check('DETERMINISTIC, stopped and resumed: values that differ',
              count_differences(states[0], states[2]), 0)]}
