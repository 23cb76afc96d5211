"Two processes on a CPU, by torchrun and by Accelerate: the numbers of one, one writer, an end when one of them dies"
import csv, os, random, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from conftest import TINY, Fork, forked, ranks
from ddpm_nb.kit.files import read_checkpoint

BIN = Path(sys.executable).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1')
ARGS = ['--train_steps', 40, '--save_and_sample_every', 20, '--precision', 'fp32', *TINY]


pytestmark = pytest.mark.xdist_group('processes') # one pair of processes at a time
PORT = str(29500 + os.getpid() % 1000)


def two(name, *args):
    launch = [BIN/'torchrun', '--nproc_per_node', '2', '--master_port', PORT, '--no-python', '--', BIN/name]
    return [*launch, *map(str, args)]


def two_by_accelerate(name, *args):
    launch = [BIN/'accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--main_process_port', PORT]
    return [*launch, '--no_python', name, *map(str, args)]


def two_forks(*args, cwd, env=ENV):
    "The two processes of a command without a launcher, each with what one would tell it"
    return [Fork(*args, cwd=cwd, env=env | o) for o in ranks(2, PORT)]


def ran(args, env=ENV, cwd=None):
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope='module')
def runs(pics, tmp_path_factory):
    "The same run by one process and by two"
    path = tmp_path_factory.mktemp('runs')
    r = forked('ddpm_train', '--data_path', pics, '--save_folder', path/'one', *ARGS, cwd=path)
    assert r.returncode == 0, r.stderr
    both = two_by_accelerate('ddpm_train', '--data_path', pics, '--save_folder', path/'two', *ARGS)
    r = ran(both, ENV | dict(PATH=f'{BIN}{os.pathsep}{ENV["PATH"]}'), path)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('40 steps done') == 1 # one of them speaks
    return path


def column(path, name): return np.array([float(r[name]) for r in csv.DictReader(path.open()) if r[name]])


def test_same_losses_and_one_writer(runs):
    for name in ('loss', 'held_out'):
        a, b = (column(runs/o/'loss.csv', name) for o in ('one', 'two'))
        assert abs(a - b).max() < 1e-4
    assert {p.name for p in (runs/'one').iterdir()} == {p.name for p in (runs/'two').iterdir()}
    assert {p.name for p in runs.iterdir()} == {'one', 'two'}


def test_same_samples_and_score(runs, pics):
    for name, n in (('a', 1), ('b', 2)): # seven images for two processes
        args = ['--load_path', runs/'one/model.pt', '--n', 7, '--save_folder', runs/name, '--device', 'cpu']
        for o in [Fork('ddpm_sample', *args, cwd=runs)] if n == 1 else two_forks('ddpm_sample', *args, cwd=runs):
            assert (r := o.ended()).returncode == 0, r.stderr
    read = lambda path: np.stack([np.asarray(Image.open(o)).astype(int) for o in sorted(path.glob('*.png'))])
    a, b = read(runs/'a'), read(runs/'b')
    assert a.shape == b.shape == (7, 16, 16, 3) and abs(a - b).max() <= 12 and abs(a - b).mean() < 1
    args = ['--samples', runs/'a', '--data_path', pics, '--network', 'efficientnet-lite0', '--device', 'cpu']
    env = ENV | dict(XDG_CACHE_HOME=str(runs/'cache'))
    said = [forked('ddpm_fid', *args, cwd=runs, env=env).stdout]
    said.append(''.join(o.ended().stdout for o in two_forks('ddpm_fid', *args, cwd=runs, env=env)))
    one, both = (float(re.search(r'FD \(efficientnet-lite0\)\D*([\d.]+)', o)[1]) for o in said)
    assert both == pytest.approx(one, rel=1e-3)


def long(pics, path):
    return ['ddpm_train', '--data_path', pics, '--save_folder', path/'run', *ARGS, '--train_steps', 10**6]


def begun(path, alive):
    "Wait until a run trains"
    end = time.time() + 120
    while not (path/'run/sample_1.png').exists() and alive() and time.time() < end: time.sleep(.05)


def started(pics, path):
    "A long run of two processes, by torchrun, that has begun to train"
    p = subprocess.Popen(two(*long(pics, path)), cwd=path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         env=ENV)
    begun(path, lambda: p.poll() is None)
    return p


def test_a_death_ends_the_run(pics, tmp_path):
    p = started(pics, tmp_path)
    second = [c for c in psutil.Process(p.pid).children(recursive=True) if c.environ().get('RANK') == '1']
    second[-1].send_signal(signal.SIGKILL)
    said = p.communicate(timeout=120)[1]
    assert p.returncode and 'exitcode' in said and '-9' in said
    alive = [c for c in psutil.process_iter(['cmdline']) if str(tmp_path) in ' '.join(c.info['cmdline'] or '')]
    assert not alive # one that is dead has no command line


@pytest.mark.parametrize('who', [0, 1])
def test_one_is_asked_and_all_stop(pics, tmp_path, who):
    "One process alone gets the signal, at a moment that chance decides, and the step that both stop after is saved"
    both = two_forks(*long(pics, tmp_path), cwd=tmp_path)
    begun(tmp_path, both[0].process.is_alive)
    time.sleep(random.random()*.2)
    os.kill(both[who].process.pid, signal.SIGTERM)
    said = ''.join(o.ended().stderr for o in both)
    steps = {int(o) for o in re.findall(r'stopped after step (\d+)', said)}
    assert len(steps) == 1 and read_checkpoint(tmp_path/'run/model.pt')['step'] in steps, said[-2000:]


def test_a_signal_stops_all_after_one_step(pics, tmp_path):
    p = started(pics, tmp_path)
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=120)[1]
    assert 'stopped after step' in said
    again = ['--data_path', pics, '--save_folder', tmp_path/'run', *ARGS, '--train_steps', 10**6, '--resume']
    r = forked('ddpm_train', *again, '--batch_size', 4, cwd=tmp_path)
    assert r.returncode == 2 and 'batch_size' in r.stderr # the folder is whole, and still knows its parameters
