"What is refused at the door, in one sentence; and what a command makes of it."
import math, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from ddpm_nb.kit.checks import BadInput, Stopped, bar, check_float, check_int, check_path, refuse
from ddpm_nb.kit.commands import command, ints
from ddpm_nb.kit.processes import best_device, join_processes, seed_everything


def test_a_refusal_is_one_line():
    with pytest.raises(ValueError) as e: refuse('a file\n   must be\there')
    assert isinstance(e.value, BadInput) and str(e.value) == e.value.line == 'a file must be here'
    e.value.args = ('Exception in Callback:\n\n',) # as fastai does
    assert str(e.value) == 'a file must be here'


@pytest.mark.parametrize('v', [0, -1, 1.5, 1., True, '7', None, math.nan])
def test_whole_numbers(v):
    with pytest.raises(BadInput) as e: check_int('timesteps', v)
    assert e.value.line == f'timesteps must be a whole number of at least 1, but is {v!r}'


def test_ranges_of_whole_numbers():
    assert [check_int('n', v, 0, 9) for v in (0, np.int64(9))] == [0, 9]
    for v in (-1, 10):
        with pytest.raises(BadInput, match=f'n must be a whole number from 0 to 9, but is {v}$'):
            check_int('n', v, 0, 9)


@pytest.mark.parametrize('v', [0., -1, math.nan, math.inf, 'x', True, None])
def test_numbers_above(v):
    with pytest.raises(BadInput) as e: check_float('learning_rate', v, above=True)
    assert e.value.line == f'learning_rate must be a number above 0, but is {v!r}'


def test_ranges_of_numbers():
    assert (check_float('ema', 0, 0, 1), check_float('ema', np.float32(.5), 0, 1)) == (0., .5)
    for v in (-.1, 1.):
        with pytest.raises(BadInput, match='ema must be a number of at least 0 and below 1, but is'):
            check_float('ema', v, 0, 1)


@pytest.mark.parametrize('v', ['', None, 3, 'a\0b', '~nobody-of-that-name/x'])
def test_paths(v):
    with pytest.raises(BadInput, match='save_folder must be a path, but is'): check_path('save_folder', v)


def test_a_path_at_home(): assert check_path('save_folder', '~/run') == Path.home()/'run'


def test_devices_and_seeds():
    with pytest.raises(BadInput, match="device must be one of this machine, such as .*, but is 'abacus'"):
        best_device('abacus')
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(BadInput, match='seed must be a whole number from 0 to'): seed_everything(seed)


def test_processes_without_a_launcher(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(BadInput, match='WORLD_SIZE is 2, but RANK is not set'): join_processes('cpu')
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(BadInput, match=r"need Accelerate: pip install 'ddpm_nb\[processes\]'"): join_processes('cpu')


@pytest.mark.parametrize('env, says', [
    ('RANK=5 WORLD_SIZE=2', 'RANK must be a whole number below WORLD_SIZE, but is 5 of 2: start several'),
    ('RANK=1', 'but is 1 of 1'), ('RANK=-1 WORLD_SIZE=2', 'but is -1 of 2'), ('RANK=x WORLD_SIZE=2', 'but is x of 2'),
    ('RANK=0 WORLD_SIZE=two', 'but is 0 of two'), ('WORLD_SIZE=0', 'WORLD_SIZE is 0, but RANK is not set'),
    ('RANK=0 WORLD_SIZE=2', '2 processes cannot join .no MASTER_ADDR.: start several processes by torchrun or'),
    ('RANK=0', ''), ('RANK= WORLD_SIZE=', '')])
@pytest.mark.parametrize('error', [ValueError, RuntimeError, OSError]) # of Accelerate, of the port, of the network
def test_what_a_launcher_would_have_said(monkeypatch, env, says, error):
    def fails(**kwargs): raise error('no MASTER_ADDR')
    monkeypatch.setattr('accelerate.PartialState', fails)
    for k in 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT'.split(): monkeypatch.delenv(k, raising=False)
    for o in env.split(): monkeypatch.setenv(*o.split('='))
    if not says: assert join_processes('cpu').type == 'cpu'; return
    with pytest.raises(BadInput, match=says): join_processes('cpu')


def test_a_bar_ends_complete(capsys):
    assert list(bar(range(7))) == list(bar(iter(range(7)), total=7)) == list(range(7))
    with bar(total=10, unit='B') as b: b.update(10)
    lines = [o for o in capsys.readouterr().err.split('\n') if o]
    assert len(lines) == 3 and all('100%' in o.split('\r')[-1] for o in lines)
    assert list(bar(range(7), show=False)) == list(range(7)) and capsys.readouterr().err == ''


@pytest.mark.parametrize('name, backend, used', [
    ('/bin/ddpm_train', 'module://ipympl.backend_nbagg', 'agg'), ('ddpm_visualize.exe', 'nonsense', 'agg'),
    ('ddpm_sample', 'TkAgg', 'agg'), ('ddpm_train.py', 'svg', 'svg'), ('train', 'pdf', 'pdf')])
def test_a_command_needs_no_window(name, backend, used):
    code = f'import sys; sys.argv = [{name!r}]; import ddpm_nb.kit.checks, matplotlib as m; print(m.get_backend())'
    env = os.environ | dict(MPLBACKEND=backend)
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.stdout.split() == [used], r.stderr


def test_only_the_first_process_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    assert list(bar(range(3))) == [0, 1, 2] and capsys.readouterr().err == ''


@pytest.mark.parametrize('error,code,line', [
    (BadInput('n is odd'), 2, 'n is odd'), (Stopped('saved', 143), 143, 'saved'),
    (KeyboardInterrupt(), 130, 'interrupted')])
def test_how_commands_end(error, code, line, capsys):
    def work(n): raise error
    with pytest.raises(SystemExit) as e: command(work)(1)
    assert e.value.code == code and capsys.readouterr().err == f'work: {line}\n'


def test_flags(monkeypatch, capsys):
    got = []
    def f(data_path:str='', # Where
          unet_dim_mults:ints=(1, 2), # Multiples
    ): got.append((data_path, unet_dim_mults))
    for flag in ('--data_path', '--data-path'):
        monkeypatch.setattr('sys.argv', ['f', flag, 'my_pics', '--unet-dim-mults=1,2,4'])
        command(f)()
    assert got == [('my_pics', (1, 2, 4))]*2
    monkeypatch.setattr('sys.argv', ['f', '--nothing'])
    with pytest.raises(SystemExit) as e: command(f, 'ddpm_f')()
    assert e.value.code == 2 and 'usage: ddpm_f' in capsys.readouterr().err


def test_whole_numbers_of_a_flag():
    assert ints('1,2,4') == ints('(1, 2, 4)') == ints([1, 2, 4]) == (1, 2, 4) and ints(3) == (3,)
    with pytest.raises(BadInput, match='unet_dim_mults must be whole numbers with commas'): ints('1;2')
