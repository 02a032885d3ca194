"""The sections of tools.gpu_check give their figures, on a CPU at toy size;
faults show; what is there already is not repeated.

    python -m pytest tests/test_gpu_check.py [-m long]
"""
import json
import os
import subprocess
import sys

import pytest
import torch

import heads
import settings
from conftest import REPO, refused, words
from lib import run
from tools import gpu_check, gpu_sections, measure

TINY = {'N_LAYERS': 18, 'STEM': 'plain', 'STRIDE': 16, 'CROP_SIZE': 33,
        'BATCH_SIZE': 2, 'EM_CHANNELS': 16, 'EM_BASES': 4, 'NUM_WORKERS': 1}
QUICK = ('sync', 'devices')


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command here; it returns (exit status,
    what is printed, the report)."""
    monkeypatch.chdir(tmp_path)
    before = settings.as_dict()

    def call(*sections, status=0):
        vars(settings).update(before)
        settings._given.clear()
        arguments = [*sections, '--device', 'cpu', '--steps', 1, '--out',
                     'out', *words(TINY)]
        line = ''
        if status:
            found, line = refused(gpu_check.main, *arguments,
                                  monkeypatch=monkeypatch, capsys=capsys)
            assert found == status
        else:
            monkeypatch.setattr(sys, 'argv', ['gpu_check.py', *map(
                str, arguments)])
            gpu_check.main()
        with open('out/report.md') as file:
            return line or capsys.readouterr().out, file.read()
    return call


def read(name, folder='out'):
    """Return what a section has found."""
    with open(os.path.join(folder, f'{name}.json')) as file:
        return json.load(file)


# ------------------------------------------------- the command
def test_what_is_there_is_not_repeated(check):
    out, first = check(*QUICK)
    assert 'sync: skipped: the CPU' in out and 'devices: ok' in out
    times = [os.stat(f'out/{name}.json').st_mtime_ns for name in QUICK]
    out, second = check(*QUICK)
    assert out.count('is there already') == 2 and 'devices: ok' not in out
    assert first == second and '| peaks            | not run' in second
    assert times == [os.stat(f'out/{name}.json').st_mtime_ns
                     for name in QUICK]
    os.remove('out/sync.json')
    out, _ = check(*QUICK)
    assert 'sync: skipped' in out and out.count('is there already') == 1


def test_a_failing_check_is_named(check, monkeypatch):
    """A momentum that is lost when a run is resumed."""
    restore = run.restore

    def forget(state, parts, path):
        found = restore(state, parts, path)
        if path.endswith('first.pth') and not forgotten:
            forgotten.append(path)
            for state in parts['optimizer'].state.values():
                state['momentum_buffer'].zero_()
        return found
    forgotten = []
    monkeypatch.setattr(run, 'restore', forget)
    line, report = check(*QUICK, status=1)
    what = 'from the CPU: momentum a step later, relative error'
    assert line.startswith('script.py: 1 of 2 sections failed: devices (')
    assert what in line
    rows = [row for row in report.splitlines() if row.endswith('**no** |')]
    assert len(rows) == 2 and what in rows[1]       # and what was altered
    failed = [each for each in read('devices')['checks'] if not each['ok']]
    assert failed[1]['found'] > failed[1]['limit']


def test_an_error_ends_its_section_alone(check, monkeypatch):
    def run_out():
        raise RuntimeError('no kernel\nis there')
    monkeypatch.setitem(gpu_check.SECTIONS, 'peaks', lambda _: run_out())
    line, report = check('peaks', 'sync', status=1)
    assert ': 1 of 2 sections failed: peaks (error: RuntimeError: no' in line
    assert 'RuntimeError: no kernel (tests/test_gpu_check.py:' in report
    assert read('sync')['skipped'] and read('peaks')['took_s'] < 5


def test_settings_are_put_back_between_sections(check, monkeypatch):
    def change(context):
        settings.CROP_SIZE = 999
        return {}
    monkeypatch.setitem(gpu_check.SECTIONS, 'peaks', change)
    monkeypatch.setitem(gpu_check.SECTIONS, 'sync', lambda context: {
        'figures': [('crop', settings.CROP_SIZE, 'pixels')]})
    _, report = check('peaks', 'sync')
    assert '| crop | 33    | pixels |' in report


@pytest.mark.parametrize('arguments, message', (
    (['speed'], 'speed: sections are peaks, '),
    (['--steps', '0'], '--steps 0: give at least 1'),
    (['--device', 'cpu', '--steps', '2'], 'holds results of another command')))
def test_bad_words_are_refused_in_a_line(arguments, message, check,
                                         monkeypatch, capsys):
    check('sync')
    status, line = refused(gpu_check.main, *arguments, '--out', 'out',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = refused(gpu_check.main, monkeypatch=monkeypatch,
                           capsys=capsys)
    assert (status, os.listdir()) == (2, [])
    assert line == ('script.py: this machine has no CUDA GPU; --device cpu '
                    'tries the sections without one')


# ------------------------------------------------- what they use
@pytest.mark.parametrize('error, is_ok', ((1e-6, True), (0.1, False)))
def test_errors_are_held_to_those_of_others(error, is_ok):
    """Of vectors of length 1, others' error 1e-5, a factor of 16; a few
    ReLUs apart of a gradient."""
    def results(error):
        return {name: torch.tensor([1.0, error], dtype=torch.float64)
                for name in ('logits', 'loss', 'gradient', 'buffers')}
    checks = gpu_sections.compare('it', results(error), results(0.0),
                                  results(1e-5), 16)
    assert [each['ok'] for each in checks] == [is_ok] * 4
    assert checks[2]['found'] == pytest.approx(error)
    assert [each['limit'] for each in checks] == pytest.approx(
        [16e-5, 16e-5, gpu_sections.FLIPS, 16e-5])


def test_a_difference_is_found_wherever_it_is():
    def state(x, lr=0.1):
        return {'net': {'a': torch.zeros(2), 'b': torch.tensor([1.0, x])},
                'groups': [{'lr': lr}], 'random': [torch.arange(3)]}
    count = gpu_sections.count_differences
    assert count(state(2.0), state(2.0)) == 0
    assert count(state(2.0), state(2.0 + 1e-6)) == 1
    assert count(state(2.0), state(3.0, 0.2)) == 2
    assert count([torch.zeros(1)], []) == 1


def test_tf32_is_as_it_was():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    for is_on in True, False:
        with measure.use_tf32(is_on):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (is_on, is_on)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == before


# ------------------------------------------------- all sections
@pytest.mark.long
@pytest.mark.parametrize('names', (
    [name for name in gpu_check.SECTIONS if 'compiled' not in name],
    [name for name in gpu_check.SECTIONS if 'compiled' in name]),
    ids=('eager', 'compiled'))
def test_sections_give_their_figures(names, tmp_path):
    """Run as a user runs them; nothing but `sync` is skipped."""
    done = subprocess.run(
        [sys.executable, '-m', 'tools.gpu_check', *names, '--device', 'cpu',
         '--steps', '1', '--out', 'out', *words(TINY)], cwd=tmp_path,
        text=True, capture_output=True, timeout=3000,
        env={**os.environ, 'PYTHONPATH': REPO})
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: read(name, tmp_path / 'out') for name in names}
    with open(tmp_path / 'out' / 'report.md') as file:
        report = file.read()
    assert '**no**' not in report
    for name, found in results.items():
        assert 'error' not in found and f'| {name} ' in report
        assert ('skipped' in found) == (name == 'sync')
        assert name == 'sync' or any(found.get(kind) for kind in (
            'checks', 'speeds', 'figures')), name
        for row in found.get('speeds', ()):
            assert row['images_per_s'] > 0 and row['arithmetic'], name
        if 'kernels' in found:
            assert 10 < len(found['kernels']) <= 25
            assert sum(share for *_, share in found['kernels']) < 1.001
    if 'heads' in names:
        assert len(results['heads']['speeds']) == 2 * (1 + len(heads.HEADS))
        assert len(results['deterministic']['checks']) == 3
