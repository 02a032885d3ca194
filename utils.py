"""What every script needs and the paper does not speak of.

How a program ends, the device, log and progress, files that a crash cannot
spoil, downloads that are checked, confusion matrix and scores, colours, the
learning rate. n classes; H x W pixels.
"""
import contextlib
import csv
import datetime
import hashlib
import http.client
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
import weakref

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
STOPPED = 75                 # exit status: stopped on request, can go on
BARS = weakref.WeakSet()     # the progress bars there are


# ------------------------------------------------- how a program ends
def launch(main):
    """Run main() and exit as README says: 0, 1, 2 or 75.

    An error that one of this folder's own files raised is a message for the
    user: one line on stderr, status 2 where what was asked for is at fault
    (ValueError, FileNotFoundError), else 1. Any other error is a defect and
    keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f'{_script()}: interrupted')
    except (ValueError, OSError, RuntimeError) as error:
        if _lost_worker(error):
            error = OSError(f'a loader process died ({_first_line(error)}). '
                            f'Was memory short? Fewer NUM_WORKERS need less')
        elif world() > 1 and (isinstance(error, dist.DistError)
                              or 'gloo' in str(error)):
            error = OSError(f'process {rank()} lost another process '
                            f'({_first_line(error)})')
        elif not _for_user(error):
            raise
        for bar in list(BARS):          # the line shall stand by itself
            bar.close()
        if rank():          # what all processes say, the first says for all
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(f'{_script()}: {error}', file=sys.stderr)
        asked = isinstance(error, (ValueError, FileNotFoundError))
        sys.exit(2 if asked else 1)
    finally:
        end_workers()


def end_workers():
    """End the loader processes that an error has left: they heed no SIGTERM,
    which Python would send them at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # they shall die unnoticed
    for process in multiprocessing.active_children():
        process.kill()


def _lost_worker(error):
    """Say whether torch has raised this, wherever the main process was, as a
    DataLoader's process died."""
    return isinstance(error, RuntimeError) and 'DataLoader w' in str(error)


def _script():
    return os.path.basename(sys.argv[0])


def _for_user(error):
    """Say whether a `raise` in this folder made the error, in this process
    or (its class is ours then) in a loader's."""
    if type(error).__module__ == 'dataset':
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    folder = os.path.dirname(os.path.abspath(last.filename))
    ours = folder in (HERE, os.path.join(HERE, 'tests'))
    return ours and last.line.startswith('raise')


class StopRequest:
    """True once SIGTERM or Ctrl-C has come, or the process that spawned this
    one is gone; a second Ctrl-C ends at once."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self):
        if spawned() and os.environ['SPAWNED_BY'] != str(os.getppid()):
            self.name = self.name or 'the end of the process that started us'
        return self.name is not None


# ------------------------------------------------- processes
def rank():
    """Return this process's number; 0 logs and writes files."""
    return int(os.environ['RANK']) if launched() else 0


def world():
    """Return the number of processes that work together."""
    return int(os.environ['WORLD_SIZE']) if launched() else 1


def launched():
    """Say whether torchrun or spawn() has started this process."""
    return {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= set(os.environ)


def spawned():
    """Say whether spawn() of another process has started this one."""
    return 'SPAWNED_BY' in os.environ


def spawn(count):
    """Run this program's command in `count` processes; return their exit
    status, STOPPED if one has that, else the first that is not 0.

    They find each other as torchrun's do, by the environment. Where one
    fails the others are ended.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    shared = {'OMP_NUM_THREADS': str(threads), **os.environ,
              'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port),
              'WORLD_SIZE': str(count), 'SPAWNED_BY': str(os.getpid())}
    running = [subprocess.Popen(
        [sys.executable, *sys.argv],
        env={**shared, 'RANK': str(i), 'LOCAL_RANK': str(i)})
        for i in range(count)]
    stop, passed_on, failed = StopRequest(), False, 0
    while any(process.poll() is None for process in running):
        codes = [process.poll() for process in running]
        failed = failed or next((c for c in codes if c not in (
            None, 0, STOPPED)), 0)
        if failed or stop and not passed_on:
            passed_on = True
            for process in running:
                process.terminate()
        if failed:
            _end(running, seconds=10)
        time.sleep(0.1)
    codes = [process.returncode for process in running]
    failed = failed or next((c for c in codes if c not in (0, STOPPED)), 0)
    if failed < 0:
        log(f'a process was ended by {signal.Signals(-failed).name}; the '
            f'others were stopped')
    if failed:
        return failed if failed > 0 else 1
    return max(codes)


def _end(running, seconds):
    """Wait for processes to end; kill those that take longer."""
    until = time.monotonic() + seconds
    for process in running:
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
    if not launched():
        if len(devices) > 1:
            sys.exit(spawn(len(devices)))
        return devices[0]
    local = int(os.environ['LOCAL_RANK'])
    if devices[0].type != 'cpu' and local >= len(devices):
        raise ValueError(f'process {local} of this machine has no device: '
                         f'there are {len(devices)}; start fewer')
    device = devices[local % len(devices)]
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                            timeout=datetime.timedelta(minutes=10))
    return device


def leave(status):
    """End this process in good order with the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


class Told:
    """A step's figures {name: number on the device} and whether to stop, on
    their way from there: their mean over all processes, copied to memory that
    a GPU writes to by itself. Who reads them a step later has not kept it
    waiting."""

    def __init__(self, figures, stop):
        self.names, first = list(figures), next(iter(figures.values()))
        with torch.no_grad():
            numbers = torch.stack([*map(torch.Tensor.float, figures.values()),
                                   torch.full_like(first, stop,
                                                   dtype=torch.float32)])
            if world() > 1:
                dist.all_reduce(numbers)
                numbers /= world()
        self.numbers = torch.empty(len(numbers), pin_memory=numbers.is_cuda)
        self.numbers.copy_(numbers, non_blocking=True)
        self.copied = torch.cuda.Event() if numbers.is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self):
        """Return (figures, whether any process was asked to stop)."""
        if self.copied:
            self.copied.synchronize()
        *numbers, stop = self.numbers.tolist()
        return dict(zip(self.names, numbers)), stop > 0


def gather(value):
    """Return the plain values of all processes, by rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


# ------------------------------------------------- device, log, progress
def pick_devices(numbers):
    """Return the torch.devices to work on, one process each: CUDA GPUs by
    their numbers, Apple's GPU, or the CPU.

    numbers: the DEVICES setting; [] means all there are, -1 is the CPU.
    """
    count = torch.cuda.device_count()
    missing = [n for n in numbers if n not in range(-1, count)]
    if missing:
        raise ValueError(f'DEVICES={list(numbers)}: this machine has {count} '
                         f'CUDA GPUs, numbered from 0; -1 is the CPU, and '
                         f'DEVICES=[] takes what there is')
    if numbers or count:
        return [torch.device('cpu') if n < 0 else torch.device('cuda', n)
                for n in numbers or range(count)]
    mps = torch.backends.mps.is_available()
    return [torch.device('mps' if mps else 'cpu')]


def describe_device(device):
    """Return the device in words, for the log."""
    if device.type == 'cuda':
        return f'{device} ({torch.cuda.get_device_name(device)})'
    return f'{device} ({torch.get_num_threads()} threads)'


def seed(number, deterministic):
    """Seed torch's random state on every device; deterministic: have a GPU
    give the same bits every time, or raise where it cannot."""
    torch.manual_seed(number)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)


def agreed(value, what):
    """Return a value that is the same in all processes; raise RuntimeError
    where it is not, as for a folder that machines do not share."""
    values = gather(value)
    if values != [value] * len(values):
        raise RuntimeError(f'the processes differ on whether {what}: '
                           f'{values}; have all machines share that folder')
    return value


def random_state():
    """Return this process's random state, of the CPU and of its GPU."""
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(state):
    """Put back what random_state() returned."""
    torch.set_rng_state(state[0])
    if state[1:] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def log(text):
    """Print a line, once for all processes, without tearing a bar."""
    if rank():
        return
    tqdm.write(text)
    sys.stdout.flush()


def progress(iterable=None, **words):
    """Return a tqdm bar; in a file or a pipe it prints every 30 s only."""
    pause = 0.2 if sys.stderr.isatty() else 30
    bar = tqdm(iterable, mininterval=pause, maxinterval=pause,
               dynamic_ncols=True, disable=rank() > 0, **words)
    BARS.add(bar)
    return bar


class Log:
    """What a run writes down: figures as TensorBoard's scalars and, those of
    COLUMNS, as lines of log.csv; pictures; settings.

    Lines and events past step `start` are from a run that was cut off before
    its next checkpoint: they are taken out.
    """

    COLUMNS = ('step', 'loss', 'lr', 'grad_norm', 'val_mIoU',
               'val_mIoU_average', 'images_per_s')

    def __init__(self, folder, start=0):
        self.off = rank() > 0               # one process writes for all
        if self.off:
            return
        from tensorboardX import SummaryWriter
        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        path = os.path.join(folder, 'log.csv')
        kept = []
        if start and os.path.exists(path):
            with open(path, newline='') as file:    # of any columns
                kept = [[row.get(name) for name in self.COLUMNS]
                        for row in csv.DictReader(file)
                        if row['step'].isdigit() and int(row['step']) <= start]
        with atomic(path) as part, open(part, 'w', newline='') as file:
            csv.writer(file).writerows([self.COLUMNS, *kept])
        self.file = open(path, 'a', newline='')
        self.board = SummaryWriter(folder, purge_step=start + 1)

    def write(self, step, **figures):
        """Add one step's figures; what COLUMNS does not name goes to
        TensorBoard alone. The loss is written in full."""
        if self.off:
            return
        cells = [step] + [f'{figures[name]:.9g}' if name in figures else ''
                          for name in self.COLUMNS[1:]]
        csv.writer(self.file).writerow(cells)
        self.file.flush()
        for name, value in figures.items():
            group = 'Curves/' if name in self.COLUMNS else ''
            self.board.add_scalar(tag(group + name), value, step)

    def pictures(self, step, pictures):
        """Show (name, (H, W, 3) uint8) pairs in TensorBoard. They are drawn
        here: not at all in processes that write nothing."""
        if self.off:
            return
        for name, picture in pictures:
            self.board.add_image(tag(name), picture, step, dataformats='HWC')

    def settings(self, values):
        """Write the run's settings {name: value}: settings.json beside
        log.csv, for eval.py --compare; in TensorBoard a text, and
        hyper-parameters for its table of all experiments."""
        if self.off:
            return
        save_json(values, os.path.join(self.folder, 'settings.json'))
        self.board.add_text('settings', '\n'.join(
            f'    {name} = {value!r}' for name, value in values.items()))
        from tensorboardX.summary import hparams
        # the other summaries would list the columns of this run's table;
        # without, TensorBoard makes those of all runs, what differs first
        _, begin, _ = hparams({
            name: str(value) if isinstance(value, (list, tuple)) else value
            for name, value in values.items()}, {})
        self.board.file_writer.add_summary(begin)

    def close(self):
        if not self.off:
            self.file.close()
            self.board.close()


def tag(name):
    """Return a name as TensorBoard takes it, which says so where it has to
    change one."""
    return re.sub(r'[^-/\w.]', '_', name)


def versions():
    """Return {name: version} of what a run's numbers depend on."""
    return {'python': sys.version.split()[0], 'torch': str(torch.__version__),
            'numpy': str(np.__version__), 'threads': torch.get_num_threads()}


def needed(module):
    """Import and return a module that only some work needs; ValueError with
    the remedy where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition('.')[0]
        raise ValueError(f'{name} is needed for this: python -m pip install '
                         f'{name}') from None


def git_hash():
    """Return the commit of this folder, '-dirty' if it was edited since."""
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--abbrev=12'], cwd=HERE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        check=False) if shutil.which('git') else None
    return done.stdout.strip() if done and done.stdout else 'unknown'


# ------------------------------------------------- files
@contextlib.contextmanager
def atomic(path, flush=True):
    """Give a path to write to, which takes path's place when all went well.

    Whatever happens meanwhile, path is the old file or the new one, whole;
    without flush, which waits for the disk, a power cut may leave it empty.
    """
    part = f'{path}.tmp'        # one left by a kill is written over
    try:
        yield part
        if flush:
            with open(part, 'rb') as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def save(state, path):
    """Write a checkpoint so that a crash never costs the old one.

    Raises OSError that names the file when it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with atomic(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:     # torch's own: a full disk
        if _lost_worker(error):
            raise
        raise OSError(
            f'{path} cannot be written: is the disk full? '
            f'({_first_line(error)}) Make room or set MODEL_DIR elsewhere; '
            f'what it held before is whole') from None


def load(path):
    """Read a file that torch.save wrote; tensors and plain values only.

    Raises FileNotFoundError, or ValueError for a file that is truncated, no
    such file at all, or holds anything that could run code.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} is not there')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # unpickling fails in a dozen ways
        if 'global' in str(error).lower():      # the pickle names a function
            raise ValueError(f'{path} holds more than tensors and plain '
                             f'values, and is not loaded: it could run any '
                             f'code. Take it from another source') from None
        raise ValueError(f'{path} is truncated or no file of weights '
                         f'({_first_line(error)}); fetch it again') from None


def load_checkpoint(path):
    """Read a checkpoint of a network: train.py's, or a published {'net':
    ..., 'step': ...}. Raises as load does, and ValueError for others."""
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not isinstance(
            checkpoint.get('net'), dict):
        raise ValueError(f'{path} is no checkpoint of a network: it has no '
                         f'"net". Backbone weights go into PRETRAINED')
    return checkpoint


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_json(value, path):
    """Write a JSON file, whole or not at all."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with atomic(path) as part, open(part, 'w') as file:
        json.dump(value, file, indent=1)
        file.write('\n')


def save_label(label, path, colours):
    """Write a label (H, W) uint8 as a palette PNG; colours [[r, g, b]]."""
    image = Image.fromarray(label)          # mode L, then read as indices
    image.putpalette(full_palette(colours).tobytes())
    with atomic(path, flush=False) as part:     # the default level takes
        image.save(part, 'PNG', compress_level=4)   # twice the time


# ------------------------------------------------- downloads
def file_hash(path, kind='sha256'):
    """Return a file's hash in hexadecimal digits."""
    digest = hashlib.new(kind)
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path, expected):
    """Raise ValueError unless the file has the hash.

    expected: 'md5:HEX', 'sha1:HEX' or 'sha256:HEX'; HEX may be the first
    digits alone, as in the names of published weights.
    """
    kind, _, digits = expected.partition(':')
    found = file_hash(path, kind)
    if not digits or not found.startswith(digits):
        raise ValueError(f'{path} has the {kind} {found}, not {digits}: it is '
                         f'damaged or another file')


def download(url, path, expected):
    """Fetch url to path, with a bar, and check its hash, unless that is ''.

    A download that broke off goes on where it stopped (path + '.part'); a
    file with a wrong hash is removed. Raises OSError where nothing can be
    fetched (it says which file to put where), ValueError for a wrong hash.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    part = path + '.part'
    try:
        _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f'{url} cannot be fetched ({_first_line(error)}). Run '
                      f'again to go on, or get the file by hand and put it '
                      f'at {path}') from None
    try:
        if expected:
            check_hash(part, expected)
    except ValueError as error:
        os.remove(part)
        raise ValueError(f'{url}: {error}; it was removed') from None
    os.replace(part, path)


def _fetch(url, part):
    """Append to part what of url it lacks."""
    done = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'emanet'})
    if done:
        request.add_header('Range', f'bytes={done}-')
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:           # nothing is left to fetch
            return
        raise
    with reply:
        done = done if reply.status == 206 else 0
        length = int(reply.headers.get('Content-Length') or 0)
        total = done + length if length else None
        with open(part, 'ab' if done else 'wb') as file, progress(
                desc=os.path.basename(url), total=total, initial=done,
                unit='B', unit_scale=True) as bar:
            for block in iter(lambda: reply.read(1 << 18), b''):
                file.write(block)
                bar.update(len(block))
            done = file.tell()
    if total and done != total:
        raise OSError(f'broke off after {done} of {total} bytes')


# ------------------------------------------------- scores
def confusion_matrix(pred, label, n_classes, ignore_label):
    """Count pixels: rows are the label's classes, columns the prediction's.

    pred: 0 to n_classes - 1; label: at least 0; integer tensors of one shape,
    on one device. Pixels whose label is ignore_label, or no class, are left
    out. Returns (n, n) int64.
    """
    key = label.to(torch.int32) * n_classes + pred.to(torch.int32)
    count = torch.bincount(key.flatten(), minlength=n_classes ** 2)
    count = count[:n_classes ** 2].reshape(n_classes, n_classes)
    if 0 <= ignore_label < n_classes:
        count[ignore_label] = 0
    return count


def scores(confusion, classes=()):
    """Return dict(mIoU, pAcc, mAcc, fIoU, IoU), all 0..1.

    confusion: (n, n), rows label. Classes that occur neither in label nor in
    prediction are left out of the mean (IoU: a list with None for those), and
    classes without a label out of mAcc. classes: numbers of those that enter
    the means, () for all.
    """
    counts = np.asarray(confusion, np.float64)
    hit, label, pred = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid='ignore', divide='ignore'):
        iou, acc = hit / (label + pred - hit), hit / label
    chosen = list(classes) or list(range(len(counts)))
    iou_mean, acc_mean = (_mean(x[chosen]) for x in (iou, acc))
    total = label[chosen].sum()
    return {'mIoU': iou_mean, 'mAcc': acc_mean,
            'pAcc': _ratio(hit[chosen].sum(), total),
            'fIoU': _ratio((label * np.nan_to_num(iou))[chosen].sum(), total),
            'IoU': [None if np.isnan(x) else float(x) for x in iou]}


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def _ratio(part, whole):
    return float(part / whole) if whole else 0.0


# ------------------------------------------------- classes, colours, rate
def read_classes(root, n_classes):
    """Return the names and colours of a set's classes, [str], [[r, g, b]].

    From root/classes.txt; without one, numbers and VOC's colours. Raises
    ValueError where n_classes contradicts it.
    """
    path = os.path.join(root, 'classes.txt')
    if not os.path.isfile(path):
        return ([str(i) for i in range(n_classes)],
                voc_palette()[:n_classes].tolist())
    names, colours = read_class_file(path)
    if len(names) != n_classes:
        raise ValueError(f'N_CLASSES={n_classes}, but {path} names '
                         f'{len(names)} classes; set N_CLASSES={len(names)}')
    return names, colours


def read_class_file(path):
    """Return the names and colours in a file of lines "name r g b", [str],
    [[r, g, b]]. Raises FileNotFoundError, ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} is not there')
    with open(path) as file:
        rows = [line.split() for line in file if line.strip()]
    for row in rows:
        if len(row) < 4 or not all(x.isdecimal() and int(x) < 256
                                   for x in row[-3:]):
            raise ValueError(f'{path}: the line {" ".join(row)!r} is not '
                             f'"name r g b" with colours of 0 to 255')
    return ([' '.join(row[:-3]) for row in rows],
            [[int(x) for x in row[-3:]] for row in rows])


def voc_palette():
    """Return VOC's colours of the classes, (256, 3) uint8.

    Bit j of a colour's channel i is bit 3 * (7 - j) + i of the class."""
    classes = np.arange(256)
    palette = np.zeros((256, 3), np.int64)
    for channel in range(3):
        for bit in range(8):
            on = classes >> 3 * bit + channel & 1
            palette[:, channel] |= on << 7 - bit
    return palette.astype(np.uint8)


def full_palette(colours):
    """Return (256, 3) uint8: the classes' colours, then VOC's; void, 255, is
    VOC's cream."""
    palette = voc_palette()
    palette[:len(colours)] = colours
    return palette


def poly_lr(step, lr, iter_max, power, decay):
    """Return the learning rate at a step, counted from 1.

    The poly schedule, set anew only at multiples of `decay` steps, as the
    2019 code does: the first decay - 1 steps have the full rate.
    """
    return lr * (1 - step // decay * decay / iter_max) ** power
