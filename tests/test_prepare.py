"""Does prepare.py make the layout of VOC and SBD, and nothing but the layout?

    python -m pytest tests/test_prepare.py

Converted are small archives of the true structure that the tests write, and
the real labels in ../shared/data where that is there. Nothing is downloaded.
"""
import collections
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import prepare
import utils
from conftest import refused
from conversion import (
    contents,
    encode_mat,
    interrupt_after,
    list_text,
    load_label,
    palette,
    palette_png,
    split_ids,
    tree,
    write_tar,
)
from converters import custom, layout
from converters import voc as converter
from lib import download, images

SHARED = Path(utils.ROOT).parent / 'shared' / 'data'
TAR, TGZ = 'VOCtrainval_11-May-2012.tar', 'benchmark.tgz'
VOC, SBD = 'VOCdevkit/VOC2012', 'benchmark_RELEASE/dataset'
# train: has both masks; plain: VOC's alone; val: has both; first and second:
# in SBD's lists alone; other: an image without a mask
IDS = {'train': '2007_000001', 'plain': '2007_000002', 'val': '2007_000003',
       'first': '2008_000004', 'second': '2008_000005', 'other': '2009_000006'}
TRAINAUG = ['2007_000001', '2007_000002', '2008_000004', '2008_000005']

each_archive = pytest.mark.parametrize('name', [TAR, TGZ])


def mat(mask):
    """Return the bytes of SBD's .mat of a mask."""
    return encode_mat(GTcls={'Boundaries': np.zeros((20, 1)),
                             'Segmentation': mask,
                             'CategoriesPresent': np.unique(mask)})


class Archives:
    """Two small archives of the true structure, and the masks in them."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.folder = folder
        self.own, self.theirs, self.jpeg = {}, {}, {}
        self.members = {TAR: {}, TGZ: {}}      # {archive: {name: bytes}}
        voc, sbd = self.members[TAR], self.members[TGZ]
        for key, name in IDS.items():
            mask = rng.integers(0, 21, (11, 17), dtype=np.uint8)
            jpeg = self.jpeg[name] = b'\xff\xd8' + rng.bytes(5000)
            voc[f'{VOC}/Annotations/{name}.xml'] = b'<a/>'
            voc[f'{VOC}/JPEGImages/{name}.jpg'] = jpeg
            if key in ('train', 'plain', 'val'):
                self.own[name] = mask.copy()
                self.own[name][::5] = 255
                voc[f'{VOC}/SegmentationClass/{name}.png'] = palette_png(
                    self.own[name])
            if key in ('train', 'val', 'first', 'second'):
                self.theirs[name] = 20 - mask
                sbd[f'{SBD}/cls/{name}.mat'] = mat(self.theirs[name])
                sbd[f'{SBD}/img/{name}.jpg'] = jpeg
        train, val = [IDS['plain'], IDS['train']], [IDS['val']]
        for split, names in (('train', train), ('val', val),
                             ('trainval', train + val)):
            voc[f'{VOC}/ImageSets/Segmentation/{split}.txt'] = \
                list_text(names)
        sbd[f'{SBD}/train.txt'] = list_text([*val, IDS['first']])
        sbd[f'{SBD}/val.txt'] = list_text([IDS['second'], IDS['train']])
        self.lists = {'train': sorted(train), 'val': val,
                      'trainval': sorted(train + val), 'trainaug': TRAINAUG}
        self.others = {TAR: [], TGZ: []}       # TarInfo of no plain file

    def write(self, monkeypatch, cut=0):
        """Write them, less `cut` bytes, and have the converter expect them."""
        self.folder.mkdir(exist_ok=True)
        described = []
        for name, mode in ((TAR, 'w'), (TGZ, 'w:gz')):
            path = self.folder / name
            write_tar(path, self.members[name], mode, self.others[name])
            if cut:
                os.truncate(path, path.stat().st_size - cut)
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            described.append((f'file://{self.folder}/{name}', f'md5:{digest}',
                              path.stat().st_size))
        lists = {split: (len(names), hashlib.sha256(
            list_text(sorted(names))).hexdigest())
            for split, names in self.lists.items()}
        expect(monkeypatch, archives=tuple(described), unpacked=10 ** 6,
               lists=lists)
        return self


def expect(monkeypatch, **changes):
    """Change what the converter expects of its archives."""
    monkeypatch.setattr(converter, 'SOURCE', {**converter.SOURCE, **changes})


@pytest.fixture
def archives(tmp_path):
    return Archives(tmp_path / 'archives')


@pytest.fixture
def written(archives, monkeypatch):
    return archives.write(monkeypatch)


def convert(root, archives, *words):
    prepare.main(['voc', '--from', str(archives.folder), '--to', str(root),
                  *words])
    return root


def check(root, archives, sbd_first=()):
    """Compare all of root with what the archives hold."""
    for split, names in archives.lists.items():
        assert split_ids(root, split) == names
    masks = {**archives.theirs, **archives.own}
    masks.update({name: archives.theirs[name] for name in sbd_first})
    for name in [*TRAINAUG, IDS['val']]:
        assert palette(root, name) == images.voc_palette().tolist()
        np.testing.assert_array_equal(load_label(root, name), masks[name])
        assert Path(layout.image_path(root, name)).read_bytes() == \
            archives.jpeg[name]
    found = {path for path in contents(root) if '/' in path}
    assert found == {f'ImageSets/Segmentation/{split}.txt'
                     for split in archives.lists} | {
        f'{kind}.{end}' % name for name in [*TRAINAUG, IDS['val']]
        for kind, end in (('JPEGImages/%s', 'jpg'),
                          ('SegmentationClassAug/%s', 'png'))}
    assert Path(root, 'classes.txt').read_bytes() == \
        Path(images.class_file('voc')).read_bytes()
    stamp = json.loads(Path(root, 'prepared.json').read_text())
    assert stamp['counts'] == {split: len(names) for split, names
                               in archives.lists.items()}


# ------------------------------------------------- the command line
def test_the_old_name_of_custom_is_refused(monkeypatch, capsys):
    status, line = refused(prepare.main, 'masks', 'photos', 'masks',
                           monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and 'prepare.py custom IMAGES MASKS' in line


@pytest.mark.parametrize('name', prepare.CONVERTERS)
def test_help_says_what_a_converter_makes(name, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main([name, '--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f'default: data/{name}' in text
    assert prepare.CONVERTERS[name].convert.__doc__.split()[0] in text


# ------------------------------------------------- which mask
def test_masks_of_voc_go_first(written, tmp_path):
    check(convert(tmp_path / 'voc', written), written)


def test_masks_of_sbd_go_first_but_for_val(written, tmp_path):
    root = convert(tmp_path / 'voc', written, '--sbd-first')
    check(root, written, sbd_first=[IDS['train']])


def test_colours_of_voc():
    """The official palette, and the 21 names."""
    names, colours = images.read_class_file(images.class_file('voc'))
    assert len(names) == len(set(names)) == 21
    assert (names[0], names[11], names[20]) == ('background', 'dining table',
                                                'tv monitor')
    assert (names[15], colours[15]) == ('person', [192, 128, 128])
    assert (images.full_palette(colours) == images.voc_palette()).all()


# ------------------------------------------------- resuming
def test_a_finished_set_is_left_as_it_is(written, tmp_path, capsys):
    root = convert(tmp_path / 'voc', written)
    before = tree(root)
    shutil.rmtree(written.folder)
    capsys.readouterr()
    convert(root, written)
    assert tree(root) == before
    assert capsys.readouterr().out.count('\n') == 1
    with pytest.raises(utils.UserError, match=re.escape(
            f'{root} holds voc, made with other options (sbd_first: False -> '
            f'True); name another folder')):
        convert(root, written, '--sbd-first')
    with pytest.raises(utils.UserError, match=re.escape(
            f'{root} holds voc, not coco; name another folder')):
        layout.is_ready(str(root), 'coco', {})
    (root / 'prepared.json').write_text('{"name": ')
    with pytest.raises(utils.UserError, match='prepared.json cannot be read'):
        convert(root, written)


def test_lists_of_other_systems_are_read(written, tmp_path, capsys):
    """With a byte-order mark and CRLF, or in UTF-16."""
    root = convert(tmp_path / 'voc', written)
    for split, encoding in (('val', 'utf-8-sig'), ('train', 'utf-16')):
        path = root / layout.LISTS / f'{split}.txt'
        path.write_bytes(path.read_text().replace('\n', '\r\n').encode(
            encoding))
    capsys.readouterr()
    convert(root, written)
    assert (f'{root} is ready: voc, train 2, val 1, trainval 3, trainaug 4; '
            in capsys.readouterr().out)


@pytest.mark.parametrize('count', [0, 1, 2, 5])
def test_an_interrupted_conversion_is_resumed(written, tmp_path, monkeypatch,
                                              count):
    """Within SBD's 2 labels, or VOC's 8 files; no file is made twice."""
    root = tmp_path / 'voc'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, 'progress', interrupt_after(count))
        convert(root, written)
    before = tree(root)
    with pytest.raises(utils.UserError, match='another folder'):
        convert(root, written, '--sbd-first')
    check(convert(root, written), written)
    made = {path for path in before if path[-4:] in ('.png', '.jpg')}
    sent = count + 2 * (count >= 2)     # what was not begun is dropped
    assert 2 * (count >= 2) <= len(made) <= sent
    after = tree(root)
    assert all(after[path] == before[path] for path in made)


def test_removed_files_are_made_again(written, tmp_path):
    root = convert(tmp_path / 'voc', written)
    os.remove(layout.label_path(root, IDS['first']))
    os.remove(layout.image_path(root, IDS['val']))
    check(convert(root, written), written)


# ------------------------------------------------- fetching
def test_download_into_the_folder_beside(written, tmp_path):
    root = tmp_path / 'data' / 'voc'
    prepare.main(['voc', '--to', f'{root}/'])
    check(root, written)
    assert contents(tmp_path / 'data' / 'downloads') == \
        contents(written.folder)


@each_archive
def test_missing_archive(written, tmp_path, monkeypatch, name):
    """With --from nothing is downloaded."""
    monkeypatch.setattr(download, 'download', None)
    (written.folder / name).unlink()
    with pytest.raises(utils.UserError, match=f'{written.folder}/{name} is '
                                              f'not there'):
        convert(tmp_path / 'voc', written)
    assert not (tmp_path / 'voc').exists()


@each_archive
def test_wrong_md5(written, tmp_path, name):
    with open(written.folder / name, 'ab') as file:
        file.write(b'\0')
    before = tree(written.folder)
    with pytest.raises(utils.UserError, match=f'{name} has the md5.*anew'):
        convert(tmp_path / 'voc', written)
    assert not (tmp_path / 'voc').exists()
    assert tree(written.folder) == before


@each_archive
def test_truncated_archive(archives, tmp_path, monkeypatch, name):
    archives.members[TAR]['padding'] = bytes(2000)
    archives.write(monkeypatch, cut=15000)
    cut = converter.SOURCE
    archives.write(monkeypatch)
    complete = converter.SOURCE['archives']
    place = (TAR, TGZ).index(name)
    os.truncate(archives.folder / name, cut['archives'][place][2])
    expect(monkeypatch, lists=cut['lists'], archives=tuple(
        (cut['archives'] if i == place else complete)[i] for i in (0, 1)))
    with pytest.raises(utils.UserError, match=f'{name} is truncated'):
        convert(tmp_path / 'voc', archives)


def test_room_on_the_disk(written, tmp_path, monkeypatch):
    """What is to come counts, downloads with it, and not what is there."""
    root = tmp_path / 'data' / 'voc'
    usage = collections.namedtuple('usage', 'total used free')
    sizes = [size for _, _, size in converter.SOURCE['archives']]

    def run(free, *words):
        monkeypatch.setattr(shutil, 'disk_usage',
                            lambda path: usage(0, 0, free))
        prepare.main(['voc', '--to', str(root), *words])

    with pytest.raises(utils.RunError,
                       match=r'has 0\.00 GB free.*needs 0\.00 GB'):
        run(10 ** 6 - 1, '--from', str(written.folder))
    with pytest.raises(utils.RunError, match=f'^{tmp_path} has'):
        run(10 ** 6 + sum(sizes) - 1)
    assert not root.parent.exists()
    (tmp_path / 'data' / 'downloads').mkdir(parents=True)
    part = tmp_path / 'data' / 'downloads' / (TAR + '.part')
    shutil.copy(written.folder / TAR, part)
    os.truncate(part, 100)
    run(10 ** 6 + sum(sizes) - 100)
    os.remove(layout.label_path(root, IDS['first']))
    there = sum(len(data) for path, data in contents(root).items()
                if path.startswith(('JPEG', 'SegmentationClassAug')))
    with pytest.raises(utils.RunError, match='GB free'):
        run(10 ** 6 - there - 1)
    run(10 ** 6 - there)
    check(root, written)


# ------------------------------------------------- hostile and wrong archives
def test_names_that_lead_out_of_the_folder(archives, tmp_path, monkeypatch):
    """They are passed over, in the lists or not."""
    sbd = {f'0/{SBD}/cls/{IDS["first"]}.mat': b'evil',
           f'{SBD}/cls/{IDS["first"]}.mat.mat': b'evil',
           **archives.members[TGZ]}
    voc, archives.members[TGZ] = archives.members[TAR], sbd
    for name in ('../../../../evil', '/../../../evil', f'{tmp_path}/evil',
                 '..\\evil'):
        voc[f'{VOC}/JPEGImages/{name}.jpg'] = b'evil'
        voc[f'{VOC}/SegmentationClass/{name}.png'] = b'evil'
        voc[f'{name}.jpg'] = sbd[f'{name}.mat'] = b'evil'
        sbd[f'{SBD}/cls/{name}.mat'] = mat(np.zeros((2, 2), np.uint8))
    archives.write(monkeypatch)
    around = set(contents(tmp_path))
    root = tmp_path / 'a' / 'b' / 'voc'
    check(convert(root, archives), archives)
    assert {path for path in contents(tmp_path)
            if not path.startswith('a/b/voc/')} == around

    evil = '../../../../evil'                  # now an ID of a list, too
    archives.lists['trainaug'] = sorted([*TRAINAUG, evil])
    archives.members[TGZ][f'{SBD}/train.txt'] += list_text([evil])
    archives.write(monkeypatch)
    with pytest.raises(utils.UserError, match=(
            f'{TGZ}: train.txt has the ID \'{evil}\'')):
        convert(tmp_path / 'a' / 'b' / 'new', archives)
    assert {path for path in contents(tmp_path)
            if not path.startswith('a/b/')} == around


@pytest.mark.parametrize('name, member', [
    (TAR, f'{VOC}/ImageSets/Segmentation/val.txt'), (TGZ, f'{SBD}/val.txt')])
@pytest.mark.parametrize('text', [b'b\xe9\n', b'a\0\n'])
def test_lists_that_are_no_text_are_named(archives, tmp_path, monkeypatch,
                                          name, member, text):
    archives.members[name][member] = text
    archives.write(monkeypatch)
    with pytest.raises(utils.UserError, match=f'{name}: val.txt is neither'):
        convert(tmp_path / 'voc', archives)


@pytest.mark.parametrize('change', [
    {'counts': {'../x': 1}}, {'counts': {'train': 'many'}}, {'counts': [3]},
    {'sources': {'images': {'../../mine': '1'}, 'labels': {}}},
    {'sources': {'images': 3, 'labels': {}}}, {'sources': []},
    {'options': 3}])
def test_a_record_that_is_none_is_refused(tmp_path, change):
    """prepared.json of another's folder; what it names outside is not
    removed, as what is gone from a set is."""
    (tmp_path / 'prepared.json').write_text(json.dumps({
        'name': 'custom', 'options': {}, **change}))
    with pytest.raises(utils.UserError, match='prepared.json cannot be read'):
        layout.is_ready(str(tmp_path), 'custom', {'val': 0.2})


def test_lists_of_a_set_cannot_name_what_is_outside(tmp_path):
    """A conversion would remove it: no source has that name."""
    (tmp_path / layout.LISTS).mkdir(parents=True)
    (tmp_path / layout.LISTS / 'train.txt').write_text('a\n../../mine\n')
    for read in (lambda: custom.read_lists(str(tmp_path)),
                 lambda: layout.missing(str(tmp_path), ['train'])):
        with pytest.raises(utils.UserError, match="train.txt has the ID '../"):
            read()


@each_archive
@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE,
                                  tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(archives, tmp_path, monkeypatch, name,
                                       kind):
    secret = tmp_path / 'secret'
    secret.write_text('secret')
    info = tarfile.TarInfo(
        f'{VOC}/JPEGImages/{IDS["other"]}.jpg' if name == TAR else
        f'{SBD}/cls/{IDS["other"]}.mat')
    info.type, info.linkname = kind, str(secret)
    archives.members[TAR].pop(f'{VOC}/JPEGImages/{IDS["other"]}.jpg')
    archives.others[name].append(info)
    archives.write(monkeypatch)
    with pytest.raises(utils.UserError,
                       match=f'{name}.*{IDS["other"]}.*no plain'):
        convert(tmp_path / 'voc', archives)
    assert not any(path.is_symlink() for path in tmp_path.rglob('*'))
    assert b'secret' not in contents(tmp_path / 'voc').values()


def test_lists_are_checked(written, tmp_path, monkeypatch):
    """By count and by sha256, before an image is written."""
    lists = converter.SOURCE['lists']
    for split, (count, digest) in lists.items():
        for wrong in ((count + 1, digest), (count, 'ab' * 16)):
            expect(monkeypatch, lists={**lists, split: wrong})
            expected = f'^{split} has {utils.plural(count, "ID")} of.*' \
                       f'{digest}.*' \
                       f'not {wrong[0]} of {wrong[1]}'
            with pytest.raises(utils.UserError, match=expected):
                convert(tmp_path / 'voc', written)
    assert not list((tmp_path / 'voc' / 'JPEGImages').iterdir())


@pytest.mark.parametrize('name, member', [
    (TAR, f'{VOC}/JPEGImages/{IDS["second"]}.jpg'),
    (TAR, f'{VOC}/SegmentationClass/{IDS["val"]}.png'),
    (TGZ, f'{SBD}/cls/{IDS["first"]}.mat')])
def test_a_missing_file_is_named(archives, tmp_path, monkeypatch, name,
                                 member):
    del archives.members[name][member]
    archives.write(monkeypatch)
    stem = Path(member).stem
    for _ in 'first', 'again':                 # nor is it ready afterwards
        with pytest.raises(utils.RunError, match=f'1 file of.*{stem}'):
            convert(tmp_path / 'voc', archives)


def test_an_error_in_another_process_is_for_the_user(archives, tmp_path,
                                                     monkeypatch):
    archives.members[TGZ][f'{SBD}/cls/{IDS["first"]}.mat'] = b'x' * 200
    archives.write(monkeypatch)
    with pytest.raises(utils.UserError,
                       match=f'{IDS["first"]}.png cannot be made: '):
        convert(tmp_path / 'voc', archives)


@pytest.mark.parametrize('fields', ({'a': 1}, {'GTcls': np.zeros((2, 2))},
                                    {'GTcls': {'Boundaries': 1}}))
def test_a_mat_without_its_field_is_named(archives, tmp_path, monkeypatch,
                                          fields):
    archives.members[TGZ][f'{SBD}/cls/{IDS["first"]}.mat'] = encode_mat(
        **fields)
    archives.write(monkeypatch)
    with pytest.raises(utils.UserError, match=(
            f'{IDS["first"]}.png cannot be made: .*GTcls')):
        convert(tmp_path / 'voc', archives)


def kill_itself(path, file):
    """Be a job that runs out of memory, the first time."""
    if not os.path.exists(file):
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    layout.write_bytes(path, b'made')


def test_a_killed_process_is_told(tmp_path):
    path, file = str(tmp_path / 'a'), str(tmp_path / 'was here')
    with pytest.raises(utils.RunError, match='labels: a process was killed. '
                                             'Was memory short?'):
        layout.run_jobs([(kill_itself, path, file)], 'labels')
    layout.run_jobs([(kill_itself, path, file)], 'labels')
    assert Path(path).read_bytes() == b'made'


def test_scipy_is_asked_for(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(utils.UserError, match='pip install scipy'):
        convert(tmp_path / 'voc', written)
    assert not (tmp_path / 'voc').exists()


# ------------------------------------------------- real files
@pytest.mark.skipif(not (SHARED / 'voc_ids').is_dir(), reason='no voc_ids')
def test_official_lists(archives, tmp_path, monkeypatch):
    """The rule gives the 10,582 official IDs; no image is needed for it."""
    official = {split: (SHARED / 'voc_ids' / f'{split}.txt').read_text()
                .split() for split in archives.lists}
    lists = converter.SOURCE['lists']
    train, val = set(official['train']), official['val']
    sbd = sorted({*official['trainaug']} - set(sorted(train)[::4])) + val[::3]
    archives.members = {
        TAR: {f'{VOC}/ImageSets/Segmentation/{split}.txt':
              list_text(names[::-1])
              for split, names in official.items() if split != 'trainaug'},
        TGZ: {f'{SBD}/train.txt': list_text(sbd[::2]),
              f'{SBD}/val.txt': list_text(sbd[1::2])}}
    archives.write(monkeypatch)
    expect(monkeypatch, lists=lists)
    with pytest.raises(utils.RunError, match='24,062 files of the lists co'):
        convert(tmp_path / 'voc', archives)
    path = tmp_path / 'voc' / 'ImageSets' / 'Segmentation' / 'trainaug.txt'
    assert len(path.read_text().split()) == 10582
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        'd1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24')


@pytest.mark.skipif(not (SHARED / 'sbd_mat').is_dir(), reason='no sbd_mat')
def test_real_labels(archives, tmp_path, monkeypatch):
    """Real images and .mat files give the labels of voc_fixture."""
    pytest.importorskip('scipy')
    fixture, mats = SHARED / 'voc_fixture', SHARED / 'sbd_mat' / 'cls'
    lists = archives.lists = {split: split_ids(fixture, split)
                              for split in ('train', 'val', 'trainaug')}
    lists['trainval'] = lists['train'] + lists['val']
    archives.members = {
        TAR: {f'{VOC}/{path.relative_to(fixture)}': path.read_bytes()
              for path in sorted(fixture.rglob('*')) if path.is_file() and
              path.parent.name != 'SegmentationClassAug'},
        TGZ: {f'{SBD}/cls/{path.name}': path.read_bytes()
              for path in sorted(mats.iterdir())}}
    archives.members[TGZ][f'{SBD}/train.txt'] = list_text(
        path.stem for path in mats.iterdir())
    archives.members[TAR][f'{VOC}/ImageSets/Segmentation/trainval.txt'] = \
        list_text(lists['trainval'])
    archives.write(monkeypatch)
    root = convert(tmp_path / 'voc', archives)
    for name in lists['trainaug'] + lists['val']:
        np.testing.assert_array_equal(load_label(root, name),
                                      load_label(fixture, name))
