"""Fetches files: a broken download is resumed, a wrong hash is refused."""
import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request

from utils import RunError, UserError, first_line, progress


def file_hash(path, kind='sha256'):
    """Return a file's hash in hexadecimal digits."""
    digest = hashlib.new(kind)
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path, expected):
    """Raise UserError unless the file has the hash.

    expected: 'md5:HEX', 'sha1:HEX' or 'sha256:HEX'; HEX may be the first
    digits alone, as in the names of published weights.
    """
    kind, _, digits = expected.partition(':')
    found = file_hash(path, kind)
    if not digits or not found.startswith(digits):
        raise UserError(f'{path} has the {kind} {found}, not {digits}: it is '
                        f'damaged or another file')


def download(url, path, expected):
    """Fetch url to path, with a bar, and check its hash, unless that is ''.

    A download that broke off is resumed (path + '.part'); a file with a wrong
    hash is removed. Of several processes one fetches, the others wait.
    Raises RunError where nothing can be fetched (it says which file to put
    where), UserError for a wrong hash.
    """
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):      # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path):
            _download(url, path, expected)
    finally:
        os.close(lock)


def read_pointer(url, path):
    """Return 'sha256:HEX' of the file that a pointer of Git LFS at url is for,
    '' where that is no pointer. path: where the file will be, for the
    RunError of a link that is dead."""
    try:
        with urllib.request.urlopen(urllib.request.Request(
                url, headers={'User-Agent': 'emanet'}), timeout=60) as reply:
            text = reply.read(1024).decode(errors='replace')
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f'{url} cannot be fetched ({first_line(error)}). Run '
                       f'again, or get the file by hand and put it at {path}'
                       ) from None
    found = re.search(r'^oid (sha256:[0-9a-f]{64})$', text, re.M)
    return found[1] if found else ''


def _download(url, path, expected):
    """Fetch url to path; nobody else does."""
    part = path + '.part'
    try:
        _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f'{url} cannot be fetched ({first_line(error)}). Run '
                       f'again to resume, or get the file by hand and put it '
                       f'at {path}') from None
    try:
        if expected:
            check_hash(part, expected)
    except UserError as error:
        os.remove(part)
        raise UserError(f'{url}: {error}; it was removed') from None
    os.replace(part, path)


def _fetch(url, part):
    """Append to the file `part` what it lacks of url."""
    done = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'emanet'})
    if done:
        request.add_header('Range', f'bytes={done}-')
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:           # nothing is left to fetch
            return
        raise
    with reply:
        done = done if reply.status == 206 else 0
        length = int(reply.headers.get('Content-Length') or 0)
        total = done + length if length else None
        with open(part, 'ab' if done else 'wb') as file, progress(
                desc=os.path.basename(url), total=total, initial=done,
                unit='B', unit_scale=True) as bar:
            for block in iter(lambda: reply.read(1 << 18), b''):
                file.write(block)
                bar.update(len(block))
            done = file.tell()
    if total and done != total:
        raise OSError(f'broke off after {done} of {total} bytes')
