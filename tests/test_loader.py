"""Are batches those of their step, and do loaders give them in order?

    python -m pytest tests/test_loader.py
"""
import multiprocessing.util
import os
import signal
import tempfile
import traceback

import cv2
import numpy as np
import pytest
import torch

import dataset
import settings
from conftest import refused
from files import add, empty_set, label_path, png
from lib import distributed
from lib.distributed import StopRequest
from utils import UserError


@pytest.fixture
def root(tmp_path):
    """An empty set; DATA_ROOT names it."""
    return empty_set(tmp_path / 'set')


# ------------------------------------------------- batches
def batches(size, start=0, **values):
    vars(settings).update(values)
    return list(dataset.BatchSampler(size, start))


def test_batches_are_permutations():
    keys = batches(12, BATCH_SIZE=4, ITER_MAX=9)
    assert [len(batch) for batch in keys] == [4] * 9
    orders = []
    for epoch in range(3):
        flat = sum(keys[3 * epoch:3 * epoch + 3], [])
        assert {key[0] for key in flat} == {epoch}
        orders.append([key[1] for key in flat])
        assert sorted(orders[-1]) == list(range(12)) != orders[-1]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_drop_what_does_not_fill_one():
    keys = batches(11, BATCH_SIZE=4, ITER_MAX=7)
    assert [len(batch) for batch in keys] == [4] * 7
    assert [batch[0][0] for batch in keys] == [0, 0, 1, 1, 2, 2, 3]
    for first, second in zip(keys[::2], keys[1::2]):
        assert len(set(first + second)) == 8
    dropped = [set(range(11)) - {i for _, i in keys[2 * epoch]
                                 + keys[2 * epoch + 1]} for epoch in range(3)]
    assert len(set(map(frozenset, dropped))) > 1     # not always the same


def test_batches_from_a_step_are_those_of_the_whole():
    whole = batches(11, BATCH_SIZE=4, ITER_MAX=7)
    for start in range(8):
        assert batches(11, start) == whole[start:]
        assert len(dataset.BatchSampler(11, start)) == 7 - start


def test_batches_follow_from_the_seed():
    first, same, other = (batches(12, BATCH_SIZE=4, ITER_MAX=3, SEED=seed)
                          for seed in (1, 1, 2))
    assert first == same != other


# ------------------------------------------------- loaders
def loaded(workers, start=0):
    settings.NUM_WORKERS = workers
    data = dataset.Segmentation('train', train=True)
    return list(dataset.train_loader(data, start))


def check_equal(batches, others):
    assert len(batches) == len(others) > 0
    for (image, label, names), (image2, label2, names2) in zip(
            batches, others):
        assert torch.equal(image, image2) and torch.equal(label, label2)
        assert list(names) == list(names2)


def test_train_loader_without_and_with_workers(small):
    settings.SEED, settings.ITER_MAX = 5, 8          # 6 batches an epoch
    alone = loaded(0)
    image, label, names = alone[0]
    assert image.shape == (2, 3, 65, 65) and label.shape == (2, 65, 65)
    assert image.dtype == label.dtype == torch.uint8 and len(names) == 2
    assert len({name for batch in alone[:6] for name in batch[2]}) == 12
    check_equal(alone, loaded(2))
    check_equal(alone[5:], loaded(0, start=5))


@pytest.mark.parametrize('workers', [0, 2])
def test_val_loader_keeps_the_order(workers, root):
    settings.NUM_WORKERS = workers
    for i, name in enumerate('bdac'):
        add(root, name, np.full((i + 1, 3), i), split='val')
    data = dataset.Segmentation('val', train=False)
    batches = list(dataset.val_loader(data))
    assert [names for _, _, names in batches] == [
        ('b',), ('d',), ('a',), ('c',)]
    assert [label.shape for _, label, _ in batches] == [
        (1, i + 1, 3) for i in range(4)]


def test_val_loader_puts_images_of_one_size_together(root):
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (6, 4), (5, 5), (4, 6)]
    for i, shape in enumerate(shapes):
        add(root, f'{i}', np.full(shape, i % 5), split='val')
    data = dataset.Segmentation('val', train=False)
    batches = list(dataset.val_loader(data, 0, 1, shapes, lambda size: 3))
    assert [names for _, _, names in batches] == [
        ('0', '2', '3'), ('6',), ('1', '4'), ('5',)]
    for image, label, names in batches:
        for one, other, name in zip(image, label, names):
            alone = data[int(name)]
            assert torch.equal(one, alone[0]) and torch.equal(other, alone[1])
    shared = [name for rank in range(2) for batch in dataset.val_loader(
        data, rank, 2, shapes, lambda size: size[0] - 3) for name in batch[2]]
    assert sorted(shared) == list('0123456')


@pytest.mark.parametrize('workers', [0, 2])
def test_a_cached_set_gives_what_its_files_give(workers, small, monkeypatch):
    settings.SEED, settings.ITER_MAX = 5, 8
    want = loaded(0)
    settings.CACHE = True
    data = dataset.Segmentation('train', train=True)
    settings.NUM_WORKERS = workers
    loader = dataset.train_loader(data)
    for name in ('read_image', 'read_label'):       # nothing is decoded again
        monkeypatch.setattr(dataset.images, name, None)
    check_equal(want, list(loader))


def test_a_cache_larger_than_memory_is_refused(small, monkeypatch):
    settings.CACHE = True
    monkeypatch.setattr(dataset.os, 'sysconf', lambda name: 100)
    with pytest.raises(UserError, match='CACHE=False'):
        dataset.train_loader(dataset.Segmentation('train', train=True))


@pytest.mark.parametrize('workers', [0, 1])
def test_loaders_leave_the_random_state_alone(workers, small):
    settings.NUM_WORKERS, settings.ITER_MAX = workers, 2
    before, numpys = torch.get_rng_state(), np.random.get_state()
    list(dataset.train_loader(dataset.Segmentation('train', train=True)))
    list(dataset.val_loader(dataset.Segmentation('val', train=False)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys[1]).all()


@pytest.mark.parametrize('wanted, cores, local, count', (
    (4, 2, '1', 2), (1, 2, '1', 1), (0, 8, '1', 0), (4, 8, '8', 1),
    (4, 2, '8', 1), (4, 64, '8', 4)))
def test_loader_processes_are_no_more_than_the_cores(monkeypatch, wanted,
                                                     cores, local, count):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(cores))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', local)
    settings.NUM_WORKERS = wanted
    assert distributed.count_workers() == count


@pytest.mark.parametrize('data', [b'', png(np.full((9, 9), 77), 8, 0)],
                         ids=['empty', 'value 77'])
def test_a_workers_error_is_one_line(data, root, monkeypatch, capsys):
    settings.NUM_WORKERS = 1
    for name in 'ab':
        add(root, name, [[0, 1]], split='val')
    corrupt = label_path(root, 'b')
    corrupt.write_bytes(data)
    loader = dataset.val_loader(dataset.Segmentation('val', train=False))
    with pytest.raises(UserError, match='in DataLoader worker proc') as caught:
        list(loader)
    traceback.clear_frames(caught.tb)                # ends the worker now

    def main():
        raise caught.value
    status, line = refused(main, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and line.startswith(f'script.py: {corrupt} ')


class Probe(torch.utils.data.Dataset):
    """The label of its one item says what its process does on signals, and
    how many threads it computes with."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        found = [signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
                 signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
                 cv2.getNumThreads()]
        return torch.zeros(3, 1, 1), torch.tensor(found), 'probe'


def test_a_temporary_folder_too_long_for_sockets_is_refused(
        small, monkeypatch):
    """Loader processes there would send nothing, and be waited for."""
    settings.NUM_WORKERS = 1
    data = dataset.Segmentation('val', train=False)
    for length, is_fit in ((75, True), (76, False)):
        monkeypatch.setattr(tempfile, 'tempdir', '/tmp/' + 'x' * (length - 5))
        monkeypatch.setattr(multiprocessing.util, 'get_temp_dir', lambda: '')
        if is_fit:
            dataset.val_loader(data)
            continue
        with pytest.raises(UserError, match='TMPDIR=/tmp/x+ is too long'):
            dataset.val_loader(data)


def test_a_worker_leaves_signals_to_the_main_process():
    StopRequest()                                    # which workers inherit
    settings.NUM_WORKERS = 1
    (_, found, _), = dataset.val_loader(Probe())
    assert found.tolist() == [[True, True, 1]]


def test_normalise_by_hand():
    settings.MEAN, settings.STD = (0.5, 0.0, 1.0), (0.5, 1.0, 2.0)
    image = torch.tensor([0, 255], dtype=torch.uint8).expand(2, 3, 4, 2)
    found = dataset.normalise(image, torch.device('cpu'))
    assert found.shape == (2, 3, 4, 2) and found.dtype == torch.float32
    assert found[1, :, 3].tolist() == [[-1, 1], [0, 1], [-0.5, 0]]
