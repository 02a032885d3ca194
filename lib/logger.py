"""What a run records: TensorBoard's events, log.csv, settings.json."""
import csv
import os
import re

import utils


class Logger:
    """What a run records: metrics as TensorBoard's scalars and, those of
    COLUMNS, as lines of log.csv; images; settings.

    Args:
        folder: LOG_DIR.
        start_step: the step of the checkpoint that is resumed. Lines and
            events past it are of a run that was cut off: they are removed.

    One process, rank 0, writes for all; in the others nothing happens.
    """

    COLUMNS = ('step', 'loss', 'lr', 'grad_norm', 'val_mIoU',
               'val_mIoU_average', 'images_per_s')

    def __init__(self, folder, start_step=0):
        self.is_silent = utils.rank() > 0
        if self.is_silent:
            return
        from tensorboardX import SummaryWriter  # takes 0.3 s to import

        os.makedirs(folder, exist_ok=True)
        self.folder = folder
        path = os.path.join(folder, 'log.csv')
        kept = []
        if start_step and os.path.exists(path):
            with open(path, newline='') as file:    # of any columns
                kept = [[row.get(name) for name in self.COLUMNS]
                        for row in csv.DictReader(file)
                        if row['step'].isdigit()
                        and int(row['step']) <= start_step]
        with (utils.atomic_write(path) as part,
              open(part, 'w', newline='') as file):
            csv.writer(file).writerows([self.COLUMNS, *kept])
        self.csv = open(path, 'a', newline='')
        self.board = SummaryWriter(folder, purge_step=start_step + 1)

    def log_metrics(self, step, **metrics):
        """Record one step's metrics; what COLUMNS does not name goes to
        TensorBoard alone. Floats are written in full precision."""
        if self.is_silent:
            return
        cells = [step] + [f'{metrics[name]:.9g}' if name in metrics else ''
                          for name in self.COLUMNS[1:]]
        csv.writer(self.csv).writerow(cells)
        self.csv.flush()
        for name, value in metrics.items():
            group = 'Curves/' if name in self.COLUMNS else ''
            self.board.add_scalar(_tag(group + name), value, step)

    def add_images(self, step, images):
        """Show (name, (H, W, 3) uint8) pairs in TensorBoard. They are drawn
        here: not at all in processes that write nothing."""
        if self.is_silent:
            return
        for name, image in images:
            self.board.add_image(_tag(name), image, step, dataformats='HWC')

    def log_settings(self, values):
        """Write the run's settings {name: value}: settings.json beside
        log.csv, a text in TensorBoard, and its hyper-parameters."""
        if self.is_silent:
            return
        utils.save_json(values, os.path.join(self.folder, 'settings.json'))
        self.board.add_text('settings', '\n'.join(
            f'    {name} = {value!r}' for name, value in values.items()))
        from tensorboardX.summary import hparams

        # the other summaries would list the columns of this run's table;
        # without, TensorBoard makes those of all runs, what differs first
        _, begin, _ = hparams({
            name: str(value) if isinstance(value, (list, tuple)) else value
            for name, value in values.items()}, {})
        self.board.file_writer.add_summary(begin)

    def close(self):
        if not self.is_silent:
            self.csv.close()
            self.board.close()


def _tag(name):
    """Return a name in the characters that TensorBoard takes."""
    return re.sub(r'[^-/\w.]', '_', name)
