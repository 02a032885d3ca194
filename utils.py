"""What every script needs: how a program ends, log and progress bars, files
that a crash cannot spoil, seeds, confusion matrix and scores, the learning
rate. n classes; H x W pixels.
"""
import argparse
import codecs
import contextlib
import errno
import functools
import hashlib
import importlib
import json
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = os.path.dirname(os.path.abspath(__file__))   # the project's folder
STOPPED = 75                 # exit status: stopped on request, can be resumed
INTERRUPTED = 130            # exit status: ended by Ctrl-C
PROGRESS_BARS = weakref.WeakSet()
PENDING = []                 # threading.Events: files that threads write
MAX_TEXT = 2 ** 28           # bytes; the list of a million images has 0.1 GB


# ------------------------------------------------- how a program ends
class UserError(Exception):
    """What was asked for is at fault: a setting, a file, an option. The text
    is one line that names it, its value and the remedy."""

    exit_status = 2


class RunError(Exception):
    """The run is at fault: a full disk, a lost process, a dead link."""

    exit_status = 1


def run_main(main):
    """Run main() and exit with 0, 1 (a fault of the run), 2 (of what was
    asked), STOPPED, INTERRUPTED, or 141 where nobody reads the output any
    more.

    Errors that have an exit_status, and the few of libraries that `explain`
    knows, end in one line on stderr. Any other is a defect and keeps its
    traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second ends at once
        _end('' if 'SPAWNED_BY' in os.environ or rank() else 'interrupted',
             INTERRUPTED)
    except BrokenPipeError:             # whoever read our output, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        line, status = explain(error)
        if line is None:
            raise
        if rank():          # what all processes say, the first says for all
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        _end(line, status, is_lost_worker(error))
    finally:
        end_workers()


def _end(line, status, at_once=False):
    """Print a line, '' for none, and exit; at_once: see end_at_once."""
    for bar in list(PROGRESS_BARS):         # the line shall stand by itself
        bar.close()
    if line:
        print(f'{os.path.basename(sys.argv[0])}: {line}', file=sys.stderr,
              flush=True)
    for written in PENDING:     # Python takes a thread for ended whose join()
        written.wait()          # a signal's handler has interrupted
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if at_once or dist.is_initialized():    # torch can abort at exit without
        end_at_once(status)                 # a peer or a loader process
    sys.exit(status)


def end_at_once(status):
    """Exit without what Python does at its end, which can hang or fail."""
    end_workers()
    with contextlib.suppress(OSError):      # of the loader processes' sockets
        shutil.rmtree(multiprocessing.util.get_temp_dir())
    os._exit(status)


def explain(error):
    """Return (line for the user, exit status) of an error; (None, 1) of a
    defect."""
    if hasattr(error, 'exit_status'):
        return _without_traceback(str(error)), error.exit_status
    first = first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            'DefaultCPUAllocator' in first):
        text = '. '.join(first.split('. ')[:2]) if isinstance(
            error, torch.OutOfMemoryError) else 'this needs too much memory'
        return (f'{text}. Lower BATCH_SIZE or CROP_SIZE, raise ACCUM, or set '
                f'RECOMPUTE=True; in evaluation set EVAL_BATCH=1 or '
                f'EVAL_WINDOW'), 1
    if is_lost_worker(error):
        return (f'a loader process died ({first}). Was memory short? Fewer '
                f'NUM_WORKERS need less'), 1
    if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT):
        return f'the disk is full ({first}); make room', 1
    if world() > 1 and (isinstance(error, dist.DistError)
                        or 'gloo' in str(error)):
        return f'process {rank()} lost another process ({first})', 1
    return None, 1


def _without_traceback(text):
    """Return an error's own text where a DataLoader has raised it again with
    the traceback of its process."""
    if '\nOriginal Traceback' in text:
        return text.strip().splitlines()[-1].partition(': ')[2]
    return text


def is_lost_worker(error):
    """Tell whether torch raised this because a DataLoader's process died,
    before its batch was fetched from it or meanwhile."""
    if isinstance(error, (OSError, EOFError)):
        return any(frame.filename.endswith('resource_sharer.py')
                   for frame in traceback.extract_tb(error.__traceback__))
    return (isinstance(error, RuntimeError) and 'DataLoader w' in str(error)
            and '\nOriginal Traceback' not in str(error))


def end_workers():
    """Kill the loader processes that an error has left: they ignore SIGTERM,
    which Python would send them at its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # they shall die unnoticed
    for process in multiprocessing.active_children():
        process.kill()


def first_line(error):
    """Return the first line of an error's text, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def import_optional(module):
    """Import and return a module that only some work needs; raise UserError
    with the install line where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition('.')[0]
        raise UserError(f'{name} is needed for this: python -m pip install '
                        f'{name}') from None


# ------------------------------------------------- the command line
class _Parser(argparse.ArgumentParser):
    """A parser whose errors end in one line, as all others do."""

    def error(self, message):
        raise UserError(f'{message}; --help shows what can be given')


def make_parser(doc, epilog=''):
    """Return a parser of a script's arguments, an argparse.ArgumentParser.

    Args:
        doc: the script's docstring: what it is, its usage, an indented
            paragraph, and what it writes.
        epilog: the end of --help, such as settings.describe().
    """
    about, usage, *rest = doc.split('\n\n')
    usage = textwrap.indent(textwrap.dedent(usage), 7 * ' ').strip()
    return _Parser(usage=usage.replace('%', '%%'), epilog=epilog,
                   description='\n\n'.join([about, *rest]),
                   formatter_class=argparse.RawDescriptionHelpFormatter)


# ------------------------------------------------- one process of several
def is_launched():
    """Tell whether torchrun or lib.distributed started this process."""
    return {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= set(os.environ)


def rank():
    """Return this process's number; 0 logs and writes files."""
    return int(os.environ['RANK']) if is_launched() else 0


def world():
    """Return the number of processes that work together."""
    return int(os.environ['WORLD_SIZE']) if is_launched() else 1


# ------------------------------------------------- log and progress
def log(text):
    """Print a line, once for all processes, without tearing a bar."""
    if rank():
        return
    tqdm.write(text)
    sys.stdout.flush()


log_once = functools.cache(log)     # a text a program


def plural(count, noun):
    """Return '1 image', '2 images', '1,000 images'."""
    return f'{count:,} {noun}' + 's' * (count != 1)


def progress(iterable=None, **options):
    """Return a tqdm bar; in a file or a pipe it prints every 30 s only."""
    pause = 0.2 if sys.stderr.isatty() else 30
    bar = tqdm(iterable, mininterval=pause, maxinterval=pause,
               dynamic_ncols=True, disable=rank() > 0, **options)
    PROGRESS_BARS.add(bar)
    return bar


# ------------------------------------------------- where the code is from
def git_hash():
    """Return the project's commit, '-dirty' if files were edited since; in a
    fork, the commit that it was made from, '-edited' if its code was edited
    since (settings.py, which every fork edits, does not count)."""
    fork = forked_from()
    if fork and not os.path.exists(os.path.join(ROOT, '.git')):
        is_edited = any(_hash_file(os.path.join(ROOT, path)) != digest
                        for path, digest in fork['files'].items())
        return fork['commit'] + '-edited' * is_edited
    if not _git('ls-files', 'utils.py'):    # the repository around the folder
        return 'unknown'
    return _git('describe', '--always', '--dirty', '--abbrev=12') or 'unknown'


def forked_from():
    """Return dict(parent: name of its folder, commit, files: {path: SHA-256})
    of a folder that fork.sh has made, {} of another."""
    path = os.path.join(ROOT, 'forked_from.txt')
    if not os.path.exists(path):
        return {}
    text = read_text(path)
    head = dict(re.findall(r'^# (\w+): (.*)', text, re.M))
    return {'parent': head.get('parent', ''),
            'commit': head.get('commit', 'unknown'),
            'files': {path: digest for digest, path in re.findall(
                r'^([0-9a-f]{64}) [ *](.*)', text, re.M)}}


def _hash_file(path):
    if not os.path.exists(path):
        return None
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def _git(*words):
    """Return what git prints in the project's folder, '' where it fails."""
    done = subprocess.run(
        ['git', *words], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
        check=False) if shutil.which('git') else None
    return done.stdout.strip() if done else ''


# ------------------------------------------------- files
@contextlib.contextmanager
def atomic_write(path, flush=True):
    """Give a path to write to, which replaces `path` when all went well.

    Whatever happens meanwhile, path is the old file or the new one, whole;
    without flush, which waits for the disk, a power cut may leave it empty.
    """
    part = f'{path}.tmp'        # one left by a kill is written over,
    if os.path.islink(part):    # but not what a link leads to
        os.remove(part)
    try:
        yield part
        if flush:
            with open(part, 'rb') as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def read_text(path):
    """Return what a text file holds, as decode_text() does.

    Raises UserError for a file that is missing, too large or no text.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f'{path} is a folder or a device, not a file')
        size = os.path.getsize(path)
        if size > MAX_TEXT:
            raise UserError(f'{path} has {size:,} bytes; a text has at most '
                            f'{MAX_TEXT:,}')
        with open(path, 'rb') as file:
            return decode_text(file.read(), path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None


def decode_text(data, path):
    """Return the text of a file's bytes, in UTF-8 or, with a mark, UTF-16;
    line ends of any system become \\n. Raises UserError that names the path.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode('utf-16' if is_utf16 else 'utf-8-sig')
    except UnicodeError:
        text = '\0'
    if '\0' in text:            # so has UTF-16 without its mark
        raise UserError(f'{path} is neither UTF-8 nor UTF-16 text; save it '
                        f'as UTF-8')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def save_json(value, path):
    """Write a JSON file, whole or not at all."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with atomic_write(path) as part, open(part, 'w') as file:
        json.dump(value, file, indent=1)
        file.write('\n')


# ------------------------------------------------- random state
def seed_everything(seed, deterministic):
    """Seed torch on every device; deterministic: have a GPU give the same
    bits every time, or raise where it cannot."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)


def check_compiler(setting):
    """Raise UserError where the setting asks for torch.compile, which finds
    no C++ compiler."""
    if not any(map(shutil.which, [os.environ.get('CXX', 'c++'), 'g++',
                                  'clang++'])):
        raise UserError(f'{setting}: torch.compile needs a C++ compiler, and '
                        f'there is no g++; install it, or leave that out')


@contextlib.contextmanager
def without_search():
    """Have cuDNN not search for the fastest kernels: image sizes vary."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# ------------------------------------------------- scores, learning rate
PER_CLASS = 'IoU', 'precision', 'recall', 'F1'


def confusion_matrix(pred, label, n_classes, ignore_label):
    """Count pixels by class: rows are labels, columns predictions.

    Args:
        pred: classes 0 to n_classes - 1, integers of any shape.
        label: the same shape and device; at least 0. Pixels whose label is
            ignore_label, or no class, are left out.
    Returns: (n, n) int64.
    """
    key = label.to(torch.int32) * n_classes + pred.to(torch.int32)
    count = torch.bincount(key.flatten(), minlength=n_classes ** 2)
    count = count[:n_classes ** 2].reshape(n_classes, n_classes)
    if 0 <= ignore_label < n_classes:
        count[ignore_label] = 0
    return count


def scores(confusion, classes=()):
    """Return dict(mIoU, mAcc, pAcc, fIoU, mF1) and, a list each with a value
    for each class, IoU, precision, recall, F1 (the Dice coefficient), all
    0..1.

    Args:
        confusion: (n, n), rows label.
        classes: indices of the classes that enter the means; () for all.

    Classes that occur neither in label nor in prediction are left out of the
    mean IoU and F1, classes without a label out of mAcc. What a class has not
    (nor precision without a prediction, nor recall without a label) is None.
    """
    counts = np.asarray(confusion, np.float64)
    hit, label, pred = counts.diagonal(), counts.sum(1), counts.sum(0)
    with np.errstate(invalid='ignore', divide='ignore'):
        iou, f1 = hit / (label + pred - hit), 2 * hit / (label + pred)
        precision, recall = hit / pred, hit / label
    chosen = list(classes) or list(range(len(counts)))
    mean_iou, mean_acc, mean_f1 = (
        _nanmean(x[chosen]) for x in (iou, recall, f1))
    total = label[chosen].sum()
    return {'mIoU': mean_iou, 'mAcc': mean_acc,
            'pAcc': _ratio(hit[chosen].sum(), total),
            'fIoU': _ratio((label * np.nan_to_num(iou))[chosen].sum(), total),
            'mF1': mean_f1, **{
                name: [None if np.isnan(x) else float(x) for x in values]
                for name, values in zip(PER_CLASS, (iou, precision, recall,
                                                    f1))}}


def _nanmean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def _ratio(part, whole):
    return float(part / whole) if whole else 0.0


def poly_lr(step, lr, iter_max, power, decay):
    """Return the learning rate at a step, counted from 1.

    The poly schedule, set anew only at multiples of `decay` steps, as in the
    2019 code: the first decay - 1 steps have the full learning rate.
    """
    return lr * (1 - step // decay * decay / iter_max) ** power
