"""Is the generated data set varied, labelled right, and the same each time?

    python -m pytest tests/test_toy.py
"""
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
import utils
from conftest import REPO, refused, run
from conversion import (
    contents,
    interrupt_after,
    load_label,
    palette,
    split_ids,
    tree,
)
from converters import layout

CLASSES = Path(REPO, 'classes', 'toy.txt')


def make(root, seed=0, train=6, val=5):
    prepare.main(['toy', '--to', str(root), f'--seed={seed}',
                  f'--train={train}', f'--val={val}'])
    return root


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp('toy') / 'set', train=15)


def test_layout(made):
    train, val = split_ids(made, 'train'), split_ids(made, 'val')
    assert (len(train), len(val)) == (15, 5)
    assert not set(train) & set(val)
    assert train == sorted(train) and val == sorted(val)
    stems = [sorted(path.stem for path in (made / kind).iterdir())
             for kind in ('JPEGImages', 'SegmentationClassAug')]
    assert stems[0] == stems[1] == sorted(train + val)
    assert (made / 'classes.txt').read_bytes() == CLASSES.read_bytes()


def test_images_are_varied_and_shapes_more_colourful_than_the_ground(made):
    sizes, saturations = set(), []
    for name in split_ids(made, 'train'):
        image = Image.open(layout.image_path(made, name))
        assert (image.format, image.mode) == ('JPEG', 'RGB')
        label = load_label(made, name)
        assert image.size == label.shape[::-1]
        assert 96 <= min(image.size) and max(image.size) <= 160
        sizes.add(image.size)
        saturation = np.array(image.convert('HSV'))[..., 1]
        saturations.append((saturation[(label > 0) & (label < 255)].mean(),
                            saturation[label == 0].mean()))
    assert len(sizes) > 10
    shapes, ground = np.mean(saturations, 0)
    assert shapes > 2 * ground


def test_labels_hold_all_classes_and_void_between_any_two(made):
    counts = np.zeros(256, int)
    for name in split_ids(made, 'train') + split_ids(made, 'val'):
        label = load_label(made, name).astype(int)
        counts += np.bincount(label.ravel(), minlength=256)
        for a, b in ((label[1:], label[:-1]), (label[:, 1:], label[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
    assert set(np.flatnonzero(counts)) == {0, 1, 2, 3, 4, 5, 255}
    share = counts / counts.sum()
    assert share[1:6].min() > 0.01 and 0.3 < share[0] < 0.9
    assert 0.02 < share[255] < 0.2


def test_palette(made):
    colours = palette(made, split_ids(made, 'val')[0])
    assert colours[:6] == [[int(word) for word in line.split()[-3:]]
                           for line in CLASSES.read_text().splitlines()]
    assert colours[255] == [224, 224, 192]


def test_bytes_follow_from_number_and_seed(made, tmp_path):
    assert contents(made) == contents(make(tmp_path / 'again', train=15))
    other, fewer = make(tmp_path / 'other', seed=1), make(tmp_path / 'fewer')
    assert split_ids(fewer, 'val') == split_ids(made, 'val')
    assert split_ids(fewer, 'train') == split_ids(made, 'train')[:6]
    for name in split_ids(fewer, 'train') + split_ids(fewer, 'val'):
        for path in (layout.image_path, layout.label_path):
            data = Path(path(fewer, name)).read_bytes()
            assert data == Path(path(made, name)).read_bytes()
            assert data != Path(path(other, name)).read_bytes()


def test_a_finished_set_is_left_as_it_is(tmp_path, capsys):
    root = make(tmp_path / 'set')
    before = tree(root)
    make(root)
    assert 'is ready' in capsys.readouterr().out
    for options in ({'seed': 1}, {'train': 7}, {'val': 2}):
        with pytest.raises(utils.UserError, match=f'{root}.*--to'):
            make(root, **options)
    assert tree(root) == before


def test_an_interrupted_run_is_resumed(tmp_path, monkeypatch):
    complete, root = make(tmp_path / 'complete'), tmp_path / 'set'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, 'progress', interrupt_after(4))
        make(root)
    with pytest.raises(utils.UserError, match='another folder'):
        make(root, seed=1)
    assert contents(make(root)) == contents(complete)
    os.remove(layout.image_path(root, 'toy_0002'))
    assert contents(make(root)) == contents(complete)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    for root in (tmp_path, tmp_path / 'notes.txt'):
        with pytest.raises(utils.UserError, match='another folder'):
            make(root)
    with pytest.raises(utils.RunError, match='notes.txt/set cannot be made'):
        make(tmp_path / 'notes.txt' / 'set')
    assert contents(tmp_path) == {'notes.txt': b'mine'}


@pytest.mark.parametrize('wrong', [{'seed': -1}, {'train': 0}, {'val': 0}])
def test_numbers_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(utils.UserError, match=str(min(wrong.values()))):
        make(tmp_path / 'set', **wrong)
    assert not (tmp_path / 'set').exists()


def test_as_a_user_runs_it(tmp_path, monkeypatch, capsys):
    run('prepare.py', 'toy', '--train=3', cwd=tmp_path)
    assert len(split_ids(tmp_path / 'data' / 'toy', 'val')) == 40
    monkeypatch.chdir(tmp_path)
    status, line = refused(prepare.main, 'toy', '--train=3', '--seed=1',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'data/toy' in line
