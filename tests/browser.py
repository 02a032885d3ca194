"""Looks at TensorBoard with a real browser, Chromium without a window.

    python tests/browser.py DIR [--to SHOTS]

DIR is a folder of trained experiments, as for `sh tensorboard.sh DIR`, which
is what is looked at: the page has to show every experiment under its folder's
name, the last loss that its log.csv has, and its first picture of val, in its
colours. SHOTS is where screenshots of all that there is to see are kept. Exit
status: 0 all is there, 1 something is not, 2 no Chromium.
"""
import argparse
import base64
import contextlib
import csv
import fcntl
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import numpy as np
from PIL import Image

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
import eval         # noqa: E402
import utils        # noqa: E402

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
PAGES = {'curves': '#scalars', 'pictures': '#images', 'settings': '#text',
         'table': '#hparams'}


def find_browser():
    """Return the path of a Chromium that runs, or None."""
    for path in filter(None, map(shutil.which, NAMES)):
        done = subprocess.run([path, '--version'], capture_output=True,
                              check=False)
        if done.returncode == 0:
            return path
    return None


class Page:
    """A page of Chromium without a window, spoken to in the DevTools protocol
    through two pipes: what it reads as file 3 and writes as file 4."""

    def __init__(self, width, height):
        self.profile = tempfile.TemporaryDirectory()
        theirs, self.to = os.pipe()
        self.back, theirs_too = os.pipe()
        high = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
                for file in (theirs, theirs_too)]
        self.process = subprocess.Popen(
            [find_browser(), '--headless', '--no-sandbox', '--disable-gpu',
             '--disable-dev-shm-usage', '--remote-debugging-pipe',
             '--hide-scrollbars', f'--window-size={width},{height}',
             f'--user-data-dir={self.profile.name}', 'about:blank'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, start_new_session=True,
            preexec_fn=lambda: [os.dup2(file, place)
                                for place, file in enumerate(high, 3)])
        for file in (theirs, theirs_too, *high):
            os.close(file)
        self.count, self.rest, self.session = 0, b'', {}
        target = next(target for target in self.ask('Target.getTargets')[
            'targetInfos'] if target['type'] == 'page')
        self.session = {'sessionId': self.ask('Target.attachToTarget', {
            'targetId': target['targetId'], 'flatten': True})['sessionId']}

    def ask(self, method, values=None):
        """Return the answer to a command of the protocol."""
        self.count += 1
        os.write(self.to, json.dumps({
            'id': self.count, 'method': method, 'params': values or {},
            **self.session}).encode() + b'\0')
        while True:
            answer, end, rest = self.rest.partition(b'\0')
            if not end:
                ready, _, _ = select.select([self.back], [], [], 60)
                more = os.read(self.back, 1 << 20) if ready else b''
                if not more:
                    raise RuntimeError(f'Chromium gave no answer to {method}')
                self.rest += more
                continue
            self.rest, answer = rest, json.loads(answer)
            if answer.get('id') == self.count:      # no event, no old answer
                if 'error' in answer:
                    raise RuntimeError(f'{method}: {answer["error"]}')
                return answer['result']

    def go(self, url):
        self.ask('Page.navigate', {'url': url})

    def value(self, script):
        """Return the value of an expression of JavaScript in the page."""
        return self.ask('Runtime.evaluate', {
            'expression': script, 'returnByValue': True})['result'].get(
                'value')

    def shot(self, path):
        """Write what the page shows as a PNG."""
        with open(path, 'wb') as file:
            file.write(base64.b64decode(
                self.ask('Page.captureScreenshot')['data']))

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.profile.cleanup()


@contextlib.contextmanager
def tensorboard(folder, losses):
    """Run tensorboard.sh on a folder; give its address once it has read the
    last loss of these runs {name: loss}."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH']
    process = subprocess.Popen(
        ['sh', os.path.join(REPO, 'tensorboard.sh'), folder, '--port',
         str(port)], env={**os.environ, 'PATH': path},
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address, read = f'http://localhost:{port}/', {}
        for _ in range(240):
            read = {name: served(address, name) for name in losses}
            if all(near(read[name], loss) for name, loss in losses.items()):
                break
            time.sleep(0.5)
        else:
            raise RuntimeError(f'TensorBoard has the losses {read}, log.csv '
                               f'has {losses}')
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def fetch(url):
    with urllib.request.urlopen(url) as reply:
        return reply.read()


def served(address, name):
    """Return the last loss of a run that TensorBoard has read, or None."""
    query = urllib.parse.urlencode({'run': name, 'tag': 'Curves/loss'})
    try:
        return json.loads(fetch(
            f'{address}data/plugin/scalars/scalars?{query}'))[-1][2]
    except (OSError, IndexError):
        return None


def near(a, b):
    """Say whether a is b, as a page writes it; None is near to nothing."""
    return a is not None and abs(a - b) < 1e-3 * abs(b)


def last_loss(log):
    with open(os.path.join(log, 'log.csv'), newline='') as file:
        return float(list(csv.DictReader(file))[-1]['loss'])


def faults(page, losses, first):
    """Return what the page does not show of all runs {name: loss}: names,
    last losses, the picture `first`."""
    text = page.value('document.body.innerText') or ''
    numbers = [float(x) for x in re.findall(r'\b\d+\.\d+\b', text)]
    found = [f'no {name}' for name in losses if name not in text.split()]
    found += [f'no loss of {name}, {loss:.4f}' for name, loss
              in losses.items() if not any(near(x, loss) for x in numbers)]
    loaded = page.value('[...document.images].filter(x => x.naturalWidth > '
                        '300).length')
    if loaded != len(losses):
        found.append(f'{loaded} pictures {first}')
    return found


def look(page, address, losses, shot):
    """Raise RuntimeError unless the page of the loss and of a picture shows
    those of all runs {name: loss}; write what it looks like."""
    tags = json.loads(fetch(f'{address}data/plugin/images/tags'))
    first = min(tag for tags in tags.values() for tag in tags
                if tag.startswith('Val/'))
    query = urllib.parse.urlencode({'tagFilter': f'Curves/loss|{first}$'})
    page.go(f'{address}?{query}#timeseries')
    until = time.monotonic() + 60
    while faults(page, losses, first) and time.monotonic() < until:
        time.sleep(0.5)
    page.shot(shot)
    found = faults(page, losses, first)
    if found:
        raise RuntimeError(f'the page shows {"; ".join(found)}; there are '
                           f'{len(losses)} experiments')
    with Image.open(shot) as image:
        seen = np.array(image.convert('RGB'))
    for source in page.value('[...document.images].map(x => x.src)'):
        with Image.open(io.BytesIO(fetch(source))) as image:
            if not all((seen == colour).all(2).sum() > 50
                       for colour in colours(np.array(image))):
                raise RuntimeError(f'{first} is not in {shot} in its colours')


def colours(picture, most=3):
    """Return the commonest colours of a picture that are no grey."""
    found, counts = np.unique(picture.reshape(-1, 3), axis=0,
                              return_counts=True)
    order = np.argsort(-counts * (np.ptp(found, 1) > 60))
    return found[order[:most]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dir', metavar='DIR')
    parser.add_argument('--to', metavar='SHOTS')
    asked = parser.parse_args()
    if not find_browser():
        raise FileNotFoundError(f'there is no {", ".join(NAMES)}; on Debian: '
                                f'apt-get install chromium')
    losses = {name: last_loss(log) for name, (_, log)
              in eval.find_runs(asked.dir).items() if log}
    if not losses:
        raise FileNotFoundError(f'{asked.dir} holds no experiment with a log')
    with tempfile.TemporaryDirectory() as folder, tensorboard(
            os.path.abspath(asked.dir), losses) as address:
        folder = asked.to or folder
        os.makedirs(folder, exist_ok=True)
        page = Page(1600, 1000 + 200 * len(losses))
        try:
            look(page, address, losses, f'{folder}/browser.png')
            for name, place in PAGES.items() if asked.to else ():
                page.go(address + place)
                time.sleep(10)          # for people: nothing waits for it
                page.shot(f'{folder}/{name}.png')
        finally:
            page.close()
    print(f'TensorBoard shows {", ".join(losses)}'
          + (f'; screenshots are in {asked.to}' if asked.to else ''))


if __name__ == '__main__':
    utils.launch(main)
