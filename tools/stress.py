"""The stress test: runs of one process and of two are killed at random times.

    python -m tools.stress [KILLS]      about 15 minutes on two CPU cores

Of the 80 kills every fourth falls into the start of a run, from 0 s to its
first step, by SIGKILL, SIGTERM or Ctrl-C; the others are SIGKILL once a step
was saved, two of three in a save. Each goes to the process that was started
alone, or to all.

Nothing may be lost: after each kill no process is left, the checkpoint is
whole, and the next start resumes it; a start ends without a traceback. At the
end, the weights equal those of a run that nobody disturbed, bit for bit. Exit
status 1, with a line for each, where anything else happened.
"""
import collections
import contextlib
import glob
import os
import random
import signal
import subprocess
import tempfile
import time

import torch

import prepare
from lib.checkpoint import load
from tools.measure import start_script
from utils import STOPPED, RunError, UserError, make_parser, progress, run_main

SETTINGS = ('DATA_ROOT=toy N_CLASSES=6 TRAIN_SPLIT=train VAL_SPLIT= '
            'HEAD=ema N_LAYERS=18 STEM=plain PRETRAINED= STRIDE=16 '
            'CROP_SIZE=33 EM_CHANNELS=32 EM_BASES=8 BN_MOM=0.1 DROPOUT=0.5 '
            'BATCH_SIZE=4 ACCUM=2 AVERAGE=0.9 RECOMPUTE=True ITER_MAX=60 '
            'ITER_SAVE=10 NUM_WORKERS=1').split()
VARIANTS = {'one': ['DEVICES=-1'], 'two': ['DEVICES=-1,-1']}
PATIENCE = 1800              # seconds that a start, or a run, takes at most
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def processes(session):
    """Return the processes of a session that are alive."""
    alive = []
    for path in glob.glob('/proc/[0-9]*/stat'):
        with contextlib.suppress(OSError), open(path) as file:
            state, _, _, of = file.read().rpartition(')')[2].split()[:4]
            if int(of) == session and state != 'Z':
                alive.append(int(path.split('/')[2]))
    return alive


class Run:
    """A run of train.py in a folder of its own, which has its output too.

    Args:
        folder: to be made.
        words: KEY=VALUE words beyond SETTINGS.
        faults: a list that faults are added to, a line each.
    """

    def __init__(self, folder, words, faults):
        self.folder, self.words, self.faults = folder, words, faults
        self.latest = os.path.join(folder, 'latest.pth')
        self.step = 0               # of the last checkpoint found

    def start(self):
        """Start or resume the run."""
        self.saved_before, self.began = self.time_saved(), time.monotonic()
        with open(f'{self.folder}.txt', 'w') as file:
            self.process = start_script(
                'train.py', *SETTINGS, *self.words, f'MODEL_DIR={self.folder}',
                f'LOG_DIR={self.folder}', stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True)

    def time_saved(self):
        """Return when latest.pth was written, 0 before."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.latest).st_mtime_ns
        return 0

    def has_saved(self):
        """Tell whether a step was saved since the last start."""
        return self.time_saved() != self.saved_before

    def wait_for_save(self):
        """Wait until a step is saved, or the run has ended; return the
        seconds since its start."""
        while not self.has_saved() and self.process.poll() is None:
            time.sleep(0.02)
            if time.monotonic() - self.began > PATIENCE:
                self.fault(f'no step within {PATIENCE} s')
                os.killpg(self.process.pid, signal.SIGKILL)
        return time.monotonic() - self.began

    def fault(self, text):
        """Record a fault with the last words of the output."""
        with open(f'{self.folder}.txt', errors='replace') as file:
            last = ' | '.join(file.read().split('\n')[-4:])
        self.faults.append(f'{self.folder}, after step {self.step}: {text} '
                           f'(its last words: {last[-600:]})')

    def kill(self, number, seconds, in_save=False):
        """Kill the run after some seconds, in_save: in the save that comes
        then; return whether it was before its first step was saved, None
        where it had ended by itself."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            while in_save and self.process.poll() is None and (
                    not os.path.exists(f'{self.latest}.tmp')):
                time.sleep(0.001)
        if self.process.poll() is not None:
            self.check_end('by itself', 0, True)
            return None
        is_early, after = not self.has_saved(), time.monotonic() - self.began
        send, whom = random.choice(((os.kill, 'the first process'),
                                    (os.killpg, 'all processes')))
        send(self.process.pid, number)
        self.check_end(
            f'{signal.Signals(number).name} to {whom} {after:.2f} s after the '
            f'start', -number if number == signal.SIGKILL else STOPPED,
            is_early or number != signal.SIGKILL)
        return is_early

    def check_end(self, how, status, is_quiet):
        """Record what is wrong with how the run has ended, by what `how` says,
        with which status; is_quiet: without a traceback, which a loader
        process may write when it has lost the one that it works for."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        until = time.monotonic() + 60
        while processes(self.process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        left = processes(self.process.pid)
        if left:
            self.fault(f'{how}: {len(left)} processes left after 60 s')
            os.killpg(self.process.pid, signal.SIGKILL)
        with open(f'{self.folder}.txt', errors='replace') as file:
            text = file.read()
        found = self.process.wait()
        if found not in (status, 0):            # 0: it was at its end
            self.fault(f'{how}: status {found}, not {status}')
        if is_quiet and 'Traceback' in text:
            self.fault(f'{how}: a traceback in the output')
        if self.has_saved() and self.step and (
                f'resumed after step {self.step}\n' not in text):
            self.fault(f'{how}: not resumed after step {self.step}')
        self.check_checkpoint()

    def check_checkpoint(self):
        """Record where latest.pth is not whole or older than before; remove
        step_N.pth, to spare the disk."""
        step = 0
        try:
            step = load(self.latest)['step'] if self.time_saved() else 0
        except UserError as error:
            self.fault(str(error))
        if step < self.step:
            self.fault(f'a checkpoint was lost: now step {step}')
        self.step = step
        for path in glob.glob(os.path.join(self.folder, 'step_*.pth')):
            os.remove(path)

    def finish(self, expected):
        """Run to the end; record where the weights, averages too, differ from
        those expected (None: from nothing), and return them."""
        self.start()
        self.kill(signal.SIGKILL, PATIENCE)
        try:
            found = load(os.path.join(self.folder, 'final.pth'))
        except UserError as error:
            self.fault(str(error))
            return expected
        if expected and not all(
                torch.equal(value, expected[name][key])
                for name in ('net', 'average')
                for key, value in found[name].items()):
            self.fault('its final weights are not the undisturbed run\'s')
        return found


def stress(variant, kills, counts, faults):
    """Kill runs of a variant so many times; add to the counts and faults."""
    words = VARIANTS[variant]
    undisturbed = Run(f'{variant}_undisturbed', words, faults)
    undisturbed.start()
    seconds = undisturbed.wait_for_save()       # from start to first step
    undisturbed.kill(signal.SIGKILL, PATIENCE)
    expected, run = undisturbed.finish(None), None
    for i in progress(range(kills), desc=f'{variant}: first step after '
                      f'{seconds:.1f} s', unit='kill'):
        is_early = None
        while is_early is None:
            if run is None:
                counts['runs'] += 1
                run = Run(f'{variant}_{counts["runs"]}', words, faults)
            run.start()
            if i % 4 == 3:
                number, wait = random.choice(SIGNALS), seconds
            else:
                run.wait_for_save()
                number, wait = signal.SIGKILL, 3
            before = len(faults)
            is_early = run.kill(number, random.uniform(0, wait), i % 2 == 0)
            if is_early is None and len(faults) > before:
                break
            if is_early is None:
                run.finish(expected)
                run = None
        counts['kills'] += 1
        counts['early'] += bool(is_early)
        counts['in a save'] += is_early is False and os.path.exists(
            f'{run.latest}.tmp')
    if run:
        run.finish(expected)


def main():
    """Kill as often as the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument('kills', nargs='?', type=int, default=80,
                        metavar='KILLS')
    kills, began = parser.parse_args().kills, time.monotonic()
    if kills < 1:
        raise UserError(f'{kills}: name a number of kills, 1 or more')
    random.seed(66)
    counts, faults = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare.main(['toy', '--to', 'toy', '--train', '12', '--val', '1'])
        stress('one', kills - kills // 2, counts, faults)
        if kills > 1:
            stress('two', kills // 2, counts, faults)
    print(f'{counts["kills"]} kills, {counts["early"]} of them before the '
          f'first step, {counts["in a save"]} in a save; {counts["runs"]} '
          f'runs to the end, each compared with an undisturbed one; '
          f'faults: {len(faults)}; '
          f'{(time.monotonic() - began) / 60:.0f} minutes')
    if faults:
        raise RunError('\n  '.join(['what went wrong:', *faults]))


if __name__ == '__main__':
    run_main(main)
