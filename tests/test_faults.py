"""Disks that are full, folders that cannot be written to, processes that are killed, runs that are long.

`KILLS=200 pytest -n 0 -s tests/test_faults.py -k kill` kills as many times; `SOAK=3000` `-k soak` trains as many steps.
"""
import os, random, resource, subprocess, sys, time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TINY, Fork, forked, server

from ddpm_nb.kit.files import read_checkpoint
from ddpm_nb.kit.runs import Curves, older
from ddpm_nb.kit.scores import Network
from ddpm_nb.train import train_diffusion

SMALL = dict(unet_dim=8, unet_dim_mults=(1, 2), image_size=16, batch_size=8, time_steps=5, n_samples=4, device='cpu')


def quiet(f, *args, **kwargs):
    with open(os.devnull, 'w') as null:
        out, sys.stdout = sys.stdout, null
        try: return f(*args, **kwargs)
        finally: sys.stdout = out


@pytest.fixture
def disk(tmp_path):
    "A file system of one megabyte"
    path = tmp_path/'disk'
    path.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', path], capture_output=True)
    if mounted.returncode: pytest.skip('needs the right to mount a file system')
    yield path
    subprocess.run(['mount', '-o', 'remount,rw', path])
    subprocess.run(['umount', path])


def six(tmp_path):
    "Arguments of a run of six steps with three milestones"
    return ['--data_path', tmp_path/'pics', '--train_steps', 6, '--save_and_sample_every', 2, *TINY]


def refused(tmp_path, save_folder, says, args=()):
    "Run, and be refused in one line; returns the checkpoint that was saved elsewhere, if any"
    env = os.environ | dict(TMPDIR=str(tmp_path/'tmp'))
    (tmp_path/'tmp').mkdir(exist_ok=True)
    r = forked('ddpm_train', *six(tmp_path), '--save_folder', save_folder, *args, cwd=tmp_path, env=env)
    assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
    line = r.stderr.strip().splitlines()[-1]
    assert line.startswith('ddpm_train: ') and says in line, line
    return list((tmp_path/'tmp').glob('ddpm_nb-*/model.pt'))


# bytes that are free: for less than a checkpoint, and for one but not for two
@pytest.mark.parametrize('room', [200_000, 900_000])
def test_full_disk(disk, pics, tmp_path, room):
    (tmp_path/'pics').symlink_to(pics)
    (disk/'fill').write_bytes(bytes(2**20 - 8192*2 - room) if room < 900_000 else b'')
    found = refused(tmp_path, disk/'run', 'No space left on device')
    kept = [f for f in (disk/'run/model.pt', *older(disk/'run/model.pt')) if f.exists()]
    steps = [read_checkpoint(f)['step'] for f in kept + found] # all of them are whole
    assert not list(disk.rglob('*tmp*'))
    assert max(steps) in (2, 4), 'what was trained is saved'
    if found: # with room on the disk it goes on from what was saved elsewhere
        (disk/'fill').unlink()
        subprocess.run(['mount', '-o', 'remount,size=9m', disk], check=True)
        if not (disk/'run/config.json').exists(): return
        (disk/'run/model.pt').write_bytes(found[0].read_bytes())
        r = forked('ddpm_train', *six(tmp_path), '--save_folder', disk/'run', '--resume', cwd=tmp_path)
        assert r.returncode == 0, r.stderr
        assert len((disk/'run/loss.csv').read_text().splitlines()) == 7


def test_read_only(disk, pics, tmp_path):
    (tmp_path/'pics').symlink_to(pics)
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    assert refused(tmp_path, disk/'run', 'Read-only file system') == []


def small_files(): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_quota_is_met_in_one_line(pics, tmp_path):
    "Files may not grow beyond 100 kB: no checkpoint can be written"
    r = forked('ddpm_train', '--data_path', pics, '--train_steps', 2, *TINY, cwd=tmp_path, first=small_files,
               env=os.environ | dict(TMPDIR=str(tmp_path)))
    assert r.returncode == 2 and 'Traceback' not in r.stderr, r.stderr
    assert "model.pt can't be written (File too large). Choose a folder that's there, with enough space" in r.stderr
    assert not list(tmp_path.rglob('*.pt'))


def test_a_second_run_is_kept_out(pics, tmp_path):
    (tmp_path/'pics').symlink_to(pics)
    args = [*six(tmp_path), '--train_steps', 10**6, '--save_folder', tmp_path/'run']
    p = Fork('ddpm_train', *args, cwd=tmp_path)
    try:
        while not (tmp_path/'run/sample_1.png').exists() and p.process.is_alive(): time.sleep(.02)
        for more in ([], ['--resume', '--train_steps', 10**6]):
            refused(tmp_path, tmp_path/'run', 'save_folder: a run is under way in', more)
        assert p.process.is_alive() and not (tmp_path/'run.1').exists()
    finally: p.process.kill(); p.ended()


def train_quietly(kwargs):
    "The work of a process that will be killed"
    Curves.after_fit = lambda self: None # drawing takes longer than all else, and most kills would meet just that
    with open(os.devnull, 'w') as null:
        sys.stdout = sys.stderr = null
        train_diffusion(10**6, 1, resume=Path(kwargs['save_folder'], 'model.pt').exists(), **kwargs)


def test_kill_9_at_any_moment(pics, tmp_path):
    """A run that saves at every step, killed again and again and resumed each time: at every moment there is a whole
    checkpoint, and at the end nothing differs"""
    kills, rng, run, steps, saved = int(os.environ.get('KILLS', 5)), random.Random(0), tmp_path/'run', [0], 0
    args = SMALL | dict(data_path=pics, save_folder=run)
    for i in range(kills):
        p, start = server.Process(target=train_quietly, args=(args,)), time.time()
        p.start()
        while not (run/'model.pt').exists() or read_step(run) == steps[-1]: # it has gone on
            assert p.is_alive() and time.time() < start + 120, 'resume does not go on'
            time.sleep(.005)
        time.sleep(rng.random()*.3)
        p.kill(); p.join()
        steps.append(read_checkpoint(run/'model.pt')['step']) # refuses whatever is not whole
        saved += any(o.stat().st_mtime > start for o in run.glob('.tmp-*')) # of this time
    assert steps == sorted(set(steps))
    last = steps[-1] + 1
    quiet(train_diffusion, last, 1, resume=True, **args)
    quiet(train_diffusion, last, 1, **(args | dict(save_folder=tmp_path/'whole')))
    a, b = (read_checkpoint(o/'model.pt') for o in (run, tmp_path/'whole'))
    assert all(torch.equal(a[k][n], b[k][n]) for k in ('model', 'ema') for n in b[k])
    assert (run/'loss.csv').read_bytes() == (tmp_path/'whole/loss.csv').read_bytes()
    print(f'killed {kills} times in {last} steps, {saved} times in the middle of a file; 0 checkpoints lost, '
          'and the same weights and losses as a run that was never killed')


def read_step(run):
    "The step of the newest checkpoint; at any moment it can be read"
    return read_checkpoint(run/'model.pt')['step']


@pytest.mark.slow
def test_soak(pics, tmp_path):
    "Many tiny steps with checkpoints, samples and scores: memory stays, and no file is left open"
    steps, me, seen = int(os.environ.get('SOAK', 300)), psutil.Process(), []
    colour = Network(lambda x: x.mean((2, 3))/255, 'mean colour', key='')
    from fastai.callback.core import Callback
    class Watch(Callback):
        order = 200
        def after_epoch(self): seen.append((me.memory_info().rss/2**20, len(me.open_files())))
    from ddpm_nb import train
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, 'logger_cbs', lambda *a: [Watch()])
        quiet(train_diffusion, steps, max(steps//30, 1), fid=True, fid_samples=8, network=colour, data_path=pics,
              save_folder=tmp_path/'run', **SMALL)
    (first, _), (warm, some), (end, files) = seen[0], seen[len(seen)//3], seen[-1]
    print(f'{steps} steps: {first:.0f} MB after the first epoch, {warm:.0f} MB when warm, {end:.0f} MB at the end; '
          f'open files {some} and {files}')
    assert end < warm + 20 and files <= some
