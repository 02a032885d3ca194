"""Shows what a run records in Weights & Biases too (setting WANDB).

lib.logger passes each summary of TensorBoard on, so that both show the same
values under the same tags. W&B's own sync of TensorBoard is not used: it finds
event files through writers that it patches, and lib.logger writes its file
itself; it reads the events of all folders below LOG_DIR, other runs' too; and
it repeats the steps that a resumed run does again.
"""
import contextlib
import io
import os
import secrets
import shlex

from PIL import Image

import utils
from lib.experiments import read_settings
from utils import UserError, first_line, log

TIMEOUT = 30                 # seconds to wait for W&B at the start, at the end
IDS = 'wandb_ids.txt'        # in LOG_DIR: the IDs of the runs it had


def check():
    """Raise UserError where W&B cannot be used: it is not installed, too old,
    or needs a login."""
    if utils.rank():
        return
    wandb = utils.import_optional('wandb')
    if tuple(map(int, wandb.__version__.split('.')[:2])) < (0, 30):
        raise UserError(f'WANDB needs wandb 0.30 or later, this is '
                        f'{wandb.__version__}: python -m pip install -U wandb')
    try:
        is_online = wandb.setup().settings.mode in ('online', 'shared', 'run')
        if is_online and not wandb.login(prompt=False, verify=False):
            raise UserError('WANDB: nobody is logged in to Weights & Biases; '
                            'run `wandb login`, or set the environment '
                            'variable WANDB_MODE=offline')
    except (ValueError, wandb.Error) as error:  # in its settings, of its key
        raise UserError(f'WANDB: {" ".join(str(error).split())}') from None


def read_ids(folder):
    """Return the IDs of the runs in W&B that LOG_DIR=folder had, in order."""
    path = os.path.join(folder, IDS)
    return utils.read_text(path).split() if os.path.exists(path) else []


def run_name(folder):
    """Return the name of a run in LOG_DIR=folder, as tensorboard.sh shows it:
    the experiment's; behind it, of another LOG_DIR than its own, that one."""
    own = os.path.join(utils.ROOT, read_settings(utils.ROOT)['LOG_DIR'])
    own, folder, root = map(os.path.realpath, (own, folder, utils.ROOT))
    name = os.path.basename(root)
    return name if folder == own else f'{name}/{os.path.basename(folder)}'


class WandbLog:
    """A run in W&B. Whatever fails there ends this log, with a warning, and
    never the run.

    Args:
        folder: LOG_DIR, in which W&B's files lie too.
        values: the settings {name: value}, WANDB among them.
        is_resumed: go on with the run that LOG_DIR had last.
    """

    def __init__(self, folder, values, is_resumed):
        self.rows, self.run = {}, None      # rows: {step: {tag: value}}
        self.remedy = ''
        with self._catching():
            self.run = self._start(folder, values, is_resumed)

    @contextlib.contextmanager
    def _catching(self):
        """Turn an error of W&B into a warning, and send nothing more."""
        try:
            yield
        except Exception as error:      # as many kinds as W&B has parts
            self.run = None
            log(f'warning: Weights & Biases: {first_line(error)}; nothing '
                f'more is sent there. The run is not affected{self.remedy}')

    def _start(self, folder, values, is_resumed):
        """Return a new or resumed run of W&B, offline where it fails."""
        wandb = utils.import_optional('wandb')
        entity, _, project = values['WANDB'].rpartition('/')
        ids = read_ids(folder)
        if not (ids and is_resumed):
            ids.append(secrets.token_hex(4))
            path = os.path.join(folder, IDS)
            with utils.atomic_write(path) as part, open(part, 'w') as file:
                file.write('\n'.join([*ids, '']))
        options = {
            'project': project, 'entity': entity or None, 'dir': folder,
            'name': run_name(folder), 'id': ids[-1], 'resume': 'allow',
            'config': values, 'settings': wandb.Settings(
                silent=True, console='off', init_timeout=TIMEOUT,
                finish_timeout=TIMEOUT, finish_timeout_raises=True)}
        try:
            run = wandb.init(**options)
        except Exception as error:      # no network, no access
            log(f'warning: Weights & Biases: {first_line(error)}')
            wandb.teardown()            # or the ID is in use
            run = wandb.init(**options, mode='offline')
        if not run.disabled:
            self.remedy = ('; to send what is missing: wandb sync '
                           + shlex.quote(os.path.dirname(run.dir)))
            log('Weights & Biases: '
                + (f'offline{self.remedy}' if run.offline else run.url))
        return run

    def add(self, summary, step):
        """Add the scalars and images of a summary to the row of its step."""
        with self._catching():
            for value in summary.value if self.run and step else ():
                row = self.rows.setdefault(step, {})
                kind = value.WhichOneof('value')
                if kind == 'simple_value':
                    row[value.tag] = value.simple_value
                elif kind == 'image':
                    row[value.tag] = _to_image(value.image)

    def send(self, step):
        """Send the row of a step. A step that W&B has already is left out."""
        row = self.rows.pop(step, None)
        with self._catching():
            if self.run and row:
                self.run.log(row, step=step)

    def close(self):
        """End the run in W&B, and W&B's process."""
        with self._catching():
            if self.run:
                self.run.finish()
        with contextlib.suppress(Exception):    # it may be dead
            utils.import_optional('wandb').teardown()


def _to_image(image):
    """Return W&B's image of TensorBoard's."""
    wandb = utils.import_optional('wandb')
    return wandb.Image(Image.open(io.BytesIO(image.encoded_image_string)))
