"""Encoders of timm as backbones: BACKBONE names one.

A backbone's cells lie on the pixels 0, s, 2s, ... of an image, as those of
padded convolutions do, and sides of k * s + 1 pixels have k + 1 cells; or they
are patches of s x s pixels, and sides of k * s have k. Padding and upsampling
follow. Which it is is measured, as all that is said here of an encoder is.

Shapes: b images, c channels, h x w cells, H x W pixels, s the output stride.
"""
import difflib
import functools
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import settings
from lib.distributed import is_spawned
from utils import UserError, first_line, import_optional, log

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean, std
GRID = 9, 12                 # cells that an encoder is measured with: odd and
#                              even, not of an attention window's side, 7 or 8


class Encoder(nn.Module):
    """An encoder of timm: image (b, 3, H, W) to features (b, c, h, w).

    Args: name: in timm's list. stride: the output stride.

    Attributes: as of network.ResNet; low_channels is 0 where no features have
    stride 4. can_train_alone: batches of one image can be trained on.

    Raises: UserError that says why the encoder does not fit.
    """

    def __init__(self, name, stride):
        super().__init__()
        about = describe(name, stride)
        self.net = _create(name, stride, about['levels'])
        self.low_channels, self.channels = about['channels']
        self.align_corners = about['align_corners']
        self.can_train_alone = about['can_train_alone']
        self.is_recomputed, self.momenta = False, []

    def forward(self, image, low=False):
        """Return features (b, c, h, w) of image (b, 3, H, W); with low,
        (those of stride 4, (b, c', H / 4, W / 4), and these)."""
        for norm, momentum in self.momenta:
            norm.momentum = momentum
        features = _forward(self.net, image)
        if (self.is_recomputed and torch.is_grad_enabled()
                and not torch.compiler.is_compiling()):
            self.momenta = [(m, m.momentum) for m in self.modules()
                            if isinstance(m, _BatchNorm)]
            for norm, _ in self.momenta:    # what is computed again, in the
                norm.momentum = 0.0         # backward pass, changes nothing
        return (features[0], features[-1]) if low else features[-1]

    @property
    def recompute(self):
        """Activation checkpointing, by timm."""
        return self.is_recomputed

    @recompute.setter
    def recompute(self, value):
        net = self.net if hasattr(self.net, 'set_grad_checkpointing') else (
            self.net.model)
        try:
            net.set_grad_checkpointing(value)
        except AssertionError:
            raise UserError(f'RECOMPUTE={value}: '
                            f'BACKBONE={settings.BACKBONE} has no activation '
                            f'checkpointing; RECOMPUTE=False') from None
        self.is_recomputed = value


def _forward(net, image):
    """Return the features of a net of timm, (b, c, h, w) each."""
    is_last = str(getattr(net, 'output_fmt', '')).endswith('NHWC')
    return [x.permute(0, 3, 1, 2) if is_last else x for x in net(image)]


# ------------------------------------------------- building
def _create(name, stride, levels=None):
    """Return timm's net that gives the features of some levels, all if none
    are named. Raises AssertionError where it cannot take the stride."""
    timm = import_timm(name)
    given = {} if levels is None else {'out_indices': levels}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for option in ({'output_stride': stride}, {'dynamic_img_size': True},
                       {'strict_img_size': False}, {}):
            try:
                net = timm.create_model(name, features_only=True, **option,
                                        **given)
                break
            except TypeError as error:      # transformers have no such option
                if 'unexpected keyword' not in str(error) or not option:
                    raise
        if len({*net.feature_info.reduction()}) == 1 and hasattr(net, 'norm'):
            plain = timm.create_model(name, **option)   # a vision transformer
            net = type(net)(plain, levels or 1, norm=True)
    return net


def import_timm(name):
    """Return timm; raise UserError where it is missing, or has no such net.
    """
    timm = import_optional('timm')
    known = timm.list_models()
    if name.partition('.')[0] not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(f'BACKBONE={name}: timm {timm.__version__} has no net '
                        f'of that name; ' + (
                            f'the nearest is {near[0]}' if near else
                            'python -m tools.backbones lists them'))
    return timm


# ------------------------------------------------- measuring
@functools.cache
def describe(name, stride):
    """Measure an encoder of timm at an output stride, on the meta device.

    Returns: dict(levels: indices of the features that are used, those of
    stride 4, where there are any, before the others; channels: (of those of
    stride 4 or 0, of the others); align_corners: cells lie on the pixels 0,
    s, 2s, ...; can_train_alone).
    Raises: UserError that says why it does not fit.
    """
    about = _measure(name, stride)
    if 'reason' not in about:
        return about
    others = _list_strides(name)
    listed = ', '.join(f'STRIDE={s}' for s in others)
    remedy = (f'it can take {listed}' if others else
              'docs/backbones.md lists those that fit')
    raise UserError(f'BACKBONE={name} with STRIDE={stride}: '
                    f'{about["reason"]}; {remedy}')


def _list_strides(name):
    """Return the output strides that an encoder can take."""
    return [stride for stride in settings.choices('STRIDE')
            if 'reason' not in _measure(name, stride)]


@functools.cache
def _measure(name, stride):
    """Return what describe does, or dict(reason: why it does not fit)."""
    with torch.device('meta'), torch.no_grad():
        try:
            net = _create(name, stride).eval()
        except (AssertionError, NotImplementedError, ValueError):
            return {'reason': 'it cannot be built at that output stride'}
        offset, error = _cell_offset(net, stride)
        if offset is None:
            return {'reason': f'it takes no images of any size ({error})'}
        near = [abs(offset - place) <= stride / 8
                for place in (0, (stride - 1) / 2)]
        if not any(near):
            return {'reason': f'its cells lie {offset:g} pixels from the '
                              f'image\'s edge, on no grid that could be '
                              f'upsampled'}
        extra = int(near[0])
        try:
            features = _forward(net, _blank(stride, extra))
        except (RuntimeError, AssertionError):
            sides = f'k * {stride}' + ' + 1' * extra
            return {'reason': f'where its cells lie, images need sides of '
                              f'{sides} pixels, which it cannot take'}
    levels = [i for i, x in enumerate(features)
              if x.shape[2:] == tuple(k + extra for k in GRID)]
    if not levels:
        pixels, wanted = ([k * step + extra for k in GRID]
                          for step in (stride, 1))
        near = min((x.shape[2:] for x in features),
                   key=lambda size: abs(size[0] - wanted[0]))
        return {'reason': 'of {} x {} pixels it gives {} x {} cells, not '
                          '{} x {}'.format(*pixels, *near, *wanted)}
    low = [i for i, x in enumerate(features[:levels[-1]]) if x.shape[2:] == (
        *(k * stride // 4 + extra for k in GRID),)]
    first = net.feature_info.out_indices[0] % len(net.feature_info.info)
    return {'levels': tuple(first + i for i in (*low[:1], levels[-1])),
            'channels': (features[low[0]].shape[1] if low else 0,
                         features[levels[-1]].shape[1]),
            'align_corners': bool(extra),
            'can_train_alone': _can_train_alone(net, stride, extra)}


def _blank(stride, extra, count=1):
    """Return images of GRID's cells, on the meta device."""
    return torch.zeros(count, 3, *(k * stride + extra for k in GRID),
                       device='meta')


def _can_train_alone(net, stride, extra):
    """Tell whether a batch of one image can be trained on: not where batch
    norm gets a single value a channel."""
    try:
        _forward(net.train(), _blank(stride, extra))
    except ValueError:
        return False
    return True


def _cell_offset(net, stride):
    """Return (how far a net's first cell lies from the first pixel, pixels;
    '') or (None, the error) where it takes no image.

    It is the sum over the layers that have a stride, each by how far its
    first window's centre lies from its first input; where the grid becomes
    smaller without one, patches are merged.
    """
    layers, hooks = {}, []          # {stride so far: [(stride, offset)]}

    def note(part, args, output):
        reached = round(image.shape[2] / args[0].shape[-2])
        layers.setdefault(reached, []).append(_window(part))
    for part in net.modules():
        if not [*part.children()] and _window(part)[0] > 1:
            hooks.append(part.register_forward_hook(note))
    for extra in (0, 1):            # all strides divide sides of k * stride
        layers.clear()
        image, error = _blank(stride, extra), ''
        try:
            _forward(net, image)
            break
        except (RuntimeError, AssertionError) as caught:
            error = first_line(caught)[:100]
    for hook in hooks:
        hook.remove()
    if error:
        return None, error
    reached, total = 1, 0.0
    while reached < stride:
        if reached in layers:
            step, offset = min(layers[reached])
        else:                       # patches are merged
            after = min([at for at in layers if at > reached] + [stride])
            if after % reached:     # by no whole number: no such features
                break
            step, offset = after // reached, (after / reached - 1) / 2
        total, reached = total + reached * offset, reached * step
    return total, ''


def _window(layer):
    """Return (stride, how far the first window's centre lies from the first
    input) of a convolution or pooling."""
    step, size, padding, dilation = (
        each[0] if isinstance(each, (tuple, list)) else each
        for each in (getattr(layer, name, default) for name, default in (
            ('stride', 1), ('kernel_size', 1), ('padding', 0),
            ('dilation', 1))))
    if (hasattr(layer, 'filt_size') or padding == 'same'
            or 'Same' in type(layer).__name__):
        return step, 0.0            # padded by as much as it takes
    return step, dilation * (size - 1) / 2 - padding


# ------------------------------------------------- by the settings
def describe_setting():
    """Return in words which backbone the settings name."""
    s = settings
    return s.BACKBONE or f'ResNet-{s.N_LAYERS}, {s.STEM} stem'


def own_normalisation():
    """Return {'MEAN': ..., 'STD': ...} that the backbone's weights were
    trained with."""
    mean, std = IMAGENET
    if settings.BACKBONE:
        about = import_timm(settings.BACKBONE).get_pretrained_cfg(
            settings.BACKBONE)
        mean, std = tuple(about.mean), tuple(about.std)
    return {'MEAN': mean, 'STD': std}


def complete_settings():
    """Set what the settings leave to the backbone, and say so: MEAN and STD
    where they are (); STRIDE where the encoder can take one alone, and the
    command line names none."""
    s, found = settings, {}
    if () in (s.MEAN, s.STD):
        found = {name: value for name, value in own_normalisation().items()
                 if getattr(s, name) == ()}
    if s.BACKBONE and 'STRIDE' not in s.given() and (
            'reason' in _measure(s.BACKBONE, s.STRIDE)):
        fits = _list_strides(s.BACKBONE)
        found.update({'STRIDE': fits[0]} if len(fits) == 1 else {})
    for name, value in found.items():
        setattr(s, name, value)
        if not is_spawned():            # whose parent has said it
            log(f'{name} = {value} ({describe_setting()})')


def grid_extra():
    """Return 1 where sides of k * STRIDE + 1 pixels fit the backbone's grid,
    0 where those of k * STRIDE do."""
    if not settings.BACKBONE:
        return 1
    return int(describe(settings.BACKBONE, settings.STRIDE)['align_corners'])
