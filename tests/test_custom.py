"""Are one's own images and masks read as they are meant, or refused?

    python -m pytest tests/test_custom.py
"""
import io
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import prepare
import settings
from conftest import refused
from conversion import (
    SIZE,
    boxes,
    load_label,
    palette,
    polygon,
    rle,
    smooth_image,
    split_ids,
    tree,
)
from converters import custom, layout
from lib import images


@pytest.fixture
def own(tmp_path):
    """A folder of 6 images, and an empty one for their masks."""
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'masks').mkdir()
    for i in range(6):
        (tmp_path / 'photos' / f'p {i}.jpg').write_bytes(smooth_image(i))
    return tmp_path


def convert(folder, *words, masks='masks'):
    prepare.main(['custom', str(folder / 'photos'), str(folder / masks),
                  '--to', str(folder / 'made'), *words])
    return folder / 'made'


@pytest.fixture
def refusal(own, monkeypatch, capsys):
    """The one line with which a conversion is refused, exit status 2; the set
    is not finished."""
    def run(*words, masks='masks'):
        status, line = refused(lambda: convert(own, *words, masks=masks),
                               monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2
        stamp = Path(words[words.index('--to') + 1] if '--to' in words else
                     own / 'made', 'prepared.json')
        assert not stamp.exists() or 'counts' not in stamp.read_text()
        return line
    return run


def draw(i, values=(0, 1, 2)):
    """Return the mask of image i."""
    return np.array(values)[np.random.default_rng(i).integers(
        0, len(values), SIZE)].astype(np.uint8)


def save_masks(folder, values=(0, 1, 2), suffix='', mode='L'):
    """Write the six masks."""
    for i in range(6):
        image = Image.fromarray(draw(i, values))
        if mode == 'P':
            image.putpalette(images.voc_palette().tobytes())
        image.save(folder / 'masks' / f'p {i}{suffix}.png')


# ------------------------------------------------- numbers
@pytest.mark.parametrize('mode', ('L', 'P'))
def test_masks_of_numbers(own, mode, capsys):
    save_masks(own, (0, 1, 2, 255), mode=mode)
    root = convert(own, '--val', '0.34')
    for i in range(6):
        np.testing.assert_array_equal(load_label(root, f'p {i}'),
                                      draw(i, (0, 1, 2, 255)))
        assert Path(layout.image_path(root, f'p {i}')).read_bytes() == \
            smooth_image(i)
    assert 'N_CLASSES=3' in capsys.readouterr().out
    vars(settings).update(DATA_ROOT=str(root), N_CLASSES=3)
    train, val = (dataset.Segmentation(split, False)
                  for split in ('train', 'val'))
    assert (len(train), len(val)) == (4, 2)
    assert sorted(train.ids + val.ids) == [f'p {i}' for i in range(6)]


def test_masks_with_names_and_a_suffix(own):
    save_masks(own, suffix='_mask')
    names = own / 'names.txt'
    names.write_text('ground 9 8 7\nred roof 200 0 0\ntree 0 99 0\nsky 1 2 3')
    root = convert(own, '--suffix', '_mask', '--classes', str(names))
    assert (root / 'classes.txt').read_text() == names.read_text() + '\n'
    assert palette(root, 'p 0')[1] == [200, 0, 0]


def test_0_and_255_alone_are_asked_about(own, refusal):
    save_masks(own, (0, 255))
    line = refusal()
    assert '--white object' in line and '--white void' in line
    assert 'nothing to learn' in refusal('--white', 'void')
    root = convert(own, '--white', 'object')
    np.testing.assert_array_equal(load_label(root, 'p 1'), draw(1, (0, 1)))
    assert (root / 'classes.txt').read_text() == '0 0 0 0\n1 128 0 0\n'
    save_masks(own, (0, 1, 255))
    line = refusal('--white', 'object', '--to', str(own / 'b'))
    assert '--white object is for masks of 0 and one other value' in line
    assert 'hold 0, 1, 255' in line


def test_a_set_made_under_the_old_name_is_recognised(own, capsys):
    save_masks(own)
    stamp = convert(own) / 'prepared.json'
    text = stamp.read_text()
    assert text.count('"custom"') == 1
    stamp.write_text(text.replace('"custom"', '"masks"'))
    capsys.readouterr()
    convert(own)
    assert 'is ready: custom' in capsys.readouterr().out


# ------------------------------------------------- colours
def test_masks_of_colours(own, refusal):
    colours = np.uint8([[10, 20, 30], [200, 0, 0], [1, 1, 1]])
    for i in range(6):
        Image.fromarray(colours[draw(i)]).save(own / 'masks' / f'p {i}.png')
    line = refusal()
    assert '200 0 0' in line and '--classes' in line
    names = own / 'names.txt'
    classes = ['--classes', str(names)]
    names.write_text('void 1 1 1\nground 10 20 30\n')
    line = refusal(*classes)
    assert 'the colours 200 0 0 in' in line and 'p 0.png' in line
    assert not (own / 'made').exists()
    names.write_text('void 1 1 1\nground 10 20 30\nroof 200 0 0\n')
    root = convert(own, *classes)
    for i in range(6):
        np.testing.assert_array_equal(load_label(root, f'p {i}'),
                                      np.array([0, 1, 255])[draw(i)])
    assert (root / 'classes.txt').read_text() == (
        'ground 10 20 30\nroof 200 0 0\n')


def test_grey_masks_by_colour(own, refusal):
    save_masks(own, (0, 128, 254))
    line = refusal()
    assert 'hold 0, 128, 254' in line and '--by-colour' in line
    names = own / 'names.txt'
    names.write_text('a 0 0 0\nb 128 128 128\nc 254 254 254\n')
    root = convert(own, '--classes', str(names), '--by-colour')
    np.testing.assert_array_equal(load_label(root, 'p 3'), draw(3))


# ------------------------------------------------- run again
@pytest.fixture
def again(own, capsys, monkeypatch):
    """Convert again; return what was printed and what was written."""
    def run(*words):
        before = tree(own / 'made')
        capsys.readouterr()
        convert(own, *words)
        return capsys.readouterr().out, {
            path for path, state in tree(own / 'made').items()
            if before.get(path) != state and path[-3:] in ('png', 'jpg')}
    monkeypatch.setattr(layout, 'map_in_processes', in_one_process)
    return run


def in_one_process(work, jobs, desc, total=None, is_done=None):
    """Stand in for layout.map_in_processes."""
    return [work(*job) for job in jobs if not (is_done and is_done(job))]


def splits(root):
    return {split: split_ids(root, split) for split in ('train', 'val')}


def test_what_is_new_changed_or_gone_is_converted(own, again):
    save_masks(own)
    before = splits(convert(own, '--val', '0.34'))
    for i in range(6, 9):
        (own / 'photos' / f'p {i}.jpg').write_bytes(smooth_image(i))
        Image.fromarray(draw(i)).save(own / 'masks' / f'p {i}.png')
    mask, old = own / 'masks' / 'p 1.png', own / 'masks' / 'p 2.png'
    Image.fromarray(draw(11)).save(mask)
    os.utime(mask, (10 ** 9, 10 ** 9))      # changed, but not newer
    old.rename(own / 'p 2.png')
    (own / 'photos' / 'p 2.jpg').unlink()
    printed, written = again('--val', '0.34')
    assert ('3 images are new, 1 mask changed, 1 image is gone: converting '
            'them' in printed)
    assert written == {'SegmentationClassAug/p 1.png'} | {
        path % i for path in ('JPEGImages/p %d.jpg',
                              'SegmentationClassAug/p %d.png')
        for i in (6, 7, 8)}
    np.testing.assert_array_equal(load_label(own / 'made', 'p 1'), draw(11))
    assert not list((own / 'made').rglob('p 2.*'))
    after = splits(own / 'made')
    assert {len(IDs) for IDs in after.values()} == {5, 3}
    for split, IDs in before.items():
        assert {*IDs} - {'p 2'} <= {*after[split]}
    assert 'images stay in their split; of 3 new images' in printed
    printed, written = again('--val', '0.34')
    assert 'is ready' in printed and not written


def test_a_new_class_is_told_and_edited_names_are_kept(own, again):
    save_masks(own, (0, 1))
    names = convert(own) / 'classes.txt'
    names.write_text('ground 1 2 3\nroof 200 0 0\n')
    (own / 'photos' / 'p 0.jpg').write_bytes(smooth_image(9))
    printed, written = again()
    assert '1 image changed' in printed and written == {'JPEGImages/p 0.jpg'}
    assert names.read_text() == 'ground 1 2 3\nroof 200 0 0\n'
    Image.fromarray(draw(4)).save(own / 'masks' / 'p 4.png')
    printed, _ = again()
    assert ('the classes were ground, roof; they are now 0, 1, 2 '
            '(N_CLASSES=3)' in printed)
    np.testing.assert_array_equal(load_label(own / 'made', 'p 4'), draw(4))


def test_colours_that_change_their_meaning(own, again):
    for i in range(6):
        Image.fromarray(np.uint8([[0, 0, 0], [9, 99, 0]])[draw(i, (0, 1))]
                        ).save(own / 'masks' / f'p {i}.png')
    names = own / 'names.txt'
    names.write_text('a 0 0 0\nb 9 99 0\n')
    convert(own, '--classes', str(names))
    names.write_text('a 9 99 0\nb 0 0 0\n')
    printed, written = again('--classes', str(names))
    assert 'the colours of the classes changed' in printed
    assert len(written) == 6
    np.testing.assert_array_equal(load_label(own / 'made', 'p 3'),
                                  1 - draw(3, (0, 1)))


def test_a_set_without_a_record_is_converted_anew(own, again):
    save_masks(own)
    stamp = convert(own) / 'prepared.json'
    before, data = splits(own / 'made'), json.loads(stamp.read_text())
    assert data.pop('sources')['images']['p 3'].startswith('p 3.jpg ')
    data['options'] |= {'classes': None}    # as older ones had it
    stamp.write_text(json.dumps(data))
    (own / 'made' / 'classes.txt').write_text('a 1 2 3\nb 3 2 1\nc 0 0 9\n')
    printed, written = again()
    assert 'the classes were a, b, c; they are now 0, 1, 2' in printed
    assert 'has no record of its sources: all is converted anew' in printed
    assert len(written) == 12 and splits(own / 'made') == before


def test_outlines_that_changed_are_converted(own, again):
    pytest.importorskip('pycocotools')
    notes = [{'image_id': i, 'category_id': 7,
              'segmentation': polygon(2, 10, 3, 9 + i)} for i in range(4)]
    data = {'images': [{'id': i, 'file_name': f'p {i}.jpg', 'height': 40,
                        'width': 60} for i in range(4)],
            'categories': [{'id': 7, 'name': 'roof'}], 'annotations': notes}

    def write(folder='made'):
        (own / 'a.json').write_text(json.dumps(data))
        convert(own, '--to', str(own / folder), masks='a.json')
    write()
    before = tree(own / 'made' / 'SegmentationClassAug')
    notes[2]['segmentation'] = polygon(20, 30, 3, 9)
    write()
    after = tree(own / 'made' / 'SegmentationClassAug')
    assert [path for path in after if after[path] != before[path]] == [
        'p 2.png']
    np.testing.assert_array_equal(load_label(own / 'made', 'p 2'),
                                  boxes((1, 20, 30, 3, 9)))
    data['categories'].insert(0, {'id': 3, 'name': 'wall'})
    notes.append({**notes[0], 'image_id': 3, 'category_id': 3})
    write()
    np.testing.assert_array_equal(load_label(own / 'made', 'p 2'),
                                  boxes((2, 20, 30, 3, 9)))


def test_an_interrupted_update_is_resumed(own, again, monkeypatch):
    save_masks(own)
    convert(own)
    for i in (1, 4):
        Image.fromarray(draw(20 + i)).save(own / 'masks' / f'p {i}.png')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(custom.masks, 'convert_mask', interrupt)
        convert(own)
    assert not Path(layout.label_path(own / 'made', 'p 1')).exists()
    printed, written = again()
    assert 'changed' not in printed and len(written) == 2
    np.testing.assert_array_equal(load_label(own / 'made', 'p 4'), draw(24))


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize('before, names, want', (
    ({}, 'abcde', (4, 1)),
    ({'train': 'abcd', 'val': 'e'}, 'abcde', (4, 1)),
    ({'train': 'abcd', 'val': 'e'}, 'abcdefghij', (8, 2)),
    ({'train': 'ab', 'val': 'cde'}, 'abcdef', (3, 3)),
    ({'train': 'abcd', 'val': 'e'}, 'abcd', (3, 1)),      # val is gone
    ({'train': 'a', 'val': 'bc'}, 'bc', (1, 1))))
def test_images_stay_in_their_split(before, names, want):
    found = custom.split_images(dict.fromkeys(names), 0.2, 0, before)
    assert (len(found['train']), len(found['val'])) == want
    assert sorted(found['train'] + found['val']) == list(names)
    if {*before.get('val', ())} & {*names} and want != (1, 1):
        for split, IDs in before.items():
            assert {*IDs} <= {*found[split]}


# ------------------------------------------------- what to do next
def test_the_commands_fit_the_data_and_the_machine(own, capsys, monkeypatch):
    monkeypatch.setattr(layout, 'map_in_processes', in_one_process)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    save_masks(own, (0, 1))
    Image.fromarray(draw(5)).save(own / 'masks' / 'p 5.png')
    root = convert(own, '--to', str(own / 'my set'))
    printed = capsys.readouterr().out
    lines = [line for line in printed.replace('\\\n', '').splitlines()
             if line.startswith('python ')]
    train, score, predict = map(shlex.split, lines)
    assert settings.override(train[2:]) == []
    settings.validate(for_training=True)
    assert settings.DATA_ROOT == f'{own}/my set' and root
    assert settings.given() == {
        'DATA_ROOT': f'{own}/my set', 'TRAIN_SPLIT': 'train', 'N_CLASSES': 3,
        'N_LAYERS': 18, 'STEM': 'plain', 'BN_MOM': 0.1, 'LR': 0.01,
        'STRIDE': 16, 'CROP_SIZE': 65, 'BATCH_SIZE': 4, 'ITER_MAX': 600}
    assert 'CROP_SIZE=193 BATCH_SIZE=1 ' in custom.suggest_settings(1, 4000)
    assert score == ['python', 'eval.py']
    assert predict == ['python', 'predict.py', f'{own}/photos', '--to',
                       'predictions']
    rows = [line.split() for line in printed.splitlines()]
    held = int('p 5' in split_ids(own / 'my set', 'train'))
    assert ['0', '5', '1'] in rows and ['2', f'{held}', f'{1 - held}'] in rows
    assert ('warning: not in val, so not scored: 2' if held else
            'warning: not in train, so not learned: 2') in printed


def test_a_network_fits_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)

    def words(free, n_train=40, side=900):
        monkeypatch.setattr(torch.cuda, 'mem_get_info',
                            lambda: (free * 2 ** 30, 0))
        return custom.suggest_settings(n_train, side)
    assert 'N_LAYERS=50' in words(80) and 'BATCH_SIZE=16 ' in words(80)
    assert 'CROP_SIZE=513 BATCH_SIZE=7 ' in words(11)
    assert 'BATCH_SIZE=3 ' in words(80, n_train=3)
    assert 'CROP_SIZE=105 ' in words(80, side=100) and (
        words(80).endswith(' DEVICES=0'))
    assert 'N_LAYERS=18' in words(3)


# ------------------------------------------------- JSON in COCO's format
def test_polygons(own, refusal):
    pytest.importorskip('pycocotools')
    data = {'images': [{'id': i, 'file_name': f'p {i}.jpg', 'height': 40,
                        'width': 60} for i in range(5)],
            'categories': [{'id': 7, 'name': 'roof'},
                           {'id': 3, 'name': 'a b'}],
            'annotations': [
                {'image_id': 0, 'category_id': 7,
                 'segmentation': polygon(2, 10, 3, 9)},
                {'image_id': 1, 'category_id': 3, 'iscrowd': 1,
                 'segmentation': rle(boxes((1, 5, 9, 5, 9)) > 0, True)},
                {'image_id': 1, 'category_id': 3,
                 'segmentation': polygon(6, 20, 3, 9)}]}
    path = own / 'own.json'
    path.write_text(json.dumps(data))
    root = convert(own, masks='own.json')
    assert (root / 'classes.txt').read_text() == (
        'background 0 0 0\na b 128 0 0\nroof 0 128 0\n')
    assert len(split_ids(root, 'train') + split_ids(root, 'val')) == 5
    np.testing.assert_array_equal(load_label(root, 'p 0'),
                                  boxes((2, 2, 10, 3, 9)))
    np.testing.assert_array_equal(load_label(root, 'p 1'), boxes(
        (255, 5, 9, 5, 9), (1, 6, 20, 3, 9)))
    assert not load_label(root, 'p 2').any()
    data['images'][0]['file_name'] = 'gone.jpg'
    path.write_text(json.dumps(data))
    new = ['--to', str(own / 'new')]
    assert 'gone.jpg is not there' in refusal(*new, masks='own.json')
    data['annotations'][0]['category_id'] = 8
    path.write_text(json.dumps(data))
    assert 'are of [8] too' in refusal(*new, masks='own.json')


# ------------------------------------------------- what is refused
def spoil(own, what):
    """Spoil the sixth image's files; return what the message names."""
    image, mask = own / 'photos' / 'p 5.jpg', own / 'masks' / 'p 5.png'
    if what == 'no mask':
        mask.unlink()
        return '1 of 6 images in '
    if what == 'size':
        Image.fromarray(draw(5)[:30]).save(mask)
        return f'{image} cannot be used (60 x 40 pixels, its mask 60 x 30)'
    if what == 'truncated mask':
        os.truncate(mask, 60)
        return f'{mask} cannot be read as a mask: it is damaged'
    if what == 'truncated image':
        os.truncate(image, 500)
        return f'{image} cannot be used: it is damaged'
    if what == 'link':
        image.unlink()
        image.symlink_to('nowhere')
        return f'{image} cannot be read (No such file'
    if what == 'two':
        (own / 'photos' / 'p 5.png').write_bytes(b'')
        return 'p 5.jpg and p 5.png have one name, p 5; rename'
    Image.fromarray(np.uint8([[[9, 2, 3]]])).save(mask)
    return 'p 5.png is coloured, '


@pytest.mark.parametrize('what', ('no mask', 'size', 'truncated mask', 'two',
                                  'truncated image', 'coloured', 'link'))
def test_what_cannot_be_used_is_named(own, refusal, what):
    save_masks(own)
    assert spoil(own, what) in refusal()
    if what == 'size':                          # mended, it is resumed
        Image.fromarray(draw(9)).save(own / 'masks' / 'p 5.png')
        np.testing.assert_array_equal(load_label(convert(own), 'p 5'),
                                      draw(9))


@pytest.mark.parametrize('words, masks, part', (
    (('--val', '1.5'), 'masks', '--val 1.5: the share of val is between'),
    (('--seed', '-1'), 'masks', '--seed -1: a seed is 0 or more'),
    ((), 'gone', 'no such folder'),
    ((), 'photos', '6 of 6 images in '),
    (('--white', 'void'), 'own.json', '--white void: this is for a folder'),
    ((), 'own.json', "categories"),
    (('--classes', 'gone.txt'), 'masks', 'gone.txt cannot be read')))
def test_options_that_cannot_be_are_refused(own, refusal, words, masks, part):
    save_masks(own)
    (own / 'own.json').write_text('{}')
    assert part in refusal(*words, masks=masks)


def test_rotated_and_other_images(own):
    """An image is rotated as its mask is, and becomes a JPEG."""
    save_masks(own)
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6                # shown rotated to the right
    photos = own / 'photos'
    (photos / 'p 0.jpg').write_bytes(smooth_image(0, exif=exif))
    Image.fromarray(draw(0).T.copy()).save(own / 'masks' / 'p 0.png')
    (photos / 'p 1.jpg').write_bytes(smooth_image(1, exif=exif))  # as stored
    (photos / 'p 2.jpg').unlink()
    Image.open(io.BytesIO(smooth_image(2))).convert('RGBA').save(
        photos / 'p 2.png')
    root = convert(own)
    upright = images.read_image(layout.image_path(root, 'p 0'))
    stored = np.array(Image.open(io.BytesIO(smooth_image(0))))
    assert upright.shape == (60, 40, 3)
    assert np.abs(np.rot90(stored, -1).astype(int) - upright).max() < 12
    for i in (1, 2):
        found = images.read_image(layout.image_path(root, f'p {i}'))
        wanted = np.array(Image.open(io.BytesIO(smooth_image(i))))
        assert np.abs(wanted.astype(int) - found).max() < 12
