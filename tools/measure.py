"""What the long scripts share: train.py's step, timing in turns, the machine's
peaks, memory, Markdown tables, starting a script of the project."""
import contextlib
import gc
import itertools
import os
import platform
import subprocess
import sys
import time

import cv2
import numpy as np
import torch
import torchvision

import heads
import settings
import train
import utils
from lib import run as training_run
from lib.cost import complexity
from utils import ROOT


# ------------------------------------------------- tables
def markdown_table(head, rows):
    """Return a Markdown table of strings, its columns aligned."""
    rows = [[cell.replace('|', r'\|') for cell in row] for row in rows]
    widths = [max(3, *map(len, column))
              for column in zip(head, *rows, strict=True)]
    lines = [head, ['-' * width for width in widths], *rows]
    return '\n'.join('| ' + ' | '.join(
        cell.ljust(width) for cell, width in zip(line, widths, strict=True)
    ) + ' |' for line in lines)


# ------------------------------------------------- scripts
def start_script(name, *words, **options):
    """Start a script of the project; options as subprocess.Popen has them."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, name), *words],
                            **options)


def finish_script(process, status=0):
    """Wait for a script that must end with this status; return its output.
    """
    out, error = process.communicate()
    assert process.returncode == status, error
    return out


# ------------------------------------------------- the machine
def describe_machine(device):
    """Return what the figures depend on, in words."""
    name = (torch.cuda.get_device_name(device) if device.type == 'cuda'
            else platform.processor() or platform.machine())
    return (f'{name}, {os.cpu_count()} cores, {torch.get_num_threads()} '
            f'threads, {torch.backends.cpu.get_cpu_capability()}\n'
            f'python {platform.python_version()}, torch {torch.__version__}, '
            f'torchvision {torchvision.__version__}, OpenCV '
            f'{cv2.__version__}, commit {utils.git_hash()}')


def has_bfloat16(device):
    """Tell whether the device computes in bfloat16 natively."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open('/proc/cpuinfo') as file:
            text = file.read()
    except OSError:
        return False
    return 'avx512_bf16' in text or 'amx_bf16' in text


def has_tf32(device):
    """Tell whether the device is a GPU that computes in TF32."""
    return device.type == 'cuda' and torch.cuda.get_device_capability(
        device) >= (8, 0)


@contextlib.contextmanager
def use_tf32(is_on):
    """Have a GPU compute float32 convolutions and matrix products in TF32,
    whose factors have 10 bits of mantissa, or in float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = is_on
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def conv_arithmetic(device, dtype=None):
    """Return in which arithmetic the device computes convolutions of a type,
    None for float32: the type's name, or 'tf32', torch's default on a GPU."""
    if dtype in (None, torch.float32):
        is_tf32 = has_tf32(device) and torch.backends.cudnn.allow_tf32
        return 'tf32' if is_tf32 else 'float32'
    return str(dtype)[6:]


def peak_bytes(run, device):
    """Return the most bytes of tensors on a GPU while run() works, None on a
    CPU. run() must be warm: cuDNN's search takes memory of its own."""
    if device.type != 'cuda':
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


# ------------------------------------------------- train.py's step
def count_flop(size):
    """Return the FLOP of a forward pass of the settings' network; a training
    step needs three times as many."""
    with torch.device('meta'):
        return 2 * complexity(heads.build_network(), (size, size))['macs']


def random_batch(device):
    """Return a micro-batch of noise as a loader's is, on the device: (image
    uint8 (b, 3, H, W), channels last; label uint8 (b, H, W); IDs)."""
    s = settings
    b, side = s.BATCH_SIZE // s.ACCUM, s.CROP_SIZE
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (b, side, side, 3), dtype=torch.uint8,
                          generator=random).permute(0, 3, 1, 2)
    label = torch.randint(0, s.N_CLASSES, (b, side, side), dtype=torch.uint8,
                          generator=random)
    label[:, :side // 8] = s.IGNORE_LABEL
    return image.to(device), label.to(device), ['noise'] * b


def steps_per_read(device):
    """Return after how many steps train.py reads its metrics."""
    return 1 if device.type == 'cpu' else 10


def make_step(built, batches, device):
    """Return a function that does what a step of train.py's loop does, from
    the next batch to updated weights, reading its metrics as often.

    Args:
        built: what train.build returned.
        batches: an iterator of micro-batches on the device.
    """
    net, optimizer, scaler, _ = built
    steps, pending = itertools.count(1), []
    train.set_train_mode(net)

    def step():
        number = next(steps)
        lr = train.set_learning_rate(optimizer, number)
        loss, ids = train.backward(net, batches, scaler, device, None)
        pending.append((number, ids, lr, train.step_metrics(
            net, loss, optimizer, scaler)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if number % steps_per_read(device) == 0:
            training_run.read_metrics(pending, False)
    return step


# ------------------------------------------------- time
class Stopwatch:
    """Time functions on a device.

    Args:
        device: whose work is waited for.
        rounds: how often each function of a race runs, once warm.
    """

    def __init__(self, device, rounds):
        self.device, self.rounds, self.peaks = device, rounds, {}

    def time(self, run):
        """Return the seconds of one run, the device's work included."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def race(self, title, runners, unit='ms', per=1, **columns):
        """Time functions in turn, round after round, and print a table.

        Args:
            title: the line above the table.
            runners: {name: function}; the first is the reference.
            unit: 's' or 'ms'.
            per: items that one run handles.
            columns: flop and arithmetic, as print_times has them.
        Returns: {name: median seconds per item}.
        """
        for run in runners.values():
            run()                               # warm
        seconds = {name: [] for name in runners}
        for _ in range(self.rounds):
            for name, run in runners.items():
                seconds[name].append(self.time(run) / per)
        return self.print_times(title, seconds, unit, **columns)

    def print_times(self, title, seconds, unit='ms', flop=None,
                    arithmetic=None):
        """Print a table of times; return {name: median seconds}.

        Args:
            seconds: {name: those of each round, per item}; the first is the
                reference.
            flop: FLOP that one item needs, for a column of the speed.
            arithmetic: {name: conv_arithmetic}, for columns of it and of the
                share of its peak.
        """
        factor = {'s': 1, 'ms': 1e3}[unit]
        first = np.array(next(iter(seconds.values())))
        shares = {name: flop / np.median(seconds[name]) / max(self.peak(kind))
                  for name, kind in (arithmetic or {}).items()}
        rows = []
        for name, taken in seconds.items():
            low, mid, high = factor * np.percentile(taken, (25, 50, 75))
            rows.append([name, f'{mid:.2f}', f'{low:.2f} .. {high:.2f}',
                         f'{np.median(first / taken):.2f}'])
            if flop:
                rows[-1].append(f'{flop / (mid / factor) / 1e9:.0f}')
            if arithmetic:
                rows[-1] += [arithmetic[name], f'{100 * shares[name]:.0f}%']
        print(f'\n{title}\n')
        print(markdown_table(
            ['', unit, 'quartiles', 'speedup'] + ['GFLOP/s'] * bool(flop)
            + ['convolutions in', 'of its peak'] * bool(arithmetic), rows),
            flush=True)
        return {name: float(np.median(taken))
                for name, taken in seconds.items()}

    def peak(self, arithmetic):
        """Return the FLOP/s of a large convolution (3x3, 512 channels) and of
        a large matrix product. arithmetic: see conv_arithmetic."""
        if arithmetic not in self.peaks:
            dtype = getattr(torch, arithmetic.replace('tf32', 'float32'))
            with use_tf32(arithmetic == 'tf32'), torch.no_grad():
                self.peaks[arithmetic] = self._measure_peak(dtype)
            print('\npeak, {}: convolution {:.0f} GFLOP/s, matrix product '
                  '{:.0f}'.format(arithmetic, *(
                      speed / 1e9 for speed in self.peaks[arithmetic])))
        return self.peaks[arithmetic]

    def _measure_peak(self, dtype):
        is_cpu = self.device.type == 'cpu'
        c, (b, side, n, repeats) = 512, (
            (1, 65, 2048, 1) if is_cpu else (4, 129, 8192, 10))
        x = torch.randn(b, c, side, side, device=self.device).to(
            dtype, memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(c, c, 3, 1, 1, bias=False).to(
            self.device, dtype, memory_format=torch.channels_last)
        square = torch.randn(n, n, device=self.device).to(dtype)

        def repeat(run, x):
            for _ in range(repeats):
                run(x)
        seconds = [(self.time(lambda: repeat(conv, x)),
                    self.time(lambda: repeat(square.mm, square)))
                   for _ in range(6)][1:]
        conv_s, square_s = np.min(seconds, 0) / repeats
        return (float(2 * 9 * c * c * b * side * side / conv_s),
                float(2 * n ** 3 / square_s))


# ------------------------------------------------- the speed of steps
def release_memory():
    """Give memory that nothing uses any more back to the GPU, if any."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def time_steps(watch, steps, what, kernels=None):
    """Time so many of train.py's steps on one batch, by the settings; return
    a row as describe_speed does.

    kernels: a list to fill with the slowest kernels, or None.
    """
    device = watch.device
    held = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
    step = make_step(train.build(device, is_new=False),
                     itertools.repeat(random_batch(device)), device)
    first = watch.time(step)        # cuDNN's search, compilation
    for _ in range(min(steps, 5)):
        step()
    peak = peak_bytes(step, device)
    every = steps_per_read(device)
    count = -(-steps // every) * every
    seconds = float(np.median([
        watch.time(lambda: [step() for _ in range(count)]) / count
        for _ in range(watch.rounds)]))
    if kernels is not None:
        kernels += slowest_kernels(step, device)
    return describe_speed(
        watch, what, settings.BATCH_SIZE, seconds, train.amp_dtype(device),
        3 * count_flop(settings.CROP_SIZE), first_s=first,
        peak_bytes=peak and peak - held)


def describe_speed(watch, what, images, seconds, dtype, flop, **others):
    """Return a row of a table of speeds, plain values: `images` took so many
    seconds. dtype: of convolutions, None for float32; flop: that an image
    needs, None where that is not known; the share is of the greater peak."""
    arithmetic = conv_arithmetic(watch.device, dtype)
    return {'what': what, 'images_per_s': images / seconds,
            'seconds': seconds, 'arithmetic': arithmetic,
            'of_peak': flop and flop * images / seconds / max(
                watch.peak(arithmetic)), **others}


def slowest_kernels(step, device, steps=3, count=25):
    """Return [(name, calls a step, seconds a step, share of all)] of the
    kernels of a GPU, or the operators of a CPU, that take the longest."""
    activity, is_gpu = torch.profiler.ProfilerActivity, device.type == 'cuda'
    with torch.profiler.profile(activities=[activity.CPU] + [
            activity.CUDA] * is_gpu) as profiler:
        for _ in range(steps):
            step()
        if is_gpu:
            torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA
    times = [(event.key, event.count, event.self_device_time_total
              if is_gpu else event.self_cpu_time_total)     # microseconds
             for event in profiler.key_averages()
             if (event.device_type == cuda) == is_gpu
             and not event.is_user_annotation]
    total = sum(taken for *_, taken in times) or 1
    return [(name[:120], calls / steps, taken / 1e6 / steps, taken / total)
            for name, calls, taken in sorted(
                times, key=lambda row: -row[2])[:count]]
