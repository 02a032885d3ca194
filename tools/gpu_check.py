"""Checks a GPU's results, and measures its speed, section by section.

    python -m tools.gpu_check [SECTION ...] [--out DIR] [--steps N]
                              [--device cpu] [KEY=VALUE ...]

Sizes are those of settings.py, the paper's. A section that DIR has a file of
is not repeated: a run that was stopped goes on, and to repeat a section its
file is removed. --device cpu runs the same at sizes for it, such as
N_LAYERS=18 STEM=plain CROP_SIZE=65 BATCH_SIZE=2.

Writes DIR/SECTION.json and the tables, DIR/report.md. Exit status 1 where a
check or a section failed.
"""
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback

import torch

import dataset
import eval
import network
import settings
import train
import utils
from tools import gpu_sections as sections
from tools.complexity import ROWS
from tools.gpu_sections import check, relative_error
from tools.measure import (
    count_flop,
    describe_machine,
    describe_speed,
    markdown_table,
    peak_bytes,
    release_memory,
    time_steps,
)
from utils import RunError, UserError, run_main

FAST = 0.9                   # the least speed of train.py, of the bare step's
# of logits as drawn, relative to plain ones; others', with TF32 on
LOGIT_ERRORS, LOGIT_ERROR = {'plain': 0.0, 'bf16': 0.25}, 0.05
WINDOW = 257                 # pixels, of the sliding window


# ------------------------------------------------- speed of training
def time_way(what, **changes):
    """Return a section that times steps of a way of training: 'speeds', each
    as describe_speed returns it, and 'kernels', of slowest_kernels."""
    def section(context):
        vars(settings).update(changes)
        kernels = []
        row = time_steps(context.watch, context.steps, what, kernels)
        return {'speeds': [row], 'kernels': kernels}
    return section


def train_itself(context, **changes):
    """train.py for ten times as many steps, beside the step alone."""
    vars(settings).update(changes)
    alone = time_steps(context.watch, context.steps, 'the step alone')
    release_memory()
    steps = 10 * context.steps
    process, folder = sections.start_training(
        context, '_'.join(['train', *changes]), ITER_MAX=steps, **changes)
    sections.finish_training(process, folder)
    speeds = [float(row['images_per_s']) for row in sections.read_log(folder)]
    speed = statistics.median(speeds[len(speeds) // 3:])
    share = speed / alone['images_per_s']
    ours = {'what': f'train.py, {steps} steps', 'images_per_s': speed,
            'seconds': settings.BATCH_SIZE / speed,
            'arithmetic': alone['arithmetic'],
            'of_peak': alone['of_peak'] * share}
    return {'speeds': [alone, ours], 'checks': [check(
        'speed of train.py, relative to the step alone', share, FAST,
        share >= FAST)] if context.device.type == 'cuda' else []}


# ------------------------------------------------- speed of inference
def time_inference(context, what, infer, images, flop=None, rounds=1):
    """Return a row of the speeds, of infer(), once warm. flop: that an image
    needs, None where that is not known."""
    watch, device = context.watch, context.device
    held = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
    first, peaks = watch.time(infer), []
    seconds = statistics.median(watch.time(lambda: peaks.append(peak_bytes(
        infer, device))) for _ in range(rounds))
    is_bf16 = settings.INFERENCE == 'bf16'
    return describe_speed(watch, what, images, seconds,
                          torch.bfloat16 if is_bf16 else None, flop,
                          first_s=first,
                          peak_bytes=peaks[0] and peaks[0] - held)


@torch.no_grad()
def evaluation(context):
    """Scoring photographs by each INFERENCE, at several scales and flipped,
    by a sliding window; how much the fast ways change logits."""
    device, speeds, checks = context.device, [], []
    net = train.build(device, is_new=False)[0]
    torch.backends.cudnn.benchmark = False              # as eval.py has it
    data = dataset.Segmentation('val', train=False)
    image = dataset.normalise(data[0][0][None], device)
    sections.damp_branches(net)
    network.set_bn_momentum(net, 1.0)
    train.set_train_mode(net)
    net(image.repeat(2, 1, 1, 1))       # statistics as a trained net's are
    data.ids = (data.ids * 8)[:16 * context.steps]
    usual = {'EVAL_SCALES': (1.0,), 'EVAL_FLIP': False, 'EVAL_WINDOW': 0}
    for way in [*({'INFERENCE': name} for name in settings.choices(
            'INFERENCE')), {'INFERENCE': 'folded', 'EVAL_WINDOW': WINDOW},
            {'INFERENCE': 'folded', 'EVAL_SCALES': (0.5, 1.0, 1.5),
             'EVAL_FLIP': True}]:
        vars(settings).update({**usual, **way})
        if len(way) == 1:
            name = way['INFERENCE']
            logits = eval.predict_logits(eval.prepare_network(net),
                                         image).double().cpu()
            if name == 'plain':
                truth = logits
            checks.append(check(f'INFERENCE={name}: logits, relative to plain',
                                relative_error(logits, truth),
                                LOGIT_ERRORS.get(name, LOGIT_ERROR)))
        what = ', '.join(f'{key}={value}' for key, value in way.items())
        speeds.append(time_inference(
            context, what, functools.partial(eval.evaluate, net, data),
            len(data)))
    return {'speeds': speeds, 'checks': checks}


@torch.no_grad()
def time_image(context, what):
    """Return a row of the speeds: inference of one image in float32."""
    size, settings.INFERENCE = settings.CROP_SIZE, 'plain'
    infer = eval.prepare_network(train.build(context.device, is_new=False)[0])
    image = torch.randn(1, 3, size, size, device=context.device)
    return time_inference(context, what, lambda: infer(image), 1,
                          count_flop(size), context.watch.rounds)


def heads(context):
    """Table 1 in seconds and bytes."""
    speeds = []
    for row, (changes, _) in ROWS.items():
        vars(settings).update(changes)
        release_memory()
        try:
            speeds += [time_image(context, f'{row}, inference'), time_steps(
                context.watch, context.steps, f'{row}, training')]
        except torch.OutOfMemoryError:
            speeds.append({'what': f'{row}: out of memory'})
    return {'speeds': speeds}


SECTIONS = {
    'peaks': sections.peaks,
    'float32': sections.float32,
    'low_precision': sections.low_precision,
    'overflow': sections.overflow,
    'sync': sections.sync,
    'devices': sections.devices,
    'deterministic': sections.deterministic,
    'eager': time_way('eager'),
    'eager_float32': time_way('eager, AMP=off', AMP='off'),
    'recompute': time_way('RECOMPUTE', RECOMPUTE=True),
    'train': train_itself,
    'evaluation': evaluation,
    'heads': heads,
    'compiled': time_way('COMPILE', COMPILE=True),      # which takes minutes
    'train_compiled': functools.partial(train_itself, COMPILE=True),
    'compiled_float32': sections.compiled_float32}


# ------------------------------------------------- running
def run_section(context, name, path):
    """Run a section and write what it found, or its error."""
    before, began = settings.as_dict(), time.perf_counter()
    benchmark = torch.backends.cudnn.benchmark
    try:
        result = SECTIONS[name](context)
    except Exception as error:          # the others go on
        traceback.print_exc()
        result = {'error': sections.describe_place(error)}
    vars(settings).update(before)
    torch.backends.cudnn.benchmark = benchmark
    if 'torch._dynamo' in sys.modules:
        torch.compiler.reset()
    result = {**result, 'took_s': time.perf_counter() - began,
              'commit': utils.git_hash()}
    utils.save_json(result, path)
    print(f'{name}: {describe_result(result)}, {result["took_s"]:.0f} s',
          flush=True)
    if 'error' in result and context.device.type == 'cuda':
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:   # a fault that stays until the end
            raise RunError(f'{name}: {utils.first_line(error)}; run the same '
                           f'command again for the sections behind') from None
    release_memory()


def describe_result(result):
    """Return a section's result in a few words."""
    if 'error' in result or 'skipped' in result:
        return ', '.join(f'{key}: {result[key]}'
                         for key in ('error', 'skipped') if key in result)
    failed = [each['what'] for each in result.get('checks', ())
              if not each['ok']]
    return f'failed: {"; ".join(failed)}' if failed else 'ok'


def read_results(folder):
    """Return {section: what its file holds} of those that were run."""
    results = {}
    for name in SECTIONS:
        path = os.path.join(folder, f'{name}.json')
        if os.path.exists(path):
            results[name] = json.loads(utils.read_text(path))
    return results


# ------------------------------------------------- report
def show(value, form='.4g'):
    """Return a value as a cell shows it, '' for None."""
    if value is None or isinstance(value, str):
        return value or ''
    return format(value, form)


def speed_cells(row):
    """Return the cells of a row of the speeds, of what it has."""
    share, peak = row.get('of_peak'), row.get('peak_bytes')
    return [row['what'], show(row.get('images_per_s'), '.1f'),
            show(row.get('seconds')), show(row.get('arithmetic')),
            show(share and 100 * share, '.0f'),
            show(peak and peak / 1e9, '.2f'), show(row.get('first_s'), '.1f')]


def report(results, machine):
    """Return the report, Markdown, of all results {section: result}."""
    parts, rows = ['# A GPU, checked', machine], [
        [name, each['what'], show(each['found']), show(each['limit']),
         'yes' if each['ok'] else '**no**']
        for name, result in results.items()
        for each in result.get('checks', ())]
    parts += ['## Checks', markdown_table(
        ['section', 'what', 'found', 'limit', 'ok'], rows)]
    parts += ['## Speeds', markdown_table(
        ['section', 'what', 'images/s', 's', 'convolutions in',
         'of its peak, %', 'GB of tensors', 'first, s'],
        [[name, *speed_cells(row)] for name, result in results.items()
         for row in result.get('speeds', ())])]
    parts += ['## Limits of the machine', markdown_table(
        ['what', 'found', 'unit'],
        [[what, show(value), unit] for result in results.values()
         for what, value, unit in result.get('figures', ())])]
    for name, result in results.items():
        if result.get('kernels'):
            parts += [f'## The slowest kernels: {name}', markdown_table(
                ['kernel', 'calls a step', 'ms a step', 'share, %'],
                [[kernel, show(calls), show(1e3 * taken, '.3f'),
                  show(100 * share, '.1f')]
                 for kernel, calls, taken, share in result['kernels']])]
    parts += ['## Sections', markdown_table(
        ['section', 'result', 's', 'commit'],
        [[name, describe_result(results[name]),
          show(results[name]['took_s'], '.0f'), results[name]['commit']]
         if name in results else [name, 'not run', '', '']
         for name in SECTIONS])]
    return '\n\n'.join(parts) + '\n'


# ------------------------------------------------- the command
def parse_arguments():
    """Return the command line's options; set the settings that it gives."""
    parser = utils.make_parser(__doc__, settings.describe())
    parser.add_argument('sections', nargs='*', metavar='SECTION',
                        help=f'all, or some of: {", ".join(SECTIONS)}')
    parser.add_argument('--out', metavar='DIR', default='results/gpu')
    parser.add_argument('--steps', metavar='N', type=int, default=30,
                        help='timed steps of a row (default 30)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    args = parser.parse_args(settings.override(sys.argv[1:]))
    unknown = ', '.join(x for x in args.sections if x not in SECTIONS)
    if unknown:
        raise UserError(f'{unknown}: sections are {", ".join(SECTIONS)}')
    if args.steps < 1:
        raise UserError(f'--steps {args.steps}: give at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('this machine has no CUDA GPU; --device cpu tries the '
                        'sections without one')
    settings.validate(for_training=True)
    return args


def check_folder(folder, values):
    """Raise UserError where a folder has results of another command; else
    note there what all its results have been made with."""
    path = os.path.join(folder, 'command.json')
    if not os.path.exists(path):
        utils.save_json(values, path)
    found = json.loads(utils.read_text(path))
    if found != json.loads(json.dumps(values)):
        raise UserError(f'--out {folder}: it holds results of another '
                        f'command, {found}; name another folder')


def main():
    """Run the sections that have no result yet; write the report."""
    args = parse_arguments()
    device = torch.device('cuda', 0) if args.device == 'cuda' else (
        sections.CPU)
    machine = describe_machine(device)
    check_folder(args.out, {'device': machine.partition(',')[0],
                            'steps': args.steps, **settings.given()})
    print(machine, flush=True)
    torch.backends.cudnn.benchmark = True
    dataset.retain_freed_memory()
    path = os.path.join(args.out, 'report.md')
    with tempfile.TemporaryDirectory() as work:
        context = sections.Context(device, args.steps, work)
        for name in args.sections or SECTIONS:
            file = os.path.join(args.out, f'{name}.json')
            if os.path.exists(file):
                print(f'{name}: {file} is there already')
            else:
                run_section(context, name, file)
            results = read_results(args.out)
            with utils.atomic_write(path) as part, open(part, 'w') as text:
                text.write(report(results, machine))
    failed = [f'{name} ({words})' for name, words in (
        (name, describe_result(result)) for name, result in results.items())
        if words.startswith(('error', 'failed'))]
    print(f'{path} is written')
    if failed:
        raise RunError(f'{len(failed)} of {len(results)} sections failed: '
                       f'{", ".join(failed)}')


if __name__ == '__main__':
    run_main(main)
