"What a run refuses, survives and leaves; resumes to the last bit are in kit.runs itself and in test_resume.py"
import json, os, signal, sys, threading, time

import pytest, torch
from fastai.callback.core import Callback, CancelFitException

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit import files, runs
from ddpm_nb.kit.checks import BadInput, Stopped
from ddpm_nb.kit.commands import ints
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.files import CannotWrite, only_run, read_checkpoint, save_diffusion
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.kit.runs import *
from ddpm_nb.learner import ddpm_learner
from ddpm_nb.unet import Unet


def refused(says, f, *args, **kwargs):
    with pytest.raises(BadInput) as e: f(*args, **kwargs)
    assert says in str(e.value) and '\n' not in str(e.value), str(e.value)


def model(**kwargs): return Diffusion(Unet(8, dim_mults=(1, 2)), **(dict(image_size=16, timesteps=5) | kwargs))


def tiny(pics, folder, cbs=(), seed=1):
    folder.mkdir(exist_ok=True)
    seed_everything(seed)
    dls = image_dls(pics, image_size=8, batch_size=8, device='cpu')
    cbs = [StepLoss(folder), CheckpointCallback(folder), *cbs]
    return ddpm_learner(dls, dim=8, dim_mults=(1, 2), timesteps=5, cbs=cbs)


def train(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): fit_steps(learn, *args, **kwargs)
    return learn


class At(Callback):
    "Do something after a step"
    order = 0
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self):
        if self.learn.ddpm.steps == self.step: self.do()


@pytest.mark.parametrize('f, says', [
    (lambda: FiniteCallback('hope'), "nonfinite must be stop or skip, but is 'hope'"),
    (lambda: CheckpointCallback('.', 0), 'keep_checkpoints must be a whole number of at least 1, but is 0'),
    (lambda: logger_class('paper'), "logger must be none, tensorboard or wandb, but is 'paper'"),
], ids=['nonfinite', 'keep', 'logger'])
def test_arguments(f, says): refused(says, f)


def test_a_logger_that_is_not_installed(monkeypatch):
    for k in ('wandb', 'tensorboard'): monkeypatch.setitem(sys.modules, k, None)
    monkeypatch.delitem(sys.modules, 'torch.utils.tensorboard', raising=False)
    for k in ('wandb', 'tensorboard'): refused(f"logger '{k}' isn't installed", logger_class, k)
    assert logger_class('none') is None


@pytest.mark.parametrize('env, mode', [
    (dict(), 'offline'), (dict(WANDB_API_KEY='k'), 'online'),
    (dict(WANDB_API_KEY='k', WANDB_MODE='disabled'), 'disabled')])
def test_wandb_mode(monkeypatch, tmp_path, env, mode):
    for k in ('WANDB_API_KEY', 'WANDB_MODE'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    for k,v in env.items(): monkeypatch.setenv(k, v)
    assert wandb_mode() == mode
    (tmp_path/'.netrc').write_text('machine api.wandb.ai login a password b')
    (tmp_path/'.netrc').chmod(0o600)
    assert wandb_mode() == ('disabled' if mode == 'disabled' else 'online')


# The folder

def test_one_run_in_a_folder(tmp_path):
    with only_run(tmp_path): refused(f"save_folder: a run is under way in '{tmp_path}'", only_run(tmp_path).__enter__)
    with only_run(tmp_path): pass # and it is given back


def test_a_folder_without_locks_is_used(tmp_path, monkeypatch):
    class No(files.FileLock):
        def acquire(self, *args, **kwargs): raise NotImplementedError
    monkeypatch.setattr(files, 'FileLock', No)
    with only_run(tmp_path) as f: assert f == tmp_path


def test_the_folder_of_a_run(tmp_path, monkeypatch, capsys):
    def used(**kwargs):
        with run_folder(tmp_path/'run', **kwargs) as f: (f/'model.pt').touch()
        return sorted(p.name for p in tmp_path.iterdir())
    assert used() == ['run'] and used(resume=True) == ['run']
    assert used() == ['run', 'run.1'] and used() == ['run', 'run.1', 'run.2']
    assert 'which is now in' in capsys.readouterr().out
    with only_run(tmp_path/'run'): refused('a run is under way', run_folder(tmp_path/'run').__enter__)
    monkeypatch.chdir(tmp_path/'run')
    refused("save_folder: your current folder, '.', holds a run", run_folder('.').__enter__)
    (tmp_path/'file').touch()
    refused("file/run' can't be written", run_folder(tmp_path/'file/run').__enter__)
    refused('save_folder must be a path, but is 3', run_folder(3).__enter__)


# Checkpoints

def test_the_checkpoint_of_another_model_or_run(tmp_path):
    d, f = model(), tmp_path/'model.pt'
    refused(f"resume: there is no run in '{tmp_path}', as model.pt is not there", config_of_run, tmp_path)
    save_diffusion(d, f, 3, train={})
    assert fitting(f)[0]['step'] == last_good(f, flags_of(d))[0]['step'] == 3
    refused(f'{f} is of another model than config.json says: time_steps 5, not 6', last_good, f,
            flags_of(model(timesteps=6)))
    wider = Diffusion(Unet(16, dim_mults=(1, 2)), image_size=16, timesteps=5)
    refused('than config.json says: unet_dim 8, not 16', last_good, f, flags_of(wider))
    ckpt = read_checkpoint(f)
    k = next(iter(ckpt['model']))
    torch.save(ckpt | dict(ema=ckpt['model'] | {k: ckpt['model'][k][None]}), f)
    refused(f'{f} is of another configuration: 1 tensors do not fit', fitting, f)
    torch.save(ckpt | dict(model={k: v for k,v in ckpt['model'].items() if 'stem' not in k}), f)
    with pytest.raises(BadInput): last_good(f, flags_of(d))
    refused("resume: ", config_of_run, tmp_path) # no config.json
    for bad in '[1]', '3', '{"a', '"b"':
        (tmp_path/'config.json').write_text(bad)
        refused("config.json can't be read. Give the folder of a run of ddpm_train", config_of_run, tmp_path)


@remembers
def remembering(batch_size=32, learning_rate=1e-3, unet_dim_mults:ints=(1, 2), save_folder='./results', load_path=None,
                resume=False, train_steps=9, unet_dim=16):
    return locals()


def test_what_a_run_remembers(tmp_path):
    "What isn't given comes from the run; what makes the run what it is must be what it was, a default too"
    conf = dict(batch_size=8, learning_rate=.01, unet_dim_mults=[1, 4], save_folder='elsewhere', train_steps=4, old=3)
    (tmp_path/'config.json').write_text(json.dumps(conf))
    save_diffusion(model(), tmp_path/'model.pt', 3, train={})
    assert remembering(resume=True, save_folder=tmp_path) == dict(
        batch_size=8, learning_rate=.01, unet_dim_mults=(1, 4), save_folder=tmp_path, load_path=None, resume=True,
        train_steps=4, unet_dim=16) # the run doesn't say, and 'old' is no parameter any more
    now = remembering(8, .01, '1,4', tmp_path, resume=True, train_steps=20)
    assert now['train_steps'] == 20 and now['unet_dim_mults'] == (1, 4)
    with pytest.raises(BadInput) as e: remembering(32, .1, '1,2', tmp_path, resume=True, train_steps=20)
    assert str(e.value) == (
        'resume: the run has batch_size 8, not 32, learning_rate 0.01, not 0.1, unet_dim_mults (1, 4), not (1, 2). '
        f'To begin a new run with its weights, leave out resume and give load_path {tmp_path}')
    for path in tmp_path, 'pretrained':
        refused('and load_path begins a new one: leave one of them out', remembering, load_path=path, resume=True,
                save_folder=tmp_path)


def test_a_model_brings_its_shape_along(tmp_path):
    save_diffusion(model(), tmp_path/'model.pt')
    for path in tmp_path, tmp_path/'model.pt':
        now = remembering(load_path=path, batch_size=4)
        assert (now['unet_dim'], now['unet_dim_mults'], now['batch_size']) == (8, (1, 2), 4)
        assert remembering(load_path=path, unet_dim=8)['unet_dim'] == 8
        refused('load_path: the model has unet_dim 8, not 16. Leave that out', remembering, load_path=path, unet_dim=16)
    assert remembering()['unet_dim'] == 16


def test_the_last_good_one(tmp_path, capsys):
    d = model()
    for name, step in (('model.pt', 30), ('model_9.pt', 9), ('model_20.pt', 20), ('model_x.pt', 1)):
        save_diffusion(d, tmp_path/name, step, train={})
    f = tmp_path/'model.pt'
    assert [o.name for o in older(f)] == ['model_20.pt', 'model_9.pt'] # by number
    f.write_bytes(f.read_bytes()[:1000])
    assert last_good(f, {})[0]['step'] == 20 and 'going on from' in capsys.readouterr().err
    (tmp_path/'model_20.pt').unlink()
    f.unlink()
    assert last_good(f, {})[0]['step'] == 9


@pytest.mark.parametrize('change, says', [
    (lambda t: t.clear(), 'epoch of the checkpoint must be a whole number of at least 0, but is None'),
    (lambda t: t.update(batch=-1), 'batch of the checkpoint must be a whole number of at least 0, but is -1'),
    (lambda t: t.pop('opt'), "its state of training doesn't fit (KeyError"),
    (lambda t: t['opt']['state'][0].pop('step'), "doesn't fit (KeyError"),
    (lambda t: t['opt']['state'][0].update(exp_avg=torch.ones(3)), "doesn't fit (ValueError: moments of other shapes)"),
    (lambda t: t['opt'].update(param_groups=[]), "doesn't fit (ValueError"),
    (lambda t: t['random'].update(torch=torch.ones(3)), "doesn't fit ("),
    (lambda t: t.update(data_order=(1, 2)), "doesn't fit ("),
])
def test_a_state_of_training_that_does_not_fit(pics, tmp_path, change, says):
    train(tiny(pics, tmp_path/'run'), 2, 2)
    ckpt = read_checkpoint(tmp_path/'run/model.pt')
    change(ckpt['train'])
    refused(says, train, tiny(pics, tmp_path/'again'), 4, 2, ckpt, resume=True)


def test_no_state_of_training(pics, tmp_path):
    learn = tiny(pics, tmp_path/'run')
    save_diffusion(learn.diffusion, tmp_path/'model.pt')
    refused('model.pt has no state of training', last_good, tmp_path/'model.pt', {})


def test_start_with_takes_weights_average_and_count(pics, tmp_path):
    a = train(tiny(pics, tmp_path/'a'), 3, 3)
    b = tiny(pics, tmp_path/'b', seed=2)
    start_with(b, read_checkpoint(tmp_path/'a/model.pt'))
    assert all(x.equal(y) for x,y in zip(a.diffusion.parameters(), b.diffusion.parameters()))
    assert all(x.equal(y) for x,y in zip(a.averaged.parameters(), b.averaged.parameters()))
    assert b.ddpm.steps == 3 and b.ema.avg.n_averaged == 3 and b.step_loss.rows == a.step_loss.rows and b.opt is None
    train(b, 5, 3)
    assert [r[0] for r in b.step_loss.rows] == [1, 2, 3, 4, 5] and b.ema.avg.n_averaged == 5


@pytest.mark.parametrize('keep, names', [(1, []), (2, ['model_6.pt']), (3, ['model_6.pt', 'model_4.pt'])])
def test_so_many_are_kept(pics, tmp_path, keep, names):
    learn = tiny(pics, tmp_path)
    learn.checkpoint.keep = keep
    train(learn, 8, 2)
    assert [o.name for o in older(tmp_path/'model.pt')] == names
    assert [read_checkpoint(o)['step'] for o in older(tmp_path/'model.pt')] == [int(o[6:-3]) for o in names]


# Signals

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(pics, tmp_path, sig):
    before = signal.getsignal(sig)
    with pytest.raises(Stopped, match='stopped after step 3 of 8, which is saved') as e:
        train(tiny(pics, tmp_path, [At(3, lambda: os.kill(os.getpid(), sig))]), 8, 4)
    assert e.value.code == 128 + sig and signal.getsignal(sig) is before
    assert read_checkpoint(tmp_path/'model.pt')['step'] == 3


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    cb, now = CheckpointCallback('.'), [0.]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    with pytest.raises(KeyboardInterrupt), stop_by_signal(cb):
        os.kill(os.getpid(), signal.SIGINT)
        now[0] = .5
        os.kill(os.getpid(), signal.SIGINT) # the same request, passed on by a launcher
        assert cb.stop == signal.SIGINT
        now[0] = 2.
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail('it goes on')


def test_in_another_thread_signals_are_left_alone():
    def use():
        with stop_by_signal(CheckpointCallback('.')): seen.append(signal.getsignal(signal.SIGINT))
    seen, t = [], threading.Thread(target=use)
    t.start(); t.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_stop_in_the_last_step_is_no_stop(pics, tmp_path):
    learn = train(tiny(pics, tmp_path, [At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))]), 4, 4)
    assert learn.ddpm.steps == 4 and read_checkpoint(tmp_path/'model.pt')['step'] == 4


# What can't be written

def test_what_was_trained_is_saved_elsewhere(pics, tmp_path, monkeypatch):
    (tmp_path/'tmp').mkdir()
    monkeypatch.setattr(runs.tempfile, 'mkdtemp', lambda prefix: str(tmp_path/'tmp'))
    gone = lambda: (tmp_path/'run').rename(tmp_path/'moved')
    with pytest.raises(CannotWrite, match='Step 4 is saved as .*--resume goes on from there'):
        train(tiny(pics, tmp_path/'run', [At(3, gone)]), 8, 4)
    assert read_checkpoint(tmp_path/'tmp/model.pt')['step'] == 4
    (tmp_path/'tmp').rename(tmp_path/'other')
    (tmp_path/'moved').rename(tmp_path/'run')
    with pytest.raises(CannotWrite) as e: train(tiny(pics, tmp_path/'run', [At(3, gone)]), 8, 4)
    assert 'is saved as' not in str(e.value) # neither there


# The rest

def test_no_tensor_stays_of_an_epochs_steps(pics, tmp_path):
    class Kept(Callback):
        def after_train(self):
            kept = [*self.learn.recorder.losses, *(r[1] for r in self.learn.step_loss.rows)]
            assert {type(o) for o in kept} == {float}
    train(tiny(pics, tmp_path, [Kept()]), 4, 2)


def test_nothing_is_left_by_the_search_for_a_learning_rate(pics, tmp_path):
    learn = tiny(pics, tmp_path/'run', [GridCallback(tmp_path/'run', n=2), Curves(tmp_path/'run')])
    learn.path = tmp_path
    import fastai.callback.schedule
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=10, show_plot=False)
    assert learn.ddpm.steps == 0 and learn.step_loss.rows == [] and list((tmp_path/'run').iterdir()) == []
    train(learn, 2, 2)
    assert [r[0] for r in learn.step_loss.rows] == [1, 2]


@pytest.mark.parametrize('every, total, start, sizes', [
    (3, 9, 0, [3, 3, 3]), (3, 7, 0, [3, 3, 1]), (3, 9, 4, [2, 3]), (5, 3, 0, [3]), (3, 12, 9, [3])])
def test_epochs(every, total, start, sizes):
    epochs = Epochs(every, total, per_step=10, start=start)
    n = len(epochs)
    class Loader: pass
    epochs.dls = Loader()
    epochs.dls.train, seen = Loader(), []
    for _ in range(n): epochs.before_epoch(); seen.append(epochs.dls.train.n//10)
    assert seen == sizes


def test_a_fit_that_ends_within_its_first_epoch_draws_nothing(pics, tmp_path):
    class Leave(Callback):
        def after_batch(self): raise CancelFitException
    learn = tiny(pics, tmp_path/'run', [Curves(tmp_path/'run'), Leave()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not (tmp_path/'run'/'loss.png').exists()
