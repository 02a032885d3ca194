"""SIGTERM and Ctrl-C while a program starts: it ends at once, with a line.

Programs import this before torch, whose import takes seconds; so this imports
nothing of the project. In a handler nothing can be imported: a module may be
half imported already.
"""
import contextlib
import os
import shlex
import signal
import sys

STOPPED, INTERRUPTED = 75, 130      # exit statuses, as in utils
SIGNALS = signal.SIGINT, signal.SIGTERM


def command(*words):
    """Return this program's command line with these words, for a shell."""
    return shlex.join(['python', os.path.relpath(sys.argv[0]), *words])


def resume_command():
    """Return what to type to resume this run, in words."""
    if 'RANK' in os.environ and 'SPAWNED_BY' not in os.environ:
        return 'the same torchrun command resumes'
    return f'to resume: {command(*sys.argv[1:])}'


def print_line(text, file=1):
    """Print a line, once for all processes: in a signal's handler, where
    Python may be within a print already. file: 1, or 2 for stderr."""
    if os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):
            os.write(file, f'{text}\n'.encode())


def print_stopped(number):
    """Print that a run was stopped by a signal before its first step."""
    print_line(f'{signal.Signals(number).name}: stopped before the first '
               f'step; {resume_command()}')


def print_interrupted():
    """Print that Ctrl-C has ended this program."""
    print_line(f'{os.path.basename(sys.argv[0])}: interrupted', 2)


def end_while_starting(is_run=False):
    """Have Ctrl-C end this program at once, from now until main() is called;
    a run of train.py SIGTERM as well, both with STOPPED."""
    def end(number, frame):
        if is_run:
            print_stopped(number)
        else:
            print_interrupted()
        os._exit(STOPPED if is_run else INTERRUPTED)
    for number in SIGNALS[:1 + is_run]:     # spawn() speaks for its processes
        signal.signal(number, signal.SIG_DFL if 'SPAWNED_BY' in os.environ
                      else end)
