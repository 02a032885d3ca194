"""Two torchrun agents, as on two machines, and recipes/slurm.sh, which starts
them. Small programs stand for those of Slurm.

    python -m pytest tests/test_slurm.py
"""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import REPO, SMALL, words
from lib import checkpoint
from project import copy_project
from test_faults import children, is_alive, wait_for_steps
from test_processes import CHILD, gradient, same, train_in
from test_scripts import with_our_python
from training import assert_equal_runs, run_state

# latest.pth at every step, each process with a dropout of its own
STEPS = {**SMALL, 'ITER_MAX': 9, 'ITER_SAVE': 10, 'VAL_SPLIT': '',
         'BATCH_SIZE': 4, 'CROP_SIZE': 33, 'DROPOUT': 0.5, 'DEVICES': -1}


def free_port():
    """Return a port of those that slurm.sh takes: 20000 + the last four
    digits of the job's ID."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as trial:
            if trial.connect_ex(('localhost', port)):
                return port
    raise AssertionError('no free port')


def wait_until(condition, seconds=60):
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def agents():
    """Start two torchrun agents of two processes each, in a folder, as two
    machines do; what still runs at the end is killed."""
    running = []

    def start(folder, *command):
        port = free_port()
        os.makedirs(folder, exist_ok=True)
        for _ in range(2):
            running.append(subprocess.Popen(
                [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2',
                 '--nproc-per-node=2', '--rdzv-backend=c10d', '--rdzv-id=1',
                 f'--rdzv-endpoint=localhost:{port}', *command],
                cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1'},
                text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return running[-2:]
    yield start
    for agent in running:
        if agent.poll() is None:
            kill_machine(agent.pid)


def kill_machine(agent):
    """Kill an agent, by its ID, and its processes, as a machine that dies."""
    for pid in [agent, *children(agent)]:
        os.kill(pid, signal.SIGKILL)


def finish(running):
    """Wait for agents that succeed."""
    for agent in running:
        error = agent.communicate(timeout=280)[1]
        assert agent.returncode == 0, error[-3000:]


# ------------------------------------------------- two agents
@pytest.mark.long
def test_two_agents_equal_one_process(small, agents):
    """Loss, gradients and weights, over four processes of an image each."""
    with open('child.py', 'w') as file:
        file.write(CHILD)
    changes = {'ITER_MAX': 3, 'VAL_SPLIT': '', 'DEVICES': -1}
    one, a = train_in('one', 1, 'float64', **changes)
    given = words({**STEPS, **changes, 'DATA_ROOT': small.DATA_ROOT,
                   'DROPOUT': 0.0})
    finish(agents('two', '../child.py', REPO, 'float64', *given))
    b = checkpoint.load('two/models/latest.pth')
    assert len(one) == 3 and b['processes'] == 4
    with open('two/logdir/log.csv') as file:
        names, *rows = [line.strip().split(',') for line in file]
    for x, y in zip(one, rows, strict=True):
        for name in ('loss', 'grad_norm'):
            assert float(x[name]) == pytest.approx(
                float(y[names.index(name)]), rel=1e-5)
    same(a['net'], b['net'], 1e-5)
    same(gradient(a, True), gradient(b, True), 1e-5)


@pytest.fixture(scope='module')
def whole(toy, tmp_path_factory):
    """The end of a run of STEPS that nobody disturbed, in four processes that
    train.py starts itself."""
    folder = tmp_path_factory.mktemp('whole')
    done = subprocess.run(
        [sys.executable, os.path.join(REPO, 'train.py'), *words(
            {**STEPS, 'DATA_ROOT': toy, 'DEVICES': '-1,-1,-1,-1'})],
        cwd=folder, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True,
        capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_state(folder / 'models' / 'latest.pth')


@pytest.mark.long
def test_a_machine_that_dies_ends_the_run_and_the_next_resumes(
        small, agents, whole):
    """Bit for bit; the other machine's agent ends within a minute."""
    command = [os.path.join(REPO, 'train.py'),
               *words({**STEPS, 'DATA_ROOT': small.DATA_ROOT})]
    first, second = agents('.', *command)
    wait_for_steps(3)
    others = children(second.pid)
    assert len(others) == len(children(first.pid)) == 2
    kill_machine(first.pid)
    began = time.monotonic()
    assert second.wait(60) == 1 and first.wait(1) == -signal.SIGKILL
    print(f'the other agent ended after {time.monotonic() - began:.1f} s')
    assert not any(is_alive(pid) for pid in others)
    assert 2 <= checkpoint.load('models/latest.pth')['step'] < 9
    finish(agents('.', *command))
    assert_equal_runs('models/latest.pth', whole)


# ------------------------------------------------- recipes/slurm.sh
STAND_INS = {
    # the command once for each of two nodes; what SIGTERM does is srun's way
    'srun': '''
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 SLURM_PROCID=0 "$@" & first=$!
SLURM_NODEID=1 SLURM_PROCID=1 "$@" & second=$!
echo "$first $second" > "$here/agents"
trap 'kill -KILL "$first" "$second"' TERM
status=0
wait "$first" || status=$?
wait "$second" || status=$?
exit "$status"''',
    'scancel': '''
echo "scancel $*" >> "$here/calls"
kill -TERM $(cat "$here/agents")''',
    'scontrol': '''
case $1 in
    show) printf 'localhost\\nlocalhost\\n' ;;
    *) echo "scontrol $*" >> "$here/calls" ;;
esac'''}
# in place of torchrun, where only the script is looked at
AGENT = '''
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*" > "$here/agent$SLURM_NODEID"
eval "$AGENT"'''
WAITING = 'touch "$here/ready$SLURM_NODEID"; while :; do sleep 0.1; done'
SAVING = 'mkdir -p runs; echo $$ > runs/latest.pth'
SLOW = '''
import time
save_at_once = save
def save(state, path):
    if os.path.exists('slow'):
        time.sleep(35)
    save_at_once(state, path)
'''


class Job:
    """A job of two nodes with two GPUs each: the script as sbatch runs it, a
    copy, in the folder that it was submitted from."""

    def __init__(self, folder, submitted_from):
        self.here, self.submitted_from = folder, submitted_from
        self.id, self.process = free_port(), None
        folder.mkdir()
        for name, text in STAND_INS.items():
            self.add(name, text)
        shutil.copy(os.path.join(REPO, 'recipes', 'slurm.sh'),
                    folder / 'slurm_script')

    def add(self, name, text):
        """Add a program to those that stand in."""
        path = self.here / name
        path.write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{text}\n')
        path.chmod(0o755)

    def start(self, *given, shell='sh', agent=''):
        ours = with_our_python()
        self.process = subprocess.Popen(
            [shell, self.here / 'slurm_script', *map(str, given)], text=True,
            cwd=self.submitted_from, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, env={
                **ours, 'PATH': f'{self.here}{os.pathsep}{ours["PATH"]}',
                'OMP_NUM_THREADS': '1', 'AGENT': agent,
                'SLURM_SUBMIT_DIR': str(self.submitted_from),
                'SLURM_JOB_ID': str(self.id), 'SLURM_JOB_NUM_NODES': '2',
                'SLURM_JOB_NODELIST': 'node[1-2]', 'SLURM_GPUS_ON_NODE': '2',
                'SLURM_CPUS_PER_TASK': '2'})

    def send(self, number):
        """Send a signal as Slurm does: USR1 to the script alone, SIGTERM to
        the agents as well."""
        os.kill(self.process.pid, number)
        for pid in self.agents() if number == signal.SIGTERM else ():
            os.kill(pid, number)

    def agents(self):
        path = self.here / 'agents'
        return [int(pid) for pid in (
            path.read_text().split() if path.exists() else [])]

    def calls(self):
        """Return what was called of Slurm's commands, in order."""
        path = self.here / 'calls'
        return path.read_text().splitlines() if path.exists() else []

    def end(self):
        """Return (exit status, output) of the script."""
        out = self.process.communicate(timeout=280)[0]
        assert not any(is_alive(pid) for pid in self.agents())
        return self.process.returncode, out

    def kill(self):
        """Kill what still runs of it."""
        for pid in filter(is_alive, self.agents()):
            kill_machine(pid)
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose saves are slow where a file says so."""
    folder = copy_project(tmp_path / 'project')
    (folder / 'setup.sh').write_text('')        # these tests have it all
    with open(folder / 'lib' / 'checkpoint.py', 'a') as file:
        file.write(SLOW)
    return folder


@pytest.fixture
def job(tmp_path, project):
    job = Job(tmp_path / 'spool', project)
    yield job
    job.kill()


@pytest.mark.parametrize('shell', ('sh', 'bash'))
@pytest.mark.parametrize('agent, signals, status, is_requeued, says', (
    (SAVING, (), 0, False, ''),
    (f'{SAVING}; exit 3', (), 3, False, 'srun exited with 3; not requeued'),
    (f'trap "{SAVING}; exit 1" TERM; {WAITING}', ('USR1',), 75, True,
     'runs/latest.pth is saved'),
    (f'trap "{SAVING}; exit 1" TERM; {WAITING}', ('TERM',), 1, False,
     'srun exited with 1; not requeued'),
    (f'trap "sleep 1; {SAVING}; exit 1" TERM; {WAITING}', ('USR1', 'TERM'),
     1, False, 'srun exited with 1; not requeued'),
    (f'trap "{SAVING}; exit 0" TERM; {WAITING}', ('USR1',), 0, False, ''),
    (f'trap "exit 1" TERM; {WAITING}', ('USR1',), 1, False,
     'runs/latest.pth has not changed')),
    ids=('done', 'failed', 'time limit', 'scancel', 'scancel while it stops',
         'done at the time limit', 'hanging'))
def test_what_slurm_requeues(job, shell, agent, signals, status, is_requeued,
                             says):
    """The script alone, in the shells that /bin/sh can be."""
    if not shutil.which(shell):
        pytest.skip(f'no {shell}')
    os.mkdir(job.submitted_from / 'runs')
    (job.submitted_from / 'runs' / 'latest.pth').write_text('of before')
    job.add('torchrun', AGENT)
    job.start('MODEL_DIR=runs', 'LR=1', shell=shell, agent=agent)
    for i, name in enumerate(signals):
        wait_until((job.here / 'ready0').exists)
        wait_until((job.here / 'ready1').exists)
        wait_until(lambda i=i: len(job.calls()) == i)
        job.send(signal.Signals[f'SIG{name}'])
    found, out = job.end()
    assert found == status and says in out, out
    assert job.calls() == [f'scancel --signal=TERM {job.id}'] * (
        'USR1' in signals) + [f'scontrol requeue {job.id}'] * is_requeued
    for node in '01':
        assert (job.here / f'agent{node}').read_text() == (
            f'240 --nnodes=2 --nproc-per-node=2 --max-restarts=0 '
            f'--rdzv-backend=c10d --rdzv-id={job.id} '
            f'--rdzv-endpoint=localhost:{20000 + job.id % 10000} train.py '
            f'MODEL_DIR=runs LR=1\n')


def test_a_job_that_cannot_start_says_why(job):
    job.start('LR=')
    out, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 1 and 'slurm.sh: LR=' in out
    job.submitted_from = job.here
    job.start()
    out, _ = job.process.communicate(timeout=60)
    assert job.process.returncode == 2 and 'the folder of train.py' in out
    assert not job.calls()


@pytest.mark.long
def test_a_job_is_stopped_saved_requeued_and_done(job, toy, whole):
    """Bit for bit. To save takes 35 s, more than torchrun would wait."""
    given = words({**STEPS, 'DATA_ROOT': toy})
    job.start(*given)
    folder = job.submitted_from
    wait_for_steps(2, folder / 'logdir' / 'log.csv')
    (folder / 'slow').touch()
    job.send(signal.SIGUSR1)
    status, out = job.end()
    assert status == 75 and 'SIGTERM: stopped after step ' in out, out
    assert job.calls() == [f'scancel --signal=TERM {job.id}',
                           f'scontrol requeue {job.id}']
    step = checkpoint.load(folder / 'models' / 'latest.pth')['step']
    assert 2 <= step == wait_for_steps(1, folder / 'logdir' / 'log.csv') < 9
    (folder / 'slow').unlink()
    job.start(*given)
    status, out = job.end()
    assert status == 0 and f'resumed after step {step}' in out, out
    assert 'done: step 9' in out and len(job.calls()) == 2
    assert_equal_runs(folder / 'models' / 'latest.pth', whole)


@pytest.mark.long
def test_a_job_that_fails_is_not_requeued(job, toy):
    job.start(*words({**STEPS, 'DATA_ROOT': toy, 'LR': 1e6}))
    status, out = job.end()
    assert status == 1 and 'not requeued' in out and not job.calls(), out
    assert 'Try a lower LR' in out
