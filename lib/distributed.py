"""Several processes that train, score or write as one.

`join` starts one process for each device, or joins those that torchrun has
started; after it, rank() and world() of utils say who this process is.
"""
import contextlib
import datetime
import multiprocessing.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import settings
from lib import signals
from utils import (
    INTERRUPTED,
    STOPPED,
    RunError,
    UserError,
    end_at_once,
    is_launched,
    log,
    plural,
    world,
)

# of the 108 bytes of a socket's path: /pymp-12345678/listener-12345678\0
MAX_SOCKET_FOLDER = 108 - 14 - 18 - 1


# ------------------------------------------------- stop requests
class StopRequest:
    """True once SIGTERM or Ctrl-C has come, or the process that started this
    one is gone; a second Ctrl-C ends at once.

    Until begin() is called, a run starts, and a signal ends it at once: also
    where it waits for other processes, if it was spawned.
    """

    def __init__(self):
        self.name, self.has_begun, self.process = None, False, os.getpid()
        self._handle(signal.SIG_DFL if is_spawned() else self._note)

    def _handle(self, handler):
        for number in signals.SIGNALS:
            signal.signal(number, handler)

    def begin(self):
        """From here on, a request is noted; all processes get here."""
        gather(None)
        self.has_begun = True
        self._handle(self._note)

    def _note(self, number, frame):
        if os.getpid() != self.process:     # a loader's, as it is forked
            return
        if not self.has_begun:
            signals.print_stopped(number)
            end_at_once(STOPPED)
        if self.name and number == signal.SIGINT:
            if not is_spawned():
                signals.print_interrupted()
            end_at_once(INTERRUPTED)
        self.name = signal.Signals(number).name

    def __bool__(self):
        if is_spawned() and os.environ['SPAWNED_BY'] != str(os.getppid()):
            self.name = self.name or 'the end of the process that started us'
        return self.name is not None


# ------------------------------------------------- starting processes
def is_spawned():
    """Tell whether spawn() of another process started this one."""
    return 'SPAWNED_BY' in os.environ


def spawn(count):
    """Run this program's command in `count` processes; return their exit
    status: that of the first failure, else STOPPED if one has that, else 0.

    They find each other as torchrun's do, by the environment. Where one
    fails the others are ended. Where a signal has ended one that did not
    handle it, as a run that starts, this process takes it too.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    shared = {'OMP_NUM_THREADS': str(threads),
              'TORCH_CPP_LOG_LEVEL': 'ERROR', **os.environ,
              'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port),
              'WORLD_SIZE': str(count), 'SPAWNED_BY': str(os.getpid())}
    handlers = {n: signal.getsignal(n) for n in signals.SIGNALS}
    stop = StopRequest()
    stop.begin()
    processes = [subprocess.Popen(      # orig_argv: `-m` and its module too
        [sys.executable, *sys.orig_argv[1:]],
        env={**shared, 'RANK': str(i), 'LOCAL_RANK': str(i)})
        for i in range(count)]
    failed = _failure(_wait(processes, stop))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if -failed in signals.SIGNALS or failed == INTERRUPTED:
        signal.raise_signal(signal.Signals[stop.name] if stop else
                            signal.SIGINT if failed > 0 else -failed)
    if failed < 0:
        log(f'a process was ended by {signal.Signals(-failed).name}; the '
            f'others were stopped')
    return 1 if failed < 0 else failed or max(
        process.returncode for process in processes)


def _wait(processes, stop):
    """Wait until processes have ended, the others once one fails or a stop is
    requested; return the exit statuses of the first failure, else of all."""
    is_passed_on, failed = False, []
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        failed = failed or codes * bool(_failure(codes))
        if failed or stop and not is_passed_on:
            is_passed_on = True
            for process in processes:
                process.terminate()
        if failed:
            _end(processes, seconds=10)
        time.sleep(0.1)
    return failed or [process.returncode for process in processes]


def _failure(codes):
    """Return, of processes' exit statuses, the failure that tells most, 0 for
    none: a signal, which the others' failures follow from; then 2 before 1."""
    failures = [code for code in codes if code not in (None, 0, STOPPED)]
    return min(failures, key=lambda code: (code > 0, -code), default=0)


def _end(processes, seconds):
    """Wait for processes to end; kill those that take longer."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def join(devices):
    """Become one of several processes where a launcher, torchrun or spawn(),
    says so; return this process's device.

    Where nobody launched several but several devices are asked for, they are
    spawned here, and this process exits with their status.
    """
    if not is_launched():
        if len(devices) > 1:
            sys.exit(spawn(len(devices)))
        return use_device(devices[0])
    local = int(os.environ['LOCAL_RANK'])
    if devices[0].type != 'cpu' and local >= len(devices):
        raise UserError(f'process {local} of this machine has no device: '
                        f'there are {len(devices)}; start fewer')
    device = use_device(devices[local % len(devices)])
    is_gpu = device.type == 'cuda'
    dist.init_process_group('nccl' if is_gpu else 'gloo',
                            timeout=datetime.timedelta(minutes=10),
                            device_id=device if is_gpu else None)
    return device


def use_device(device):
    """Make a GPU this process's own, whose streams and random state torch
    takes where none is named; return the device."""
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def leave(status):
    """End this process in good order with the others: none before the first
    has written, since torchrun then kills it after a while."""
    if dist.is_initialized():
        gather(None)
        dist.destroy_process_group()
    if status:
        sys.exit(status)


# ------------------------------------------------- exchanging values
def gather(value):
    """Return the plain values of all processes, by rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def assert_agreed(value, what):
    """Return a value that is the same in all processes; raise RunError where
    it is not, as for a folder that machines do not share."""
    values = gather(value)
    if values != [value] * len(values):
        raise RunError(f'the processes differ on whether {what}: {values}; '
                       f'have all machines share that folder')
    return value


# ------------------------------------------------- devices
def pick_devices(numbers):
    """Return the torch.devices to work on, one process each: CUDA GPUs by
    their numbers, Apple's GPU, or the CPU.

    numbers: the DEVICES setting; [] means all there are, -1 is the CPU.
    """
    count = torch.cuda.device_count()
    missing = [n for n in numbers if n not in range(-1, count)]
    if missing:
        raise UserError(f'DEVICES={list(numbers)}: this machine has {count} '
                        f'CUDA GPUs, numbered from 0; -1 is the CPU, and '
                        f'DEVICES=[] takes what there is')
    if len({n >= 0 for n in numbers}) > 1 or (
            len({*numbers}) < len(numbers) and max(numbers) >= 0):
        raise UserError(f'DEVICES={list(numbers)}: name GPUs, each once, or '
                        f'the CPU (-1, once for each process)')
    if numbers or count:
        return [torch.device('cpu') if n < 0 else torch.device('cuda', n)
                for n in numbers or range(count)]
    mps = torch.backends.mps.is_available()
    return [torch.device('mps' if mps else 'cpu')]


def pick_devices_for(path):
    """Return the devices to run a checkpoint on: DEVICES; of an ONNX file the
    CPU."""
    if not path.endswith('.onnx'):
        return pick_devices(settings.DEVICES)
    devices = pick_devices(settings.DEVICES or [-1])
    if any(device.type != 'cpu' for device in devices):
        raise UserError(f'DEVICES={settings.DEVICES}: {path} is run on the '
                        f'CPU; DEVICES=-1')
    return devices


def local_world():
    """Return the number of processes on this machine that work together."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', world()))


def count_workers():
    """Return how many loader processes this training process may have:
    NUM_WORKERS, but no more in all than this machine has cores."""
    cores = (len(os.sched_getaffinity(0)) if sys.platform == 'linux'
             else os.cpu_count() or 1)
    return min(settings.NUM_WORKERS, max(1, cores // local_world()))


def share_socket_folder():
    """Have loader processes to come keep their sockets in a temporary folder
    of this process: one of their own would stay when they are killed.

    Raises UserError where a socket's path would be too long: a loader process
    then sends nothing, and would be waited for without end.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > MAX_SOCKET_FOLDER:
        raise UserError(f'TMPDIR={folder} is too long for the sockets of '
                        f'loader processes, more than {MAX_SOCKET_FOLDER} '
                        f'bytes; set another (TMPDIR=/tmp), or NUM_WORKERS=0')
    multiprocessing.util.get_temp_dir()


def inherit_socket_folder():
    """Have this loader process, at its end, remove the shared folder if the
    process that it worked for was killed."""
    parent, folder = os.getppid(), multiprocessing.util.get_temp_dir()

    def remove():
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)
    multiprocessing.util.Finalize(None, remove, exitpriority=-200)


def describe_device(device):
    """Return the device in words, for the log."""
    if device.type == 'cuda':
        return f'{device} ({torch.cuda.get_device_name(device)})'
    return f'{device} ({plural(torch.get_num_threads(), "thread")})'


# ------------------------------------------------- gradients, batch norm
def wrap_ddp(net):
    """Return the net, its gradients averaged over all processes.

    Where runs are equal bit for bit, the parameters stay in the order that
    they have at first: DDP would sort them after its first step, and a sum
    over three processes depends on its order.
    """
    if world() == 1:
        return net
    is_exact = settings.DETERMINISTIC or (
        next(net.parameters()).device.type == 'cpu')
    with warnings.catch_warnings():     # its new name is not in every torch
        warnings.filterwarnings('ignore', '.*broadcast_buffers')
        return DistributedDataParallel(
            net, broadcast_buffers=False, gradient_as_bucket_view=True,
            find_unused_parameters=is_exact,    # which does not sort them
            static_graph=not is_exact and settings.ACCUM == 1)


def skip_sync(model, skip):
    """Return a context in which processes exchange no gradients, if skip."""
    is_ddp = isinstance(model, DistributedDataParallel)
    return model.no_sync() if skip and is_ddp else contextlib.nullcontext()


def _to_float32(x):
    """Return x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """Batch norm by the statistics of all processes, whose batches are of one
    size. Keeps x alone for the backward pass, and exchanges one tensor each
    way, without waiting for the device."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):                     # (b, c, h, w)
        var, mean = torch.var_mean(_to_float32(x), (0, 2, 3), correction=0)
        both = torch.stack([var, mean])                         # (2, c)
        parts = both.new_empty(dist.get_world_size() * 2, len(var))
        dist.all_gather_into_tensor(parts, both)
        variances, means = parts.view(-1, 2, len(var)).unbind(1)    # (p, c)
        mean = means.mean(0)
        var = variances.mean(0) + means.var(0, correction=0)
        y = F.batch_norm(x, mean, var, weight, bias, eps=eps)
        scale = (var + eps).rsqrt()                             # (c,)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):                                # (b, c, h, w)
        x, weight, mean, scale = ctx.saved_tensors
        mean, scale = mean[:, None, None], scale[:, None, None]
        dy, x = _to_float32(grad), (_to_float32(x) - mean) * scale
        own = torch.stack([dy.sum((0, 2, 3)), (dy * x).sum((0, 2, 3))])
        total = own.clone()                                     # (2, c)
        dist.all_reduce(total)
        total /= dy.numel() // dy.shape[1] * dist.get_world_size()
        about, along = total[:, :, None, None]
        dx = (dy - about - x * along) * (scale * weight[:, None, None])
        return dx.to(grad.dtype), own[1], own[0], None


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which are of one size.

    torch's SyncBatchNorm is for GPUs alone; for batches that differ it waits
    for the device in each layer, where torch.compile breaks the graph.
    """

    def forward(self, x):                                       # (b, c, h, w)
        if not self.training:
            return super().forward(x)
        y, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same, with the dropout and the activation that timm's has."""

    def forward(self, x):                                       # (b, c, h, w)
        return self.act(self.drop(super().forward(x)))


def sync_batch_norm(net):
    """Return the net with batch statistics taken over all processes; its
    state_dict keeps its keys. Raises UserError for a batch norm that is
    unknown here, which would be left out."""
    for name, module in net.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        is_plain = type(module) is nn.BatchNorm2d
        if not is_plain and type(module).__name__ != 'BatchNormAct2d' or (
                module.weight is None):
            raise UserError(
                f'BACKBONE={settings.BACKBONE}: its {name}, a '
                f'{type(module).__name__}, cannot be taken over several '
                f'processes; use one (DEVICES), or another backbone')
        module.__class__ = (GlobalBatchNorm if is_plain else
                            GlobalBatchNormAct)     # same tensors
    return net
