"""Is the official archive of ADE20K read right?

    python -m pytest tests/test_ade20k.py

The tests write a small archive of the official structure and compare every
mask, pixel by pixel, with what they drew. Nothing is downloaded.
"""
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
import utils
from conversion import (
    SIZE,
    check,
    encode,
    expect,
    load_label,
    smooth_image,
    split_ids,
    write_zip,
)
from converters import ade20k, layout
from lib import images

ADE = 'ADEChallengeData2016'


def info150(names, kinds=''):
    """Return objectInfo150.txt of the names, with the columns of its two
    versions; some have blanks, as the official ones do."""
    rows = [f'Idx\tRatio\tTrain\tVal\t{"Stuff" + kinds if kinds else ""}Name']
    for i, name in enumerate(names, 1):
        rows.append(f'{i} \t0.0{i:03}\t{9 * i}\t{i}\t{kinds}{name} ')
    return '\n'.join(rows)


@pytest.fixture
def ade(tmp_path, monkeypatch):
    """ADE20K's archive, one image grey; the command line, members, masks."""
    random, members, masks = np.random.default_rng(0), {}, {}
    for split, folder, number in (('train', 'training', 1), (
            'train', 'training', 20210), ('val', 'validation', 1)):
        ID = f'ADE_{split}_{number:08}'
        raw = random.integers(0, 151, SIZE, np.uint8)
        raw[0, :3] = 0, 1, 150
        image = Image.open(io.BytesIO(smooth_image(number)))
        members[f'{ADE}/images/{folder}/{ID}.jpg'] = encode(
            image.convert('L' if split == 'val' else 'RGB'), 'JPEG')
        members[f'{ADE}/annotations/{folder}/{ID}.png'] = encode(raw, 'PNG')
        masks[ID] = np.where(raw, raw.astype(int) - 1, 255)
    names, _ = images.read_class_file(images.class_file('ade20k'))
    members |= {f'{ADE}/images/': b'', f'{ADE}/sceneCategories.txt': b'x',
                f'{ADE}/objectInfo150.txt': info150(
                    [f'{name}, {name} too' for name in names], '1\t'),
                f'__MACOSX/{ADE}/images/training/ADE_train_00000002.jpg': b''}
    write_zip(tmp_path / f'{ADE}.zip', members)
    words = expect('ade20k', tmp_path, monkeypatch, train=2, val=1)
    return words, members, masks


def test_ade20k(ade, tmp_path, capsys):
    words, members, masks = ade
    prepare.main(words)
    root = tmp_path / 'made'
    check(root, masks, 'ade20k')
    assert split_ids(root, 'train') == sorted(masks)[:2]
    assert split_ids(root, 'val') == ['ADE_val_00000001']
    assert load_label(root, 'ADE_val_00000001')[0, :3].tolist() == [255, 0,
                                                                    149]
    path = layout.image_path(root, 'ADE_val_00000001')
    assert Path(path).read_bytes() == members[
        f'{ADE}/images/validation/ADE_val_00000001.jpg']
    assert images.read_image(path).shape == (*SIZE, 3)      # grey
    os.remove(path)
    prepare.main(words)                                     # resumed
    assert os.path.exists(path)
    capsys.readouterr()
    prepare.main(words)
    assert 'ade20k, train 2, val 1' in capsys.readouterr().out


def test_names_of_ade20k(tmp_path):
    """The first of a class's names that no class before it has."""
    names, colours = images.read_class_file(images.class_file('ade20k'))
    assert (names[0], names[12], names[149]) == ('wall', 'person', 'flag')
    assert len({tuple(colour) for colour in colours}) == 150
    path = str(tmp_path / 'a.zip')
    rows = ['building, edifice', 'chest of drawers', 'building, house', *(
        f'x {i}' for i in range(147))]
    for kinds in ('', '0\t'):
        write_zip(path, {f'{ADE}/objectInfo150.txt': info150(rows, kinds)})
        assert ade20k.read_names(path) == ['building', 'chest of drawers',
                                           'house', *rows[3:]]


@pytest.mark.parametrize('text, part', (
    (None, 'has no objectInfo150.txt'), ('', '0 rows and 0 class names, not'),
    (info150(['wall'] * 150), '150 rows and 1 class names'),
    (info150(map('x {}'.format, range(149))), '149 rows and 149 class names'),
    (b'\xff', 'objectInfo150.txt is neither UTF-8')))
def test_wrong_names_of_ade20k_are_refused(ade, tmp_path, text, part):
    words, members, _ = ade
    name = f'{ADE}/objectInfo150.txt'
    members = {key: data for key, data in members.items() if key != name}
    write_zip(tmp_path / f'{ADE}.zip',
              members if text is None else {**members, name: text})
    with pytest.raises(utils.UserError, match=part) as error:
        prepare.main(words)
    assert str(error.value).startswith(f'{tmp_path}/{ADE}.zip')
    assert not (tmp_path / 'made').exists()


def test_archives_that_are_not_ade20ks_are_refused(ade, tmp_path):
    words, members, _ = ade
    members.pop(f'{ADE}/annotations/validation/ADE_val_00000001.png')
    write_zip(tmp_path / f'{ADE}.zip', members)
    with pytest.raises(utils.UserError,
                       match=f'^val has 0 images, not 1: {ADE}.zip are not'):
        prepare.main(words)
    os.remove(tmp_path / f'{ADE}.zip')
    with pytest.raises(utils.UserError,
                       match=f'{ADE}.zip is not there; get it from http://'):
        prepare.main(words)
