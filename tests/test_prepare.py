"""Does prepare.py make the layout, and nothing but the layout?

    python -m pytest tests/test_prepare.py

toy is made as a user makes it; voc from small archives of the true structure
that the tests write, and from the real labels in ../shared/data where that
is there. Nothing is downloaded.
"""
import collections
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import prepare
import utils

SHARED = HERE.parent / 'shared' / 'data'
TAR, TGZ = 'VOCtrainval_11-May-2012.tar', 'benchmark.tgz'
VOC, SBD = 'VOCdevkit/VOC2012', 'benchmark_RELEASE/dataset'
# train: has both masks; plain: VOC's alone; val: has both; first and second:
# in SBD's lists alone; other: a picture without a mask
IDS = {'train': '2007_000001', 'plain': '2007_000002', 'val': '2007_000003',
       'first': '2008_000004', 'second': '2008_000005', 'other': '2009_000006'}
TRAINAUG = ['2007_000001', '2007_000002', '2008_000004', '2008_000005']


def ids(root, split):
    path = Path(root, 'ImageSets', 'Segmentation', split + '.txt')
    return path.read_text().splitlines()


def label(root, name):
    return np.array(Image.open(prepare.label_path(root, name)))


def tree(root):
    """{path within root: (bytes, time of writing)} of all files."""
    return {str(path.relative_to(root)):
            (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(Path(root).rglob('*')) if path.is_file()}


def contents(root):
    return {path: data for path, (data, _) in tree(root).items()}


# ------------------------------------------------- toy
def toy(root, seed=0, train=6, val=5):
    prepare.main(['toy', '--to', str(root), f'--seed={seed}',
                  f'--train={train}', f'--val={val}'])
    return root


@pytest.fixture(scope='module')
def toy_set(tmp_path_factory):
    return toy(tmp_path_factory.mktemp('toy') / 'set', train=15)


def test_toy_layout(toy_set):
    train, val = ids(toy_set, 'train'), ids(toy_set, 'val')
    assert (len(train), len(val)) == (15, 5)
    assert not set(train) & set(val)
    assert train == sorted(train) and val == sorted(val)
    stems = [sorted(path.stem for path in (toy_set / kind).iterdir())
             for kind in ('JPEGImages', 'SegmentationClassAug')]
    assert stems[0] == stems[1] == sorted(train + val)
    assert (toy_set / 'classes.txt').read_bytes() == \
        (HERE / 'classes' / 'toy.txt').read_bytes()


def test_toy_pictures(toy_set):
    sizes, colourful = set(), []
    for name in ids(toy_set, 'train'):
        image = Image.open(prepare.image_path(toy_set, name))
        assert (image.format, image.mode) == ('JPEG', 'RGB')
        classes = label(toy_set, name)
        assert image.size == classes.shape[::-1]
        assert 96 <= min(image.size) and max(image.size) <= 160
        sizes.add(image.size)
        saturation = np.array(image.convert('HSV'))[..., 1]
        colourful.append((saturation[(classes > 0) & (classes < 255)].mean(),
                          saturation[classes == 0].mean()))
    assert len(sizes) > 10
    shapes, ground = np.mean(colourful, 0)
    assert shapes > 2 * ground


def test_toy_labels(toy_set):
    """Classes and void only, all of them, and a rim between any two."""
    counts = np.zeros(256, int)
    for name in ids(toy_set, 'train') + ids(toy_set, 'val'):
        classes = label(toy_set, name).astype(int)
        counts += np.bincount(classes.ravel(), minlength=256)
        for a, b in ((classes[1:], classes[:-1]),
                     (classes[:, 1:], classes[:, :-1])):
            assert not ((a != b) & (a != 255) & (b != 255)).any()
    assert set(np.flatnonzero(counts)) == {0, 1, 2, 3, 4, 5, 255}
    share = counts / counts.sum()
    assert share[1:6].min() > 0.01 and 0.3 < share[0] < 0.9
    assert 0.02 < share[255] < 0.2


def test_toy_palette(toy_set):
    image = Image.open(prepare.label_path(toy_set, ids(toy_set, 'val')[0]))
    assert (image.format, image.mode) == ('PNG', 'P')
    lines = (HERE / 'classes' / 'toy.txt').read_text().splitlines()
    assert image.getpalette()[:18] == [int(word) for line in lines
                                       for word in line.split()[-3:]]
    assert image.getpalette()[-3:] == [224, 224, 192]


def test_toy_bytes_follow_from_the_seed(toy_set, tmp_path):
    again = toy(tmp_path / 'again', train=15)
    assert contents(toy_set) == contents(again)
    other = toy(tmp_path / 'other', seed=1)
    fewer = toy(tmp_path / 'fewer')
    assert ids(fewer, 'val') == ids(toy_set, 'val')
    assert ids(fewer, 'train') == ids(toy_set, 'train')[:6]
    for name in ids(fewer, 'train') + ids(fewer, 'val'):
        for at in (prepare.image_path, prepare.label_path):
            few = Path(at(fewer, name)).read_bytes()
            assert few == Path(at(toy_set, name)).read_bytes()
            assert few != Path(at(other, name)).read_bytes()


def test_toy_is_not_made_twice(tmp_path, capsys):
    root = toy(tmp_path / 'set')
    before = tree(root)
    toy(root)
    assert tree(root) == before
    assert 'is ready' in capsys.readouterr().out
    for options in ({'seed': 1}, {'train': 7}, {'val': 2}):
        with pytest.raises(ValueError, match=f'{root}.*--to'):
            toy(root, **options)
    assert tree(root) == before


def test_toy_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    whole, root = toy(tmp_path / 'whole'), tmp_path / 'set'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, 'progress', cut_off(4))
        toy(root)
    with pytest.raises(ValueError, match='another folder'):
        toy(root, seed=1)
    assert contents(toy(root)) == contents(whole)
    os.remove(prepare.image_path(root, 'toy_0002'))
    assert contents(toy(root)) == contents(whole)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    for root in (tmp_path, tmp_path / 'notes.txt'):
        with pytest.raises(ValueError, match='another folder'):
            toy(root)
    with pytest.raises(OSError, match='notes.txt/set cannot be made'):
        toy(tmp_path / 'notes.txt' / 'set')
    assert contents(tmp_path) == {'notes.txt': b'mine'}


@pytest.mark.parametrize('wrong', [{'seed': -1}, {'train': 0}, {'val': 0}])
def test_toy_counts(tmp_path, wrong):
    with pytest.raises(ValueError, match=str(min(wrong.values()))):
        toy(tmp_path / 'set', **wrong)
    assert not (tmp_path / 'set').exists()


def test_toy_as_a_user(tmp_path):
    words = [sys.executable, str(HERE / 'prepare.py'), 'toy', '--train=3']
    subprocess.run(words, cwd=tmp_path, check=True)
    assert len(ids(tmp_path / 'data' / 'toy', 'val')) == 40
    done = subprocess.run([*words, '--seed=1'], cwd=tmp_path, check=False,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('prepare.py: ')
    assert done.stderr.count('\n') == 1 and 'data/toy' in done.stderr


# ------------------------------------------------- voc
def cut_off(count):
    """A progress bar that Ctrl-C ends after so many items."""
    def progress(items, **words):
        for number, item in enumerate(items):
            if number == count:
                raise KeyboardInterrupt
            yield item
    return progress


def png(mask):
    image = Image.fromarray(mask)
    image.putpalette(utils.voc_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return buffer.getvalue()


def mat(mask):
    savemat = pytest.importorskip('scipy.io').savemat
    buffer = io.BytesIO()
    savemat(buffer, {'GTcls': {'Boundaries': np.zeros((20, 1)),
                               'Segmentation': mask,
                               'CategoriesPresent': np.unique(mask)}})
    return buffer.getvalue()


def listing(names):
    return ''.join(name + '\n' for name in names).encode()


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
                voc[f'{VOC}/SegmentationClass/{name}.png'] = png(
                    self.own[name])
            if key in ('train', 'val', 'first', 'second'):
                self.theirs[name] = 20 - mask
                sbd[f'{SBD}/cls/{name}.mat'] = mat(self.theirs[name])
                sbd[f'{SBD}/img/{name}.jpg'] = jpeg
        train, val = [IDS['plain'], IDS['train']], [IDS['val']]
        for split, names in (('train', train), ('val', val),
                             ('trainval', train + val)):
            voc[f'{VOC}/ImageSets/Segmentation/{split}.txt'] = listing(names)
        sbd[f'{SBD}/train.txt'] = listing([*val, IDS['first']])
        sbd[f'{SBD}/val.txt'] = listing([IDS['second'], IDS['train']])
        self.lists = {'train': sorted(train), 'val': val,
                      'trainval': sorted(train + val), 'trainaug': TRAINAUG}
        self.odd = {TAR: [], TGZ: []}          # TarInfo of no plain file

    def write(self, monkeypatch, cut=0):
        """Write them, less `cut` bytes, and have prepare expect them."""
        self.folder.mkdir(exist_ok=True)
        described = []
        for name, mode in ((TAR, 'w'), (TGZ, 'w:gz')):
            path = self.folder / name
            with tarfile.open(path, mode) as archive:
                for member, data in self.members[name].items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                for info in self.odd[name]:
                    archive.addfile(info)
            if cut:
                os.truncate(path, path.stat().st_size - cut)
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            described.append((f'file://{self.folder}/{name}', f'md5:{digest}',
                              path.stat().st_size))
        lists = {split: (len(names), hashlib.sha256(
            listing(sorted(names))).hexdigest())
            for split, names in self.lists.items()}
        monkeypatch.setitem(prepare.SOURCES, 'voc', {
            'archives': tuple(described), 'unpacked': 10 ** 6,
            'lists': lists})
        return self


@pytest.fixture
def archives(tmp_path):
    return Archives(tmp_path / 'archives')


def voc(root, archives, *words):
    prepare.main(['voc', '--from', str(archives.folder), '--to', str(root),
                  *words])
    return root


def check_voc(root, archives, sbd_wins=()):
    """Compare all of root with what the archives hold."""
    for split, names in archives.lists.items():
        assert ids(root, split) == names
    masks = {**archives.theirs, **archives.own}
    masks.update({name: archives.theirs[name] for name in sbd_wins})
    for name in [*TRAINAUG, IDS['val']]:
        path = prepare.label_path(root, name)
        assert Image.open(path).mode == 'P'
        assert Image.open(path).getpalette() == \
            utils.voc_palette().ravel().tolist()
        np.testing.assert_array_equal(label(root, name), masks[name])
        assert Path(prepare.image_path(root, name)).read_bytes() == \
            archives.jpeg[name]
    found = {path for path in contents(root) if '/' in path}
    assert found == {f'ImageSets/Segmentation/{split}.txt'
                     for split in archives.lists} | {
        f'{kind}.{end}' % name for name in [*TRAINAUG, IDS['val']]
        for kind, end in (('JPEGImages/%s', 'jpg'),
                          ('SegmentationClassAug/%s', 'png'))}
    assert Path(root, 'classes.txt').read_bytes() == \
        (HERE / 'classes' / 'voc.txt').read_bytes()
    stamp = json.loads(Path(root, 'prepared.json').read_text())
    assert stamp['counts'] == {split: len(names) for split, names
                               in archives.lists.items()}


def test_voc_masks_win(archives, tmp_path, monkeypatch):
    archives.write(monkeypatch)
    check_voc(voc(tmp_path / 'voc', archives), archives)


def test_sbd_masks_win_but_for_val(archives, tmp_path, monkeypatch):
    archives.write(monkeypatch)
    root = voc(tmp_path / 'voc', archives, '--sbd-first')
    check_voc(root, archives, sbd_wins=[IDS['train']])


def test_voc_is_not_made_twice(archives, tmp_path, monkeypatch, capsys):
    root = voc(tmp_path / 'voc', archives.write(monkeypatch))
    before = tree(root)
    shutil.rmtree(archives.folder)
    capsys.readouterr()
    voc(root, archives)
    assert tree(root) == before
    assert capsys.readouterr().out.count('\n') == 1
    with pytest.raises(ValueError, match='sbd_first.*another folder'):
        voc(root, archives, '--sbd-first')


@pytest.mark.parametrize('count', [0, 1, 2, 5])
def test_voc_goes_on_where_it_was_cut_off(archives, tmp_path, monkeypatch,
                                          count):
    """Within SBD's 2 labels, or VOC's 8 files; no file is made twice."""
    archives.write(monkeypatch)
    root = tmp_path / 'voc'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, 'progress', cut_off(count))
        voc(root, archives)
    before = tree(root)
    with pytest.raises(ValueError, match='another folder'):
        voc(root, archives, '--sbd-first')
    check_voc(voc(root, archives), archives)
    made = {path for path in before if path[-4:] in ('.png', '.jpg')}
    assert len(made) == count + 2 * (count >= 2)
    after = tree(root)
    assert all(after[path] == before[path] for path in made)


def test_voc_makes_again_what_is_gone(archives, tmp_path, monkeypatch):
    root = voc(tmp_path / 'voc', archives.write(monkeypatch))
    os.remove(prepare.label_path(root, IDS['first']))
    os.remove(prepare.image_path(root, IDS['val']))
    check_voc(voc(root, archives), archives)


def test_download(archives, tmp_path, monkeypatch):
    """Without --from, into the folder `downloads` beside --to."""
    archives.write(monkeypatch)
    root = tmp_path / 'data' / 'voc'
    prepare.main(['voc', '--to', f'{root}/'])
    check_voc(root, archives)
    assert contents(tmp_path / 'data' / 'downloads') == \
        contents(archives.folder)


@pytest.mark.parametrize('name', [TAR, TGZ])
def test_missing_archive(archives, tmp_path, monkeypatch, name):
    """With --from nothing is downloaded."""
    archives.write(monkeypatch)
    monkeypatch.setattr(utils, 'download', None)
    (archives.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{archives.folder}/{name}'):
        voc(tmp_path / 'voc', archives)
    assert not (tmp_path / 'voc').exists()


@pytest.mark.parametrize('name', [TAR, TGZ])
def test_wrong_md5(archives, tmp_path, monkeypatch, name):
    archives.write(monkeypatch)
    with open(archives.folder / name, 'ab') as file:
        file.write(b'\0')
    before = tree(archives.folder)
    with pytest.raises(ValueError, match=f'{name} has the md5.*anew'):
        voc(tmp_path / 'voc', archives)
    assert not (tmp_path / 'voc').exists()
    assert tree(archives.folder) == before


@pytest.mark.parametrize('name', [TAR, TGZ])
def test_truncated_archive(archives, tmp_path, monkeypatch, name):
    archives.members[TAR]['padding'] = bytes(2000)
    archives.write(monkeypatch, cut=15000)
    cut = prepare.SOURCES['voc']
    archives.write(monkeypatch)
    whole = prepare.SOURCES['voc']['archives']
    place = (TAR, TGZ).index(name)
    path = archives.folder / name
    os.truncate(path, cut['archives'][place][2])
    monkeypatch.setitem(prepare.SOURCES, 'voc', {**cut, 'archives': tuple(
        cut['archives'][i] if i == place else whole[i] for i in (0, 1))})
    with pytest.raises(ValueError, match=f'{name} is truncated'):
        voc(tmp_path / 'voc', archives)


def test_little_disk(archives, tmp_path, monkeypatch):
    """What is to come counts, downloads with it, and not what is there."""
    archives.write(monkeypatch)
    root = tmp_path / 'data' / 'voc'
    usage = collections.namedtuple('usage', 'total used free')
    sizes = [size for _, _, size in prepare.SOURCES['voc']['archives']]

    def run(free, *words):
        monkeypatch.setattr(shutil, 'disk_usage',
                            lambda path: usage(0, 0, free))
        prepare.main(['voc', '--to', str(root), *words])

    with pytest.raises(OSError, match=r'has 0\.00 GB free.*needs 0\.00 GB'):
        run(10 ** 6 - 1, '--from', str(archives.folder))
    with pytest.raises(OSError, match=f'^{tmp_path} has'):
        run(10 ** 6 + sum(sizes) - 1)
    assert not root.parent.exists()
    (tmp_path / 'data' / 'downloads').mkdir(parents=True)
    part = tmp_path / 'data' / 'downloads' / (TAR + '.part')
    shutil.copy(archives.folder / TAR, part)
    os.truncate(part, 100)
    run(10 ** 6 + sum(sizes) - 100)
    os.remove(prepare.label_path(root, IDS['first']))
    there = sum(len(data) for path, data in contents(root).items()
                if path.startswith(('JPEG', 'SegmentationClassAug')))
    with pytest.raises(OSError, match='GB free'):
        run(10 ** 6 - there - 1)
    run(10 ** 6 - there)
    check_voc(root, archives)


def test_hostile_names(archives, tmp_path, monkeypatch):
    """Names that lead out of the folder are passed over, lists or not."""
    sbd = {f'0/{SBD}/cls/{IDS["first"]}.mat': b'evil',
           f'{SBD}/cls/{IDS["first"]}.mat.mat': b'evil',
           **archives.members[TGZ]}
    voc_, archives.members[TGZ] = archives.members[TAR], sbd
    for name in ('../../../../evil', '/../../../evil', f'{tmp_path}/evil',
                 '..\\evil'):
        voc_[f'{VOC}/JPEGImages/{name}.jpg'] = b'evil'
        voc_[f'{VOC}/SegmentationClass/{name}.png'] = b'evil'
        voc_[f'{name}.jpg'] = sbd[f'{name}.mat'] = b'evil'
        sbd[f'{SBD}/cls/{name}.mat'] = mat(np.zeros((2, 2), np.uint8))
    archives.write(monkeypatch)
    around = set(contents(tmp_path))
    root = tmp_path / 'a' / 'b' / 'voc'
    check_voc(voc(root, archives), archives)
    assert {path for path in contents(tmp_path)
            if not path.startswith('a/b/voc/')} == around

    evil = '../../../../evil'                  # now an ID of a list, too
    archives.lists['trainaug'] = sorted([*TRAINAUG, evil])
    archives.members[TGZ][f'{SBD}/train.txt'] += listing([evil])
    archives.write(monkeypatch)
    with pytest.raises(RuntimeError, match='not made'):
        voc(tmp_path / 'a' / 'b' / 'new', archives)
    assert {path for path in contents(tmp_path)
            if not path.startswith('a/b/')} == around


@pytest.mark.parametrize('name', [TAR, TGZ])
@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE,
                                  tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_hostile_links(archives, tmp_path, monkeypatch, name, kind):
    secret = tmp_path / 'secret'
    secret.write_text('secret')
    info = tarfile.TarInfo(
        f'{VOC}/JPEGImages/{IDS["other"]}.jpg' if name == TAR else
        f'{SBD}/cls/{IDS["other"]}.mat')
    info.type, info.linkname = kind, str(secret)
    archives.members[TAR].pop(f'{VOC}/JPEGImages/{IDS["other"]}.jpg')
    archives.odd[name].append(info)
    archives.write(monkeypatch)
    with pytest.raises(ValueError, match=f'{name}.*{IDS["other"]}.*no plain'):
        voc(tmp_path / 'voc', archives)
    assert not any(path.is_symlink() for path in tmp_path.rglob('*'))
    assert b'secret' not in contents(tmp_path / 'voc').values()


def test_lists_are_checked(archives, tmp_path, monkeypatch):
    """By count and by sha256, before a picture is written."""
    right = archives.write(monkeypatch)
    table = prepare.SOURCES['voc']
    for split, (count, digest) in table['lists'].items():
        for wrong in ((count + 1, digest), (count, 'ab' * 16)):
            monkeypatch.setitem(prepare.SOURCES, 'voc', {
                **table, 'lists': {**table['lists'], split: wrong}})
            expected = f'^{split} has {count} IDs.*{digest}.*' \
                       f'not {wrong[0]} of {wrong[1]}'
            with pytest.raises(ValueError, match=expected):
                voc(tmp_path / 'voc', right)
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
        with pytest.raises(RuntimeError, match=f'1 files.*{stem}'):
            voc(tmp_path / 'voc', archives)


def test_error_of_a_process_is_for_the_user(archives, tmp_path, monkeypatch):
    archives.members[TGZ][f'{SBD}/cls/{IDS["first"]}.mat'] = b'x' * 200
    archives.write(monkeypatch)
    with pytest.raises(ValueError) as caught:
        voc(tmp_path / 'voc', archives)
    assert utils._for_user(caught.value)


def test_scipy_is_asked_for(archives, tmp_path, monkeypatch):
    archives.write(monkeypatch)
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(ValueError, match='pip install scipy'):
        voc(tmp_path / 'voc', archives)
    assert not (tmp_path / 'voc').exists()


def test_voc_colours():
    """The official palette, and the 21 names."""
    lines = (HERE / 'classes' / 'voc.txt').read_text().splitlines()
    names = [line.rsplit(' ', 3)[0] for line in lines]
    assert len(names) == len(set(names)) == 21
    assert (names[0], names[11], names[20]) == ('background', 'dining table',
                                                'tv monitor')
    assert lines[15] == 'person 192 128 128'
    assert (prepare.palette('voc') == utils.voc_palette()).all()


# ------------------------------------------------- real files
@pytest.mark.skipif(not (SHARED / 'voc_ids').is_dir(), reason='no voc_ids')
def test_official_lists(archives, tmp_path, monkeypatch):
    """The rule gives the 10,582 official IDs; no picture is needed for it."""
    official = {split: (SHARED / 'voc_ids' / f'{split}.txt').read_text()
                .split() for split in archives.lists}
    table = prepare.SOURCES['voc']['lists']
    train, val = set(official['train']), official['val']
    sbd = sorted({*official['trainaug']} - set(sorted(train)[::4])) + val[::3]
    archives.members = {
        TAR: {f'{VOC}/ImageSets/Segmentation/{split}.txt': listing(names[::-1])
              for split, names in official.items() if split != 'trainaug'},
        TGZ: {f'{SBD}/train.txt': listing(sbd[::2]),
              f'{SBD}/val.txt': listing(sbd[1::2])}}
    archives.write(monkeypatch)
    monkeypatch.setitem(prepare.SOURCES['voc'], 'lists', table)
    with pytest.raises(RuntimeError, match='were not made'):
        voc(tmp_path / 'voc', archives)
    path = tmp_path / 'voc' / 'ImageSets' / 'Segmentation' / 'trainaug.txt'
    assert len(path.read_text().split()) == 10582
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        'd1326bd532648d73bc4b1bd275434eba81930982dc7401a65a8cecb26c028e24')


@pytest.mark.skipif(not (SHARED / 'sbd_mat').is_dir(), reason='no sbd_mat')
def test_real_labels(archives, tmp_path, monkeypatch):
    """Real pictures and .mat files give the labels of voc_fixture."""
    pytest.importorskip('scipy')
    fixture, mats = SHARED / 'voc_fixture', SHARED / 'sbd_mat' / 'cls'
    lists = archives.lists = {split: ids(fixture, split)
                              for split in ('train', 'val', 'trainaug')}
    lists['trainval'] = lists['train'] + lists['val']
    archives.members = {
        TAR: {f'{VOC}/{path.relative_to(fixture)}': path.read_bytes()
              for path in sorted(fixture.rglob('*')) if path.is_file() and
              path.parent.name != 'SegmentationClassAug'},
        TGZ: {f'{SBD}/cls/{path.name}': path.read_bytes()
              for path in sorted(mats.iterdir())}}
    archives.members[TGZ][f'{SBD}/train.txt'] = listing(
        path.stem for path in mats.iterdir())
    archives.members[TAR][f'{VOC}/ImageSets/Segmentation/trainval.txt'] = \
        listing(lists['trainval'])
    archives.write(monkeypatch)
    root = voc(tmp_path / 'voc', archives)
    for name in lists['trainaug'] + lists['val']:
        np.testing.assert_array_equal(label(root, name), label(fixture, name))
