"The commands, as processes: what they leave, and how they refuse."
import json, os, sys
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import TINY
from ddpm_nb import train


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "Call a command in this process, which has imported everything already"
    def run(name, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [name, *args])
        with pytest.raises(SystemExit) as e: getattr(train, name)()
        return SimpleNamespace(returncode=e.value.code, **capsys.readouterr()._asdict())
    return run


def test_train_sample_visualize(call, pics, tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'nonsense') # files need none
    r = call('ddpm_train', '--data_path', pics, '--train_steps', 4, '--save_and_sample_every', 2, *TINY)
    assert r.returncode == 0, r.stderr
    assert 'Epoch 2/2' in r.stdout and '4 steps done' in r.stdout
    left = {p.name for p in (tmp_path/'results').glob('[!.]*')}
    assert left == set('config.json loss.csv loss.png model.pt model_2.pt sample_1.png sample_2.png'.split())
    assert json.loads((tmp_path/'results/config.json').read_text())['unet_dim_mults'] == [1, 2]

    r = call('ddpm_sample', '--n', 3, '--sampler', 'ddim', '--steps', 2)
    assert r.returncode == 0, r.stderr
    assert r.stdout.splitlines() == ['3 images are in samples'] and 'images 1 to 3' in r.stderr # a bar of its own
    left = {p.name for p in (tmp_path/'samples').glob('[!.]*')}
    assert left == {'samples.csv', '00000.png', '00001.png', '00002.png'}
    assert Image.open(tmp_path/'samples/00002.png').size == (16, 16)
    assert Image.open(tmp_path/'samples.png').size == (2*18 + 2, 2*18 + 2)

    r = call('ddpm_visualize', '--data_path', pics, '--n_samples', 2, '--train_steps', 4, '--time-steps', 5)
    assert r.returncode == 0, r.stderr
    assert (tmp_path/'results/backward_diffusion.png').stat().st_size > 1000


def test_scores_in_training_and_after(fork, pics, tmp_path):
    "The score of a run, of its checkpoint and of a folder of its samples; the reference is computed once"
    env = os.environ | dict(XDG_CACHE_HOME=str(tmp_path/'cache'))
    net = ['--network', 'efficientnet-lite0']
    steps = ['--train_steps', 2, '--save_and_sample_every', 1]
    r = fork('ddpm_train', '--data_path', pics, *steps, '--fid', '--fid_samples', 8, *net, *TINY, env=env)
    assert r.returncode == 0, r.stderr
    assert 'FD (efficientnet-lite0)' in r.stdout
    assert {'fid.csv', 'fid.png'} <= {p.name for p in (tmp_path/'results').iterdir()}
    kept, = (tmp_path/'cache/ddpm_nb/features').iterdir()
    when = kept.stat().st_mtime_ns

    fork('ddpm_sample', '--n', 8)
    scores = [fork('ddpm_fid', '--samples', what, '--n', 8, '--data_path', pics, *net, env=env)
              for what in ('results/model.pt', 'results', 'samples')]
    for r in scores:
        assert r.returncode == 0, r.stderr
        assert 'FD (efficientnet-lite0)' in r.stdout and 'from 8 images against 40 real ones; floor' in r.stdout
        assert 'note: 8 images cannot span 1280 features' in r.stdout
    assert len({r.stdout for r in scores}) == 1
    assert kept.stat().st_mtime_ns == when


@pytest.mark.parametrize('name, flags', [
    ('ddpm_train', ['--learning_rate', '--unet_dim_mults', '--dataloader_workers']),
    ('ddpm_sample', ['--load_path', '--eta']), ('ddpm_fid', ['--view', '--infinity']),
    ('ddpm_data', ['--dest', 'what']),
    ('ddpm_visualize', ['--time_steps', '--train_steps', 'Optimizer steps in all', '--n_samples', 'Images shown'])])
def test_help_shows_every_flag_with_its_meaning(here, name, flags):
    r = here(name, '--help')
    assert r.returncode == 0
    assert all(f in r.out for f in flags)


@pytest.mark.parametrize('name, args, says', [
    ('ddpm_train', ['--data_path', 'nowhere'], "nowhere"),
    ('ddpm_train', ['--data_class', 'cow'], "data_class must be one of all, cat, dog, wild, but is 'cow'"),
    ('ddpm_train', ['--train_steps', '0'], 'train_steps must be a whole number of at least 1, but is 0'),
    ('ddpm_train', ['--learning_rate', '-1'], 'learning_rate must be a number above 0, but is -1.0'),
    ('ddpm_train', ['--image_size', '30'], 'image_size must be a multiple of 8, but is 30'),
    ('ddpm_train', ['--image_size', '32x60'], 'image_size must be a multiple of 8, but is (32, 60)'),
    ('ddpm_train', ['--image_size', '32by64'], "image_size must be a whole number, or height and width such as 32x64"),
    ('ddpm_train', ['--image_size', '2.5'], "image_size must be a whole number, or height and width such as 32x64"),
    ('ddpm_train', ['--channels', '4'], 'channels must be 1 or 3, but is 4'),
    ('ddpm_train', ['--unet_dim', '12'], 'dim must be a multiple of 8'),
    ('ddpm_train', ['--unet_dim_mults', 'x'], 'unet_dim_mults'), # argparse's own line
    ('ddpm_train', ['--load_path', 'none.pt'], 'none.pt is not there. Give a checkpoint, such as ./results/model.pt'),
    ('ddpm_train', ['--device', 'abacus'], 'device must be one of this machine'),
    ('ddpm_sample', ['--load_path', 'none.pt'], 'none.pt is not there'),
    ('ddpm_sample', ['--sampler', 'heun'], "sampler must be ancestral or ddim, but is 'heun'"),
    ('ddpm_visualize', [], 'results/model.pt is not there'),
    ('ddpm_fid', ['--samples', 'none.pt'], 'none.pt is not there'),
    ('ddpm_fid', ['--network', 'vgg', '--samples', '.'], 'data_path'),
    ('ddpm_data', ['moon'], "what must be afhq or faces, but is 'moon'"),
    ('ddpm_data', ['afhq', '--url', 'ftp://x'], 'ftp://x'),
])
def test_refusals_are_one_line_and_exit_with_2(here, tmp_path, name, args, says):
    r = here(name, *args)
    assert r.returncode == 2
    assert says in r.err and 'Traceback' not in r.err
    assert r.err.strip().splitlines()[-1].startswith(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', 'ddpm_train ddpm_visualize ddpm_sample ddpm_fid ddpm_data'.split())
def test_each_command_is_installed(call, tmp_path, name):
    r = call(name, '--no-such-flag', env=os.environ | dict(MPLBACKEND='module://ipympl.backend_nbagg')) # isn't here
    assert r.returncode == 2 and r.stderr.strip().splitlines()[-1].startswith(name) and 'Traceback' not in r.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('logger, leaves', [
    ('tensorboard', 'tensorboard/events.out.*'), ('wandb', 'wandb/offline-run-*/*.wandb')])
def test_loggers_write_without_an_account(call, pics, tmp_path, logger, leaves):
    env = {k: v for k,v in os.environ.items() if not k.startswith('WANDB')} | dict(HOME=str(tmp_path))
    steps = ['--train_steps', 2, '--save_and_sample_every', 1]
    r = call('ddpm_train', '--data_path', pics, *steps, '--logger', logger, *TINY, env=env)
    assert r.returncode == 0, r.stderr
    assert sum(p.stat().st_size for p in (tmp_path/'results').glob(leaves)) > 500
