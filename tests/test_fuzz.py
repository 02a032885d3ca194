"""Are spoilt files accepted, or refused in a line; and does tools.fuzz notice
what is neither?

    python -m pytest tests/test_fuzz.py
"""
import os
import signal
import time

import pytest

import utils
from conftest import refused, run_tool
from tools import fuzz, fuzz_cases


@pytest.mark.long
def test_spoilt_files_are_accepted_or_refused_in_a_line(tmp_path):
    done = run_tool('fuzz', 60, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in done.stdout.splitlines() if line.startswith('| ')]
    assert rows[0] == ['kind', 'tried', 'accepted', 'refused', 'faults']
    tried = {kind: int(count) for kind, count, *_ in rows[2:]}
    assert tried.keys() == fuzz_cases.KINDS.keys()
    assert tried['JPEG'] == 10 and tried['list'] == 6
    assert os.listdir(tmp_path) == []


def test_a_number_of_images_is_needed(monkeypatch, capsys):
    assert refused(fuzz.main, 0, monkeypatch=monkeypatch, capsys=capsys) == (
        2, 'script.py: 0: name a number of images, 1 or more')


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working folder, with a file beside it."""
    (tmp_path / 'work').mkdir()
    (tmp_path / 'secret').write_text('secret')
    monkeypatch.chdir(tmp_path / 'work')
    return tmp_path / 'work'


def refuse(text, kind=utils.UserError):
    """Return a call that is refused with this text."""
    def call():
        raise kind(text)
    return call


def test_what_is_right_is_no_fault(work):
    assert fuzz.attempt(lambda: (work / 'a').write_text('a')) == ('', '')
    assert fuzz.attempt(refuse('a is no image')) == ('a is no image', '')
    listed = '1 of 2 files:\n  a is no image'
    assert fuzz.attempt(refuse(listed, utils.RunError)) == (listed, '')


@pytest.mark.parametrize('call, fault', (
    (refuse('no image', ValueError), 'ValueError: no image'),
    (refuse(3, SystemExit), 'SystemExit: 3'),
    (refuse('a\nb'), 'more than one line'),
    (refuse('the worker\nTraceback of it'), 'a traceback'),
    (lambda: print('Traceback (most recent call last)'), 'a traceback'),
    (lambda: os.remove('../secret'), 'a file outside'),
    (lambda: open('../new', 'w').close(), 'a file outside'),
    (refuse('', MemoryError), 'GB of memory')))
def test_a_fault_is_noticed(work, call, fault):
    assert fault in fuzz.attempt(call)[1]


def test_a_reader_that_hangs_is_noticed(work, monkeypatch):
    monkeypatch.setattr(fuzz, 'SECONDS', 1)     # the least
    before = signal.signal(signal.SIGALRM, fuzz.too_long)
    try:
        _, fault = fuzz.attempt(lambda: time.sleep(5))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fault == 'TookTooLong: more than 1 s'


def test_a_reader_that_takes_much_memory_is_noticed(work, monkeypatch):
    now, peak = fuzz.memory()
    assert 2 ** 27 < now <= peak + 2 ** 24              # torch alone
    for before, after, is_fault in (
            ((1 << 30, 1 << 30), (1 << 30, 2 << 30), False),
            ((1 << 30, 1 << 30), (1 << 30, 4 << 30), True),
            ((1 << 30, 4 << 30), (1 << 30, 4 << 30), False)):
        values = iter((before, after, after))
        monkeypatch.setattr(fuzz, 'memory', values.__next__)
        fault = fuzz.attempt(lambda: 0)[1]
        assert ('3.2 GB of memory' in fault) == is_fault == bool(fault)


def test_the_same_seed_spoils_in_the_same_way():
    for mutate in (fuzz_cases.mutate_bytes, fuzz_cases.mutate_image,
                   fuzz_cases.mutate_text):
        ends = []
        for seed in (1, 1, 2):
            fuzz.random.seed(seed)
            ends.append(mutate(b'a few words\nof a file\n'))
        assert ends[0] == ends[1] != ends[2] != b'a few words\nof a file\n'
