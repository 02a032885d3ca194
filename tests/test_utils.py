"""Do files survive crashes, downloads get checked, scores come out by hand?

    python -m pytest tests/test_utils.py

Downloads come from a server in this process, on localhost.
"""
import csv
import hashlib
import io
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from conftest import refused


# ------------------------------------------------- how a program ends
TOOL = '''
import json
def ours(kind):
    raise kind(
        'what, and the remedy')
def library():
    json.loads('{')
def builtin():
    return int('x') or 'raise'
'''


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The functions of a script that lies where utils.py lies."""
    (tmp_path / 'tool.py').write_text(TOOL)
    monkeypatch.setattr(utils, 'HERE', str(tmp_path))
    return runpy.run_path(str(tmp_path / 'tool.py'))


@pytest.mark.parametrize('kind, status', [
    (ValueError, 2), (FileNotFoundError, 2), (RuntimeError, 1), (OSError, 1),
    (PermissionError, 1)])
def test_launch_tells_the_user(kind, status, tool, monkeypatch, capsys):
    assert refused(lambda: tool['ours'](kind), monkeypatch=monkeypatch,
                   capsys=capsys) == (status,
                                      'script.py: what, and the remedy')


@pytest.mark.parametrize('name', ['library', 'builtin'])
def test_launch_keeps_the_traceback_of_a_defect(name, tool):
    with pytest.raises(ValueError):          # SystemExit would be none
        utils.launch(tool[name])


def test_launch_keeps_the_traceback_of_other_errors(tool):
    with pytest.raises(KeyError):
        utils.launch(lambda: tool['ours'](KeyError))


def test_launch_keeps_the_traceback_of_other_folders(tool, monkeypatch):
    monkeypatch.setattr(utils, 'HERE', os.path.dirname(utils.HERE))
    with pytest.raises(RuntimeError):
        utils.launch(lambda: tool['ours'](RuntimeError))


def test_launch_on_real_faults(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    for call, status in (
            (lambda: utils.load(tmp_path / 'gone'), 2),
            (lambda: utils.save({}, str(tmp_path / 'file' / 'x')), 1)):
        code, line = refused(call, monkeypatch=monkeypatch, capsys=capsys)
        assert code == status and str(tmp_path) in line


def test_launch_on_ctrl_c():
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit, match='interrupted'):
        utils.launch(main)


def test_launch_lets_a_good_end_be():
    assert utils.launch(lambda: None) is None


def test_stop_request_on_sigterm():
    stop = utils.StopRequest()
    assert not stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop and stop.name == 'SIGTERM'
    os.kill(os.getpid(), signal.SIGTERM)         # asked again: no haste
    assert stop


def test_stop_request_second_ctrl_c_ends():
    stop = utils.StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop and stop.name == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# ------------------------------------------------- device, versions, log
@pytest.mark.parametrize('numbers', [[99], [-2], [0, 99]])
def test_pick_devices_refuses_a_gpu_that_is_not_there(numbers):
    with pytest.raises(ValueError, match=(
            rf'DEVICES=\[{str(numbers)[1:-1]}\]: this machine has \d+ ')):
        utils.pick_devices(numbers)


@pytest.mark.parametrize('count, numbers, names', [
    (0, [], ['cpu']), (0, [-1], ['cpu']), (2, [], ['cuda:0', 'cuda:1']),
    (2, [1], ['cuda:1']), (2, [1, 0], ['cuda:1', 'cuda:0']),
    (2, [-1, -1], ['cpu', 'cpu'])])
def test_pick_devices(count, numbers, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert [str(each) for each in utils.pick_devices(numbers)] == names


def test_seed():
    drawn = []
    for number in (5, 5, 6):
        utils.seed(number, False)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_versions_can_be_saved(tmp_path):
    utils.save(utils.versions(), str(tmp_path / 'x.pth'))
    loaded = utils.load(tmp_path / 'x.pth')
    assert loaded == utils.versions() and loaded['torch'] == torch.__version__


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_git_hash(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(['git', '-c', 'user.name=a', '-c',
                               'user.email=a@b', *words], cwd=tmp_path,
                              check=True, capture_output=True, text=True)
    monkeypatch.setattr(utils, 'HERE', str(tmp_path))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert utils.git_hash() == 'unknown'
    git('init')
    (tmp_path / 'a').write_text('1')
    git('add', 'a')
    git('commit', '-m', 'a')
    commit = git('rev-parse', 'HEAD').stdout[:12]
    assert utils.git_hash() == commit
    (tmp_path / 'a').write_text('2')
    assert utils.git_hash() == commit + '-dirty'


def write_log(folder, start, steps):
    """Log steps into folder; return the lines of log.csv."""
    log = utils.Log(str(folder), start)
    for step in steps:
        log.write(step, loss=step / 3, lr=0.5)
    log.close()
    return (folder / 'log.csv').read_text().splitlines()


def test_log_by_hand(tmp_path):
    log = utils.Log(str(tmp_path / 'new'))
    log.write(1, loss=1 / 3, lr=0.009)
    log.write(20, lr=1e-5, loss=2, val_mIoU=0.5, images_per_s=12.25)
    with open(tmp_path / 'new' / 'log.csv') as file:     # before close()
        rows = [{name: cell for name, cell in row.items() if cell}
                for row in csv.DictReader(file)]
    assert rows == [
        {'step': '1', 'loss': '0.333333333', 'lr': '0.009'},
        {'step': '20', 'loss': '2', 'lr': '1e-05', 'val_mIoU': '0.5',
         'images_per_s': '12.25'}]
    log.close()
    assert list((tmp_path / 'new').glob('events*'))


def test_log_holds_a_float32_loss_in_full(tmp_path):
    log = utils.Log(str(tmp_path))
    losses = np.random.default_rng(0).random(100, np.float32)
    for loss in losses:
        log.write(1, loss=float(loss))
    log.close()
    read = np.genfromtxt(tmp_path / 'log.csv', delimiter=',', skip_header=1)
    assert (read[:, 1].astype(np.float32) == losses).all()


def test_log_resume_drops_what_comes_after(tmp_path):
    whole = write_log(tmp_path, 0, range(1, 13))
    assert len(whole) == 13
    assert write_log(tmp_path, 10, []) == whole[:11]
    assert write_log(tmp_path, 10, [11, 12]) == whole
    assert write_log(tmp_path, 0, [1]) == whole[:2]   # a new run
    with open(tmp_path / 'log.csv', 'a') as file:
        file.write('\n12,0.')                         # cut off in a line
    assert write_log(tmp_path, 11, [12])[2:] == whole[12:]


# ------------------------------------------------- files
def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_atomic_writes_beside_and_swaps(tmp_path):
    path = tmp_path / 'x'
    path.write_text('old')
    with utils.atomic(str(path)) as part:
        with open(part, 'w') as file:
            file.write('new')
        assert path.read_text() == 'old'
        assert os.path.dirname(part) == str(tmp_path)
    assert contents(tmp_path) == {'x': b'new'}


@pytest.mark.parametrize('kind', [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_on_an_error_leaves_the_old(kind, tmp_path):
    (tmp_path / 'x').write_text('old')
    with pytest.raises(kind):
        with utils.atomic(str(tmp_path / 'x')) as part:
            with open(part, 'w') as file:
                file.write('half')
            raise kind
    assert contents(tmp_path) == {'x': b'old'}


def test_atomic_is_on_the_disk_before_it_takes_the_name(tmp_path,
                                                        monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        def note(*words, name=name, real=getattr(os, name)):
            calls.append(name)
            return real(*words)
        monkeypatch.setattr(os, name, note)
    with utils.atomic(str(tmp_path / 'x')) as part:
        open(part, 'w').close()
    assert calls == ['fsync', 'replace']


def test_save_and_load(tmp_path):
    path = str(tmp_path / 'new' / 'x.pth')
    state = {'net': torch.arange(6.).view(2, 3), 'step': 3, 'names': ['a'],
             'scales': (0.5, 1.0), 'flip': True, 'best': None}
    utils.save(state, path)
    loaded = utils.load(path)
    assert torch.equal(loaded.pop('net'), state.pop('net'))
    assert repr(loaded) == repr(state)


def test_save_on_a_full_disk_keeps_the_old(tmp_path, monkeypatch):
    def full(state, path):
        with open(path, 'w') as file:
            file.write('half')
        raise RuntimeError('[enforce fail at inline_container.cc:603] . '
                           'unexpected pos 64 vs 0\nframe #0: ...')
    path = tmp_path / 'x.pth'
    path.write_text('old')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError) as error:
        utils.save({}, str(path))
    text = str(error.value)
    assert text.startswith(f'{path} cannot be written: is the disk full? ')
    assert 'frame' not in text and 'MODEL_DIR' in text
    assert contents(tmp_path) == {'x.pth': b'old'}


def test_save_to_an_unwritable_place(tmp_path):
    (tmp_path / 'file').touch()
    path = str(tmp_path / 'file' / 'x.pth')          # in a file: root, too
    with pytest.raises(OSError, match=f'^{path} cannot be written: '):
        utils.save({}, path)


def saved(value, **options):
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()


def old_format(value):
    return saved(value, _use_new_zipfile_serialization=False)


WEIGHTS = {'net': torch.ones(100, 100)}


@pytest.mark.parametrize('data', [
    saved(WEIGHTS)[:20000], saved(WEIGHTS)[:100], old_format(WEIGHTS)[:20000],
    old_format(WEIGHTS)[:100], b'', bytes(100), b'hello',
    b'<html>404 not found</html>', np.random.default_rng(0).bytes(1000)],
    ids=['zip', 'zip start', 'old', 'old start', 'empty', 'zeros', 'text',
         'html', 'random'])
def test_load_refuses_a_spoilt_file(data, tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        utils.load(str(path))
    assert str(error.value).startswith(f'{path} is truncated or no file of ')
    assert '\n' not in str(error.value)


def test_load_names_a_missing_file(tmp_path):
    for path in (tmp_path / 'x.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'{path} is not there'):
            utils.load(str(path))


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize('pack', [saved, old_format,
                                  lambda x: pickle.dumps(x, 2)],
                         ids=['zip', 'old', 'pickle'])
def test_load_runs_no_code(pack, tmp_path):
    path, marker = tmp_path / 'x.pth', tmp_path / 'marker'
    path.write_bytes(pack({'net': Hostile(marker)}))
    with pytest.raises(ValueError, match=(
            f'^{path} holds more than tensors and plain values')):
        utils.load(str(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))      # it would have
    assert marker.exists()


@pytest.mark.parametrize('value', [
    np.float64(1), np.ones(3), torch.__version__, torch.nn.Linear(2, 2)],
    ids=['scalar', 'array', 'version', 'module'])
def test_load_refuses_more_than_plain_values(value, tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'net': {}, 'value': value}, path)
    with pytest.raises(ValueError, match=f'^{path} holds more than tensors'):
        utils.load(str(path))


def test_save_json_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    utils.save_json({'mIoU': 0.5, 'IoU': [None, 1]}, str(path))
    old = path.read_text()
    assert old.split() == ['{', '"mIoU":', '0.5,', '"IoU":', '[', 'null,',
                           '1', ']', '}']
    with pytest.raises(TypeError):
        utils.save_json({'mIoU': 0.5, 'IoU': object()}, str(path))
    assert contents(path.parent) == {'x.json': old.encode()}


@pytest.mark.parametrize('n', [2, 6, 21, 256])
def test_save_label_round_trip(n, tmp_path):
    """Every value comes back, void too, however few the colours."""
    label = np.random.default_rng(0).integers(0, n, (7, 5), np.uint8)
    label[0, :2] = n - 1, 255
    colours = utils.voc_palette()[:n]
    utils.save_label(label, str(tmp_path / 'x.png'), colours)
    image = Image.open(tmp_path / 'x.png')
    assert (image.format, image.mode) == ('PNG', 'P')
    assert (np.array(image) == label).all()
    assert image.getpalette()[:3 * n] == colours.ravel().tolist()
    assert len(contents(tmp_path)) == 1


# ------------------------------------------------- downloads
ABC = {'md5': '900150983cd24fb0d6963f7d28e17f72',
       'sha1': 'a9993e364706816aba3e25717850c26c9cd0d89d',
       'sha256': 'ba7816bf8f01cfea414140de5dae2223'
                 'b00361a396177a9cb410ff61f20015ad'}     # of 'abc'


@pytest.mark.parametrize('kind', ABC)
def test_check_hash(kind, tmp_path):
    path, digits = tmp_path / 'x', ABC[kind]
    path.write_text('abc')
    utils.check_hash(path, f'{kind}:{digits}')
    utils.check_hash(path, f'{kind}:{digits[:8]}')
    for wrong in ('', digits + '0', digits[1:], '0' + digits[1:]):
        with pytest.raises(ValueError, match=(
                f'^{path} has the {kind} {digits}, not {wrong}:')):
            utils.check_hash(path, f'{kind}:{wrong}')


BODY = np.random.default_rng(0).bytes(600_000)
HASH = 'sha256:' + hashlib.sha256(BODY).hexdigest()[:8]


class Handler(BaseHTTPRequestHandler):
    """Serves BODY. Server attributes: ranges, those asked for; sent, bytes
    of each reply; ignore, whether Range is not known; limit, after how many
    bytes the next connection breaks; garbage, what to say instead."""

    def do_GET(self):
        server, wanted = self.server, self.headers['Range']
        server.ranges.append(wanted)
        if server.garbage is not None:
            return self.wfile.write(server.garbage)
        if self.path != '/x.pth':
            return self.send_error(404)
        start = int(wanted[6:-1]) if wanted and not server.ignore else 0
        body = BODY[start:]
        if not body:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        body, server.limit = body[:server.limit], None
        server.sent.append(len(body))
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.ranges, server.sent = [], []
    server.ignore, server.limit, server.garbage = False, None, None
    server.url = f'http://127.0.0.1:{server.server_port}/x.pth'
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download(server, tmp_path):
    path = tmp_path / 'new' / 'x.pth'
    utils.download(server.url, str(path), HASH)
    assert contents(path.parent) == {'x.pth': BODY}
    assert server.ranges == [None]


def test_download_goes_on_with_a_part(server, tmp_path):
    (tmp_path / 'x.pth.part').write_bytes(BODY[:1000])
    utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == ['bytes=1000-']
    assert server.sent == [len(BODY) - 1000]


def test_download_of_a_part_that_is_whole(server, tmp_path):
    (tmp_path / 'x.pth.part').write_bytes(BODY)
    utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.sent == []


def test_download_where_ranges_are_ignored(server, tmp_path):
    server.ignore = True
    (tmp_path / 'x.pth.part').write_bytes(BODY[:1000])
    utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == ['bytes=1000-'] and server.sent == [len(BODY)]


def test_download_with_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError) as error:
        utils.download(server.url, str(tmp_path / 'x.pth'), 'sha256:0123')
    text = str(error.value)
    assert text.startswith(server.url) and 'not 0123' in text
    assert contents(tmp_path) == {}


def test_download_gets_over_another_files_part(server, tmp_path):
    (tmp_path / 'x.pth.part').write_bytes(b'other')
    with pytest.raises(ValueError):
        utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}


def failed(url, path):
    """Download in vain; the message names the url and where to put it."""
    with pytest.raises(OSError) as error:
        utils.download(url, str(path), HASH)
    text = str(error.value)
    assert text.startswith(f'{url} cannot be fetched (')
    assert text.endswith(f'put it at {path}') and '\n' not in text
    assert not path.exists()
    return text


def test_download_goes_on_after_a_break(server, tmp_path):
    server.limit = 300_000
    text = failed(server.url, tmp_path / 'x.pth')
    assert 'broke off after 300000 of 600000 bytes' in text
    assert contents(tmp_path) == {'x.pth.part': BODY[:300_000]}
    utils.download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == [None, 'bytes=300000-']


def test_download_of_what_is_not_there(server, tmp_path):
    assert '404' in failed(server.url + '2', tmp_path / 'x.pth')
    assert contents(tmp_path) == {}


def test_download_with_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))          # bound, but nobody listens
        url = f'http://127.0.0.1:{free.getsockname()[1]}/x.pth'
        assert 'refused' in failed(url, tmp_path / 'x.pth')
    assert contents(tmp_path) == {}


@pytest.mark.parametrize('garbage', [
    b'', b'hello\r\n\r\n', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked'
    b'\r\n\r\n5\r\nhello\r\n'], ids=['silence', 'no HTTP', 'broken chunks'])
def test_download_from_a_server_gone_wrong(garbage, server, tmp_path):
    server.garbage = garbage
    failed(server.url, tmp_path / 'x.pth')


# ------------------------------------------------- scores
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_confusion_matrix_is_a_double_loop(dtype):
    """Of 21 classes: 20 * 21 + 20 is more than a uint8 holds."""
    random = np.random.default_rng(0)
    label, pred = random.integers(0, 21, (2, 3, 20, 30))
    label[random.random(label.shape) < 0.2] = 255
    slow = np.zeros((21, 21), int)
    for a, b in zip(label.ravel(), pred.ravel()):
        if a != 255:
            slow[a, b] += 1
    found = utils.confusion_matrix(torch.tensor(pred, dtype=dtype),
                                   torch.tensor(label, dtype=dtype), 21, 255)
    assert found.dtype == torch.int64
    assert (found.numpy() == slow).all()


def test_confusion_matrix_ignores_what_is_void_alone():
    label, pred = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 1])
    found = utils.confusion_matrix(pred, label, 3, 0)
    assert found.tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0]]


def check_scores(found, **expected):
    assert found.keys() == {'mIoU', 'mAcc', 'pAcc', 'fIoU', 'IoU'}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_scores_leave_an_absent_class_out():
    found = utils.scores([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    check_scores(found, mIoU=(6 / 9 + 3 / 6) / 2, mAcc=(6 / 8 + 3 / 4) / 2,
                 pAcc=9 / 12, fIoU=8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)
    assert found['IoU'] == [pytest.approx(6 / 9), 0.5, None]


def test_scores_count_a_class_that_is_only_predicted():
    found = utils.scores(torch.tensor([[6, 1, 1], [1, 3, 0], [0, 0, 0]]))
    check_scores(found, mIoU=(6 / 9 + 3 / 5 + 0) / 3, mAcc=(6 / 8 + 3 / 4) / 2,
                 pAcc=9 / 12, fIoU=8 / 12 * 6 / 9 + 4 / 12 * 3 / 5,
                 IoU=[6 / 9, 3 / 5, 0])


def test_scores_of_some_classes():
    """The others stay in the unions, and out of the means."""
    found = utils.scores([[6, 1, 1], [1, 3, 0], [2, 0, 4]], (0, 2))
    check_scores(found, mIoU=(6 / 11 + 4 / 7) / 2, mAcc=(6 / 8 + 4 / 6) / 2,
                 pAcc=10 / 14, fIoU=8 / 14 * 6 / 11 + 6 / 14 * 4 / 7,
                 IoU=[6 / 11, 3 / 5, 4 / 7])


def test_scores_of_nothing_and_of_everything(tmp_path):
    check_scores(utils.scores(np.zeros((3, 3))), mIoU=0, mAcc=0, pAcc=0,
                 fIoU=0, IoU=[None] * 3)
    found = utils.scores(np.diag([5, 1, 2]))
    check_scores(found, mIoU=1, mAcc=1, pAcc=1, fIoU=1, IoU=[1, 1, 1])
    utils.save_json(found, str(tmp_path / 'x.json'))     # plain values


# ------------------------------------------------- classes, colours, rate
def test_voc_palette():
    palette = utils.voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0),
             4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128),
             20: (0, 64, 128), 255: (224, 224, 192)}
    for number, colour in known.items():
        assert tuple(palette[number]) == colour
    assert len({tuple(colour) for colour in palette.tolist()}) == 256


def test_full_palette():
    palette = utils.full_palette([[1, 2, 3], [4, 5, 6]])
    assert palette[:3].tolist() == [[1, 2, 3], [4, 5, 6], [0, 128, 0]]
    assert palette.shape == (256, 3)
    assert palette[255].tolist() == [224, 224, 192]


def test_read_classes(tmp_path):
    (tmp_path / 'classes.txt').write_text(
        'background 0 0 0\ntraffic light 250 170 30\n\nlevel 2 1 2 255\n')
    assert utils.read_classes(str(tmp_path), 3) == (
        ['background', 'traffic light', 'level 2'],
        [[0, 0, 0], [250, 170, 30], [1, 2, 255]])


def test_read_classes_without_a_file(tmp_path):
    assert utils.read_classes(str(tmp_path), 3) == (
        ['0', '1', '2'], [[0, 0, 0], [128, 0, 0], [0, 128, 0]])


def test_read_classes_refuses_another_number(tmp_path):
    (tmp_path / 'classes.txt').write_text('a 0 0 0\nb 1 1 1\n')
    with pytest.raises(ValueError, match=(
            'N_CLASSES=21, but .*classes.txt names 2 .* set N_CLASSES=2')):
        utils.read_classes(str(tmp_path), 21)


@pytest.mark.parametrize('line', ['b', 'b 1 2', '1 2 3', 'b 1 2 256',
                                  'b 1 2 -3', 'b 1 2 x', 'b 0.1 2 3'])
def test_read_classes_names_a_bad_line(line, tmp_path):
    (tmp_path / 'classes.txt').write_text(f'a 0 0 0\n{line}\n')
    with pytest.raises(ValueError, match=f"classes.txt: the line '{line}'"):
        utils.read_classes(str(tmp_path), 2)


def test_poly_lr_by_hand():
    rates = [utils.poly_lr(step, 2.0, 100, 2, 10) for step in range(1, 101)]
    assert rates[:9] == [2] * 9
    assert rates[9:19] == pytest.approx([2 * 0.9 ** 2] * 10)
    assert rates[19] == pytest.approx(2 * 0.8 ** 2)
    assert rates[98] == pytest.approx(2 * 0.1 ** 2) and rates[99] == 0


def test_poly_lr_set_anew_each_step():
    rates = [utils.poly_lr(step, 1.0, 4, 1, 1) for step in range(1, 5)]
    assert rates == [0.75, 0.5, 0.25, 0]


def test_poly_lr_of_the_paper():
    assert utils.poly_lr(15000, 9e-3, 30000, 0.9, 10) == pytest.approx(
        9e-3 * 0.5 ** 0.9)
    assert utils.poly_lr(29999, 9e-3, 30000, 0.9, 10) == pytest.approx(
        9e-3 * (10 / 30000) ** 0.9)
