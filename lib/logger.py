"""What a run records: TensorBoard's events, log.csv, settings.json; and, where
WANDB is set, the same in Weights & Biases."""
import contextlib
import csv
import os
import re
import socket
import struct
import time

import utils
from lib.wandb_log import WandbLog

# of scalars in TensorBoard, behind their (i); of others, by their group
DESCRIPTIONS = {
    'loss': 'Loss of the step, averaged over its micro-batches and processes.',
    'lr': 'Learning rate of the step; biases have twice this.',
    'grad_norm': 'L2 norm of the gradient of all parameters, before the '
                 'optimizer step.',
    'images_per_s': 'Training images per second, over all processes.',
    'val_mIoU': 'Mean IoU on VAL_SPLIT, in per cent (log.csv: 0..1).',
    'val_mIoU_average': 'Mean IoU on VAL_SPLIT of the averaged weights '
                        '(AVERAGE), in per cent (log.csv: 0..1).',
    'val_loss': 'Mean cross-entropy of the labelled pixels of VAL_SPLIT.',
    'val_loss_average': 'The same of the averaged weights (AVERAGE).',
    'IoU': 'IoU of the class on VAL_SPLIT, in per cent.',
    'IoU_average': 'IoU of the class on VAL_SPLIT, of the averaged weights '
                   '(AVERAGE), in per cent.',
    'precision': 'Share of the pixels predicted as the class on VAL_SPLIT '
                 'that are it, in per cent.',
    'recall': 'Share of the pixels of the class on VAL_SPLIT that are '
              'predicted as it, in per cent.',
    'F1': 'F1 score (Dice coefficient) of the class on VAL_SPLIT, in per '
          'cent.',
    'EM/bases_moved': 'How far the step moved the bases: norm of the update '
                      'divided by the norm of the basis, averaged over the '
                      'bases. Near 0: they have converged.',
    'EM/usage_entropy': "Entropy of an image's mean responsibilities, divided "
                        'by log k, averaged over the batch. 1: the k bases '
                        'are used alike; 0: one basis takes all positions.',
    'EM/position_entropy': "Entropy of a position's responsibilities, divided "
                           'by log k, averaged over positions and batch. 1: '
                           'all bases alike; 0: one basis alone.'}

for _name in ('precision', 'recall', 'F1'):
    DESCRIPTIONS[f'{_name}_average'] = (
        f'{DESCRIPTIONS[_name]} Of the averaged weights (AVERAGE).')


class Logger:
    """What a run records: metrics as TensorBoard's scalars and, those of
    COLUMNS, as lines of log.csv; images; settings.

    A metric with a name of utils.PER_CLASS in its own is given and written to
    log.csv as 0..1; TensorBoard shows it in per cent.

    Args:
        folder: LOG_DIR.
        start_step: the step of the checkpoint that is resumed. Lines and
            events past it are of a run that was cut off: they are removed.

    One process, rank 0, writes for all; in the others nothing happens. A disk
    that is full at the start raises RunError. Later, `error` has it, which
    close() raises, so that the run can be saved before; nothing more is
    written then.
    """

    COLUMNS = ('step', 'loss', 'lr', 'grad_norm', 'val_mIoU',
               'val_mIoU_average', 'val_loss', 'val_loss_average',
               'images_per_s')

    def __init__(self, folder, start_step=0):
        self.is_silent, self.error = utils.rank() > 0, None
        if self.is_silent:
            return
        self.folder, self.start_step = folder, start_step
        self.wandb = None
        self.described = set()      # scalars that have an event
        path = os.path.join(folder, 'log.csv')
        events = (f'events.out.tfevents.{time.time():.0f}.'
                  f'{socket.gethostname()}')
        with self._catching():
            os.makedirs(folder, exist_ok=True)
            rows = [self.COLUMNS, *self._read_rows(path, start_step)]
            with (utils.atomic_write(path) as part,
                  open(part, 'w', newline='') as file):
                csv.writer(file).writerows(rows)
            # no buffers: their rest is written at the end, and fails there
            self.csv = open(path, 'ab', buffering=0)
            self.events = open(os.path.join(folder, events), 'ab', buffering=0)
        self.check()
        from tensorboardX.proto.event_pb2 import SessionLog

        self._add_event(file_version='brain.Event:2')
        self._add_event(step=start_step + 1,        # hides what is past it
                        session_log=SessionLog(status=SessionLog.START))
        self.check()

    def _read_rows(self, path, last):
        """Return the whole rows of a log.csv, of any columns, up to a step.
        """
        if not last or not os.path.exists(path):
            return []
        with open(path, newline='', errors='replace') as file:
            return [[row.get(name) for name in self.COLUMNS]
                    for row in csv.DictReader(
                        line for line in file if line.endswith('\n'))
                    if (row.get('step') or '').isdigit()
                    and int(row['step']) <= last]

    # -------------------------------------------- what can fail
    @contextlib.contextmanager
    def _catching(self):
        """Keep the first OSError, as the RunError that check() raises."""
        try:
            yield
        except OSError as error:
            self.error = self.error or utils.RunError(
                f'LOG_DIR={self.folder} cannot be written: is the disk full? '
                f'({error.strerror}) Make room or set LOG_DIR elsewhere, and '
                f'start the run again')

    def check(self):
        """Raise RunError where something could not be written."""
        if self.error:
            raise self.error

    def _append(self, file, data):
        """Append bytes to a file without a buffer."""
        with self._catching():
            while data and not self.error:
                data = data[file.write(data):]

    def _add_event(self, **parts):
        """Append an event to TensorBoard's file, in the format of TFRecord.

        tensorboardX's writer would leave that to a thread; when a full disk
        ends it, whoever adds an event waits for it forever.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), **parts).SerializeToString()
        size = struct.pack('<Q', len(event))
        self._append(self.events, b''.join((
            size, struct.pack('<I', masked_crc32c(size)),
            event, struct.pack('<I', masked_crc32c(event)))))

    def add_summary(self, summary, step=None):
        """Show in TensorBoard what a function of tensorboardX.summary, such
        as histogram, has returned."""
        if self.is_silent:
            return
        self._add_event(summary=summary, step=step)
        if self.wandb:
            self.wandb.add(summary, step)

    # -------------------------------------------- what is recorded
    def log_metrics(self, step, **metrics):
        """Record one step's metrics; what COLUMNS does not name goes to
        TensorBoard alone. Floats are written in full precision."""
        if self.is_silent:
            return
        cells = [step] + [f'{metrics[name]:.9g}' if name in metrics else ''
                          for name in self.COLUMNS[1:]]
        self._append(self.csv, (','.join(map(str, cells)) + '\r\n').encode())
        for name, value in metrics.items():
            self._add_scalar(name, value, step)
        if self.wandb:
            self.wandb.send(step)

    def _add_scalar(self, name, value, step):
        """Show a metric in TensorBoard, an IoU in per cent."""
        from tensorboardX.summary import scalar

        is_iou = any(key in name for key in utils.PER_CLASS)
        group = ('' if name not in self.COLUMNS else 'Accuracy/'
                 if is_iou else 'Curves/')  # HParams sorts metrics by tag
        tag = _tag(group + name)
        value = 100 * value if is_iou else value
        if name not in self.described:
            self.described.add(name)
            self.add_summary(_describe(
                tag, tag + ', %' * is_iou, DESCRIPTIONS.get(
                    name, DESCRIPTIONS.get(name.partition('/')[0], '')),
                value), step)
        self.add_summary(scalar(tag, value), step)

    def add_images(self, step, images):
        """Show (name, (H, W, 3) uint8) pairs in TensorBoard. They are drawn
        here: not at all in processes that write nothing."""
        if self.is_silent:
            return
        from tensorboardX.summary import image

        for name, page in images:
            self.add_summary(image(_tag(name), page, dataformats='HWC'), step)

    def log_settings(self, values):
        """Write the run's settings {name: value}: settings.json beside
        log.csv, a text in TensorBoard, and its hyper-parameters. Start the
        run in Weights & Biases, where WANDB is set."""
        if self.is_silent:
            return
        from tensorboardX.summary import hparams, text

        with self._catching():
            utils.save_json(values, os.path.join(self.folder, 'settings.json'))
        self.add_summary(text('settings', '\n'.join(
            f'    {name} = {value!r}' for name, value in values.items())))
        # the other summaries would list the columns of this run's table;
        # without, TensorBoard makes those of all runs, what differs first
        _, begin, _ = hparams({
            name: str(value) if isinstance(value, (list, tuple)) else value
            for name, value in values.items()}, {})
        self.add_summary(begin)
        self.check()
        if values.get('WANDB'):
            self.wandb = WandbLog(self.folder, values, self.start_step > 0)

    def close(self):
        """End the log; raise RunError where a part could not be written."""
        if self.is_silent:
            return
        with self._catching():      # a network's file system, at the latest
            self.csv.close()
            self.events.close()
        if self.wandb:
            self.wandb.close()
        self.check()


def _tag(name):
    """Return a name in the characters that TensorBoard takes."""
    return re.sub(r'[^-/\w.]', '_', name)


def _describe(tag, title, text, value):
    """Return the event of a scalar, with title and description, that stands
    before its first: TensorBoard keeps those of an event with a tensor alone.
    """
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboardX.proto.tensor_pb2 import TensorProto
    from tensorboardX.proto.types_pb2 import DT_FLOAT

    return Summary(value=[Summary.Value(
        tag=tag, tensor=TensorProto(dtype=DT_FLOAT, float_val=[value]),
        metadata=SummaryMetadata(
            display_name=title, summary_description=text,
            plugin_data=SummaryMetadata.PluginData(plugin_name='scalars')))])
