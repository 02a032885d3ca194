"""Are downloads resumed, checked against a hash, and failures explained?

    python -m pytest tests/test_download.py

They come from a server in this process, on localhost.
"""
import hashlib
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from conftest import REPO
from files import contents, expect_error
from lib.download import check_hash, download
from utils import RunError, UserError

ABC = {'md5': '900150983cd24fb0d6963f7d28e17f72',
       'sha1': 'a9993e364706816aba3e25717850c26c9cd0d89d',
       'sha256': 'ba7816bf8f01cfea414140de5dae2223'
                 'b00361a396177a9cb410ff61f20015ad'}     # of 'abc'
BODY = np.random.default_rng(0).bytes(600_000)
HASH = 'sha256:' + hashlib.sha256(BODY).hexdigest()[:8]


@pytest.mark.parametrize('kind', ABC)
def test_check_hash(kind, tmp_path):
    path, digits = tmp_path / 'x', ABC[kind]
    path.write_text('abc')
    check_hash(path, f'{kind}:{digits}')
    check_hash(path, f'{kind}:{digits[:8]}')
    for wrong in ('', digits + '0', digits[1:], '0' + digits[1:]):
        with pytest.raises(UserError, match=(
                f'^{path} has the {kind} {digits}, not {wrong}:')):
            check_hash(path, f'{kind}:{wrong}')


class Handler(BaseHTTPRequestHandler):
    """Serves BODY. Server attributes: ranges, those requested; sent, bytes
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
    download(server.url, str(path), HASH)
    assert contents(path.parent) == {'x.pth': BODY}
    assert server.ranges == [None]


@pytest.mark.parametrize('expected', [HASH, ''], ids=['checked', 'unchecked'])
@pytest.mark.parametrize('part, ignore, sent', [
    (1000, False, [len(BODY) - 1000]),               # the rest alone
    (len(BODY), False, []),                          # nothing is left
    (1000, True, [len(BODY)])],                      # all of it, anew
    ids=['part', 'whole', 'ranges ignored'])
def test_download_resumes_a_part(part, ignore, sent, expected, server,
                                 tmp_path):
    server.ignore = ignore
    (tmp_path / 'x.pth.part').write_bytes(BODY[:part])
    download(server.url, str(tmp_path / 'x.pth'), expected)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == [f'bytes={part}-'] and server.sent == sent


@pytest.mark.long
def test_processes_that_want_one_file_fetch_it_once(server, tmp_path):
    """Together they would write one .part, which no hash fits."""
    child = (f'import sys; sys.path.insert(0, {REPO!r})\n'
             f'from lib.download import download\n'
             f'download({server.url!r}, "x.pth", {HASH!r})')
    running = [subprocess.Popen([sys.executable, '-c', child], cwd=tmp_path)
               for _ in range(3)]
    assert [each.wait(100) for each in running] == [0, 0, 0]
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == [None]


def test_download_with_a_wrong_hash_leaves_nothing(server, tmp_path):
    expect_error(lambda: download(server.url, str(tmp_path / 'x.pth'),
                                  'sha256:0123'), server.url, 'not 0123')
    assert contents(tmp_path) == {}


def test_download_gets_over_another_files_part(server, tmp_path):
    (tmp_path / 'x.pth.part').write_bytes(b'other')
    with pytest.raises(UserError):
        download(server.url, str(tmp_path / 'x.pth'), HASH)
    download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}


def fail(url, path):
    """Download in vain; the message names the url and where to put it."""
    text = str(expect_error(lambda: download(url, str(path), HASH),
                            f'{url} cannot be fetched (', kind=RunError))
    assert text.endswith(f'put it at {path}') and not path.exists()
    return text


def test_download_resumes_after_a_break(server, tmp_path):
    server.limit = 300_000
    text = fail(server.url, tmp_path / 'x.pth')
    assert 'broke off after 300000 of 600000 bytes' in text
    assert contents(tmp_path) == {'x.pth.part': BODY[:300_000]}
    download(server.url, str(tmp_path / 'x.pth'), HASH)
    assert contents(tmp_path) == {'x.pth': BODY}
    assert server.ranges == [None, 'bytes=300000-']


def test_download_of_what_is_not_there(server, tmp_path):
    assert '404' in fail(server.url + '2', tmp_path / 'x.pth')
    assert contents(tmp_path) == {}


def test_download_with_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))          # bound, but nobody listens
        url = f'http://127.0.0.1:{free.getsockname()[1]}/x.pth'
        assert 'refused' in fail(url, tmp_path / 'x.pth')
    assert contents(tmp_path) == {}


@pytest.mark.parametrize('garbage', [
    b'', b'hello\r\n\r\n', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked'
    b'\r\n\r\n5\r\nhello\r\n'], ids=['silence', 'no HTTP', 'broken chunks'])
def test_download_from_a_server_gone_wrong(garbage, server, tmp_path):
    server.garbage = garbage
    fail(server.url, tmp_path / 'x.pth')
