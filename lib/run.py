"""A training run as a whole: its lock, its state in a checkpoint, the command
that goes on with it, and what it says at its start."""
import fcntl
import math
import os
import shlex
import sys
import threading

import numpy as np
import torch
import torch.distributed as dist

import settings
import utils
from lib import signals
from lib.backbones import describe_setting
from lib.checkpoint import (
    check_writable,
    load,
    load_strict,
    not_finite,
    save,
    summarize_keys,
)
from lib.cost import available_memory, step_memory
from lib.distributed import (
    count_workers,
    describe_device,
    gather,
    local_world,
)
from lib.images import read_classes
from lib.optimizer import prepare_state
from lib.recorded import check_record
from utils import RunError, UserError, log, plural, world

# what latest.pth holds, and of which type
PARTS = {'step': int, 'best': float, 'settings': dict, 'versions': dict,
         'random': list, 'net': dict, 'optimizer': dict, 'scaler': dict}


# ------------------------------------------------- the command line
def command(**changes):
    """Return this program's command line as one would type it, with other
    KEY=VALUE words; a value of None removes one."""
    words = [word for word in sys.argv[1:]
             if word.partition('=')[0] not in changes]
    words += [f'{name}={value}' for name, value in changes.items()
              if value is not None]
    return signals.command(*words)


def continue_command(path):
    """Return the command of a new run that starts from a checkpoint's
    weights."""
    s = settings
    return command(ITER_MAX=s.ITER_MAX, INIT_FROM=path,
                   MODEL_DIR=f'{s.MODEL_DIR}.2', LOG_DIR=f'{s.LOG_DIR}.2')


# ------------------------------------------------- what it says at its start
def log_start(net, train_set, val_set, device):
    """Say what will be trained, on what and where; net: of the settings."""
    s, n = settings, len(train_set)
    if settings.given():
        log('command line: ' + ', '.join(
            f'{name} = {value!r}' for name, value in settings.given().items()))
    names, _ = read_classes(s.DATA_ROOT, s.N_CLASSES)
    log(f'data: {s.DATA_ROOT}, {plural(n, "image")} of {s.TRAIN_SPLIT} to '
        f'train on, ' + (f'{len(val_set)} of {s.VAL_SPLIT} to validate on'
                         if val_set else 'none to validate on'))
    log(f'classes: {s.N_CLASSES}, {", ".join(names[:8])}'
        + ', ...' * (len(names) > 8))
    n_params = sum(p.numel() for p in net.parameters())
    log(f'network: HEAD={s.HEAD} on {describe_setting()}, {n_params:,} '
        f'parameters')
    epoch = n // s.BATCH_SIZE
    log(f'schedule: {plural(s.ITER_MAX, "step")} of '
        f'{plural(s.BATCH_SIZE, "image")}; an epoch is '
        f'{plural(epoch, "step")}, so {s.ITER_MAX / epoch:.1f} epochs')
    log(f'device: {describe_device(device)}; {world()} training and '
        f'{world() * count_workers()} loader processes')
    log(f'writes: checkpoints into {s.MODEL_DIR}, logs into {s.LOG_DIR}')


def warn_of_memory(net, loss, amp, device):
    """Warn where a step needs more memory than a device has free.

    Args:
        net, loss: as of lib.cost.step_memory.
        amp: the type of mixed precision, or None.
        device: a GPU, or the CPU, which this machine's processes share.
    """
    s = settings
    b = s.BATCH_SIZE // (s.ACCUM * world())
    needed = step_memory(net, loss, (b, 3, s.CROP_SIZE, s.CROP_SIZE))
    needed *= 0.6 if amp else 1         # docs/performance.md
    if device.type == 'cuda':
        free = torch.cuda.mem_get_info(device)[0]
    else:
        needed *= local_world()
        free = available_memory()
    if free is not None and needed > free:
        log(f'warning: a step needs about {needed / 1e9:.1f} GB of memory, '
            f'{free / 1e9:.1f} GB are free; lower CROP_SIZE, BATCH_SIZE or '
            f'N_LAYERS, raise ACCUM, or set RECOMPUTE=True')


# ------------------------------------------------- before the first step
def check_folders():
    """Raise UserError or RunError where a run cannot write, or another is at
    work; make nothing."""
    for name in ('MODEL_DIR', 'LOG_DIR'):
        check_writable(name, getattr(settings, name))
    lock_folders(is_trial=True)


# ------------------------------------------------- one run in a folder
def lock_folders(is_trial=False):
    """Keep other runs out of MODEL_DIR and LOG_DIR until the files that are
    returned are closed, or this process ends, however it does.

    is_trial: make nothing and keep nothing; only raise. Raises UserError
    where another run is at work there.
    """
    files = []
    for name in ('MODEL_DIR', 'LOG_DIR')[:0 if utils.rank() else 2]:
        folder = getattr(settings, name)
        path = os.path.join(folder, '.lock')
        if is_trial and not os.path.exists(path):
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            file = open(path, 'a+')
        except OSError as error:
            raise RunError(f'{path} cannot be written ({error.strerror}); '
                           f'set {name} to another folder') from None
        try:    # not flock, which loader processes would inherit and keep
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f'{name}={folder}: another train.py is at work '
                            f'there; wait for it, or set MODEL_DIR and '
                            f'LOG_DIR to other folders') from None
        except OSError as error:        # a network's file system without
            log(f'warning: {folder} cannot be locked ({error.strerror}); '
                f'start no second run there')
        files.append(file)
    if is_trial:
        for file in files:
            file.close()
    return files


# ------------------------------------------------- its metrics, its state
def read_metrics(pending, stop):
    """Read the metrics of steps from the device, means over all processes.

    Args:
        pending: [(step, images' IDs, learning rate, {name: scalar on the
            device})]; it is emptied.
        stop: this process was asked to stop.
    Returns: ([(step, {name: float})], whether any process was asked to).
    Raises: RunError, with step and images, for a loss that is not finite.
    """
    with torch.no_grad():
        values = torch.stack([value.float() for *_, metrics in pending
                              for value in metrics.values()])
        values = torch.cat([values, values.new_tensor([float(bool(stop))])])
        if utils.world() > 1:
            dist.all_reduce(values)
            values /= utils.world()
    *values, stopping = values.tolist()
    rows, values = [], iter(values)
    for step, ids, lr, metrics in pending:
        metrics = dict(zip(metrics, values))    # the next len(metrics) values
        if not math.isfinite(metrics['loss']):
            raise RunError(f'the loss is {metrics["loss"]} at step {step}, '
                           f'images {", ".join(ids)}; nothing was saved since '
                           f'the last latest.pth. Try a lower LR')
        rows.append((step, {**metrics, 'lr': lr}))
    pending.clear()
    return rows, stopping > 0


def versions():
    """Return {name: version} of what a run's numbers depend on."""
    return {'python': sys.version.split()[0], 'torch': str(torch.__version__),
            'numpy': str(np.__version__), 'threads': torch.get_num_threads(),
            **({'gpu': torch.cuda.get_device_name(),
                'cuda': torch.version.cuda,
                'cudnn': torch.backends.cudnn.version()}
               if torch.cuda.is_initialized() else {'gpu': None})}


def random_state():
    """Return this process's random state, of the CPU and of its GPU."""
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def set_random_state(state):
    """Restore what random_state() returned."""
    torch.set_rng_state(state[0])
    if state[1:] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state[1])


def check_finite(parts, step):
    """Raise RunError where weights, buffers or momentum of a run are not
    finite, so that no checkpoint will hold them. parts: as of capture."""
    for name, part in parts.items():
        state = part.state_dict()
        if name == 'optimizer':
            state = {f'{key} {i}': value for i, each in state['state'].items()
                     for key, value in each.items()}
        broken = not_finite(state)
        if broken:
            raise RunError(f'the run has diverged: at step {step} the {name} '
                           f'has numbers that are not finite '
                           f'({summarize_keys(broken)}); nothing was saved '
                           f'since the last latest.pth. Try a lower LR')


def capture(parts, step, best, for_resume):
    """Return a checkpoint of a run. All processes call it.

    Args:
        parts: {name: what has a state_dict}; 'net' and 'average' are what
            eval.py and predict.py need.
        step, best: the step, the best val mIoU so far.
        for_resume: with all parts and the random state.
    """
    names, colours = read_classes(settings.DATA_ROOT, settings.N_CLASSES)
    state = {'step': step, 'best': best, 'settings': settings.as_dict(),
             'classes': names, 'colours': colours, 'git': utils.git_hash(),
             'versions': versions(), 'processes': world()}
    for name, part in parts.items():
        if for_resume or name in ('net', 'average'):
            state[name] = part.state_dict()
    if for_resume:
        state['random'] = gather(random_state())
    return state


class CheckpointWriter:
    """Writes a run's checkpoints in a thread while the run goes on, one after
    the other, from a copy in main memory.

    parts: as of capture. Each process has one; that of rank 0 writes.
    """

    def __init__(self, parts):
        self.parts, self.error = parts, None
        self.written = threading.Event()
        self.written.set()

    def save(self, name, step, best, for_resume=False):
        """Write MODEL_DIR/name, see capture; raise what kept the checkpoint
        before it from being written."""
        state = capture(self.parts, step, best, for_resume)
        if utils.rank():
            return
        self.wait()
        path = os.path.join(settings.MODEL_DIR, name)
        written = threading.Event()
        threading.Thread(target=self._write, args=(
            _copy_to_host(state), path, written)).start()
        self.written, utils.PENDING[:] = written, [written]

    def _write(self, state, path, written):
        try:
            save(state, path)
        except Exception as error:      # raised by wait, in the main thread
            self.error = error
        finally:
            written.set()

    def wait(self):
        """Wait until all is written; raise what kept it from that."""
        self.written.wait()
        if self.error:
            raise self.error


def _copy_to_host(value):
    """Return a checkpoint whose tensors are copies in main memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_host(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copy_to_host(each) for each in value]
    return value


def read_latest(path):
    """Return what latest.pth holds of a run, None where there is none yet.

    Raises UserError where the file is no run that could be resumed, or a
    setting that alters the run has changed.
    """
    if not os.path.exists(path):
        return None
    state = load(path)
    lost = [name for name, kind in PARTS.items() if not (
        isinstance(state, dict) and isinstance(state.get(name), kind))]
    if lost:
        raise UserError(f'{path} is no run to resume: its {", ".join(lost)} '
                        f'cannot be read. Move it away to start anew')
    check_record(state['settings'], state, path)
    unknown = sorted(set(state['settings']) - set(settings.as_dict()))
    if unknown:
        raise UserError(f'{path} is of a version with other settings '
                        f'({", ".join(unknown)}): finish the run with that '
                        f'version, or move {path} away and start from its '
                        f'weights with INIT_FROM')
    changed = settings.changed_since(state['settings'])
    if changed:
        listed = ', '.join(f'{name} {old!r} -> {new!r}'
                           for name, (old, new) in changed.items())
        text = (f'{path} is of a run with other settings ({listed}); put them '
                f'back, or move {path} away to start anew')
        if list(changed) == ['ITER_MAX']:
            text += (f'. The learning rate of every step follows from '
                     f'ITER_MAX; to train on from these weights: '
                     f'{continue_command(path)}')
        raise UserError(text)
    if state['step'] > settings.ITER_MAX:
        raise UserError(f'{path} is of step {state["step"]}, beyond '
                        f'ITER_MAX={settings.ITER_MAX}: no run writes that. '
                        f'Move it away to start anew')
    return state


def is_finished(state):
    """Tell whether a run has nothing left to do, and if so what one may do
    with it. state: of read_latest."""
    path = os.path.join(settings.MODEL_DIR, 'final.pth')
    if state['step'] < settings.ITER_MAX or not os.path.exists(path):
        return False
    log(f'finished at step {state["step"]}: {path}; to train on from its '
        f'weights: {continue_command(path)}')
    return True


def describe_stop(step, cause):
    """Return what a run that was asked to stop says; cause: None where
    another process was asked."""
    return (f'{cause or "a signal"}: stopped after step {step}; '
            f'{signals.resume_command()}')


def describe_end(step, best):
    """Return what a run that is done says; best: val mIoU, or None."""
    folder = settings.MODEL_DIR
    final = shlex.quote(os.path.join(folder, 'final.pth'))
    text = f'done: step {step}, {final}'
    if best is not None:
        text += (f'; best val mIoU {100 * best:.2f} % ('
                 f'{os.path.join(folder, "best.pth")})')
    return (f'{text}\nnext: python eval.py {final}\n'
            f'      python predict.py IMAGE {final}')


def restore(state, parts, path):
    """Restore a run's parts from the state of read_latest, which is emptied;
    return (step, best mIoU)."""
    try:
        for name, part in parts.items():
            if name in ('net', 'average'):
                load_strict(part, state[name], path)
            else:
                part.load_state_dict(state[name])
        prepare_state(parts['optimizer'])
        if len(state['random']) == world():
            set_random_state(state['random'][utils.rank()])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'{path} cannot be resumed: its {name} is not as '
                        f'train.py writes it ({type(error).__name__}). Move '
                        f'it away to start anew') from None
    if len(state['random']) != world():
        log(f'warning: {path} is of {len(state["random"])} processes, these '
            f'are {world()}: dropout will differ')
    for name, now in versions().items():
        if state['versions'].get(name) != now:
            log(f'warning: {path} was written with {name} '
                f'{state["versions"].get(name)}, this is {now}: the run is '
                f'resumed, but not bit for bit')
    log(f'{path}: resumed after step {state["step"]}')
    start, best = state['step'], state['best']
    state.clear()               # it is as large as network and optimizer
    return start, best
