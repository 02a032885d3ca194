"""Reads the frames of a video, writes one of overlays."""
import os

import cv2

from lib.images import writing


def read_frames(video, file, path, errors):
    """Yield (path, image) of a video's frames, numbered from 0; add a line to
    errors where there are fewer than its header states."""
    stated, count = count_frames(video), 0
    while (read := video.read())[0]:
        yield (os.path.join(path, f'{count:06}'),
               cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
        count += 1
    if not count:
        errors.append(f'{file} cannot be read as a video')
    elif count < 0.95 * stated:             # headers are not exact
        errors.append(f'{file} ends after {count} of {stated} frames')


def count_frames(video):
    """Return how many frames a video's header states, 0 if none."""
    return max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))


class OverlayVideo:
    """A video file of overlays, opened with the first; at the end of `with`
    it is at its path, whole, or after an error not at all."""

    def __init__(self, path, rate):
        self.path, self.rate, self.writer = path, rate, None
        self.part = f'{path}.tmp{os.path.splitext(path)[1]}'

    def __enter__(self):
        if os.path.islink(self.part):   # what it leads to is not ours
            os.remove(self.part)
        return self

    def __exit__(self, kind, *_):
        if self.writer:
            self.writer.release()
            with writing(self.path):
                if kind is None:
                    os.replace(self.part, self.path)
                elif os.path.exists(self.part):
                    os.remove(self.part)

    def add(self, page):
        """Add an overlay (H, W, 3) uint8; codecs want even sides."""
        height, width = page.shape[:2]
        page = cv2.copyMakeBorder(
            cv2.cvtColor(page, cv2.COLOR_RGB2BGR), 0, height % 2, 0,
            width % 2, cv2.BORDER_REPLICATE)
        with writing(self.path):
            if self.writer is None:
                self.writer = cv2.VideoWriter(
                    self.part, cv2.VideoWriter.fourcc(*'mp4v'), self.rate,
                    page.shape[1::-1])
            if not self.writer.isOpened():
                raise OSError('OpenCV has no writer for it')
            self.writer.write(page)
