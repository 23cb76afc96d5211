"fastai's calls on a `DDPMLearner`: each works or is refused in one line, and the average goes where the weights go"
import io, os, warnings
from contextlib import redirect_stdout

import pytest, torch
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.interpret import Interpretation
from fastai.learner import load_learner, save_model
from fastai.optimizer import Adam
from torch import nn

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput, CannotWrite
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.files import load_diffusion
from ddpm_nb.kit.processes import random_states, seed_everything, set_random_states
from ddpm_nb.kit.runs import *
from ddpm_nb.learner import ddpm_learner


@pytest.fixture
def new(pics, tmp_path):
    dls = image_dls(pics, image_size=8, batch_size=16, device='cpu')
    def _f(cbs=None, **kwargs):
        seed_everything(1)
        kwargs = dict(dim=8, dim_mults=(1,), attention='none', timesteps=5, path=tmp_path) | kwargs
        return ddpm_learner(dls, cbs=cbs, **kwargs)
    return _f


def quietly(f, *args, **kwargs):
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit, n, lr, **kwargs)
    return learn


def both(learn): return [p.detach().clone() for d in (learn.diffusion, learn.averaged) for p in d.parameters()]
def same(a, b): return all(x.equal(y) for x,y in zip(a, b, strict=True))


def unharmed(learn, was):
    "It's as it was, and can be trained and sampled from"
    assert learn.model is learn.diffusion and same(both(learn), was)
    assert not torch.is_autocast_enabled('cpu') and not learn.lock.locked()
    fit(learn).sample(1)
    assert not same(both(learn), was)


# The average follows the weights

def test_load_takes_the_average_back(new):
    learn = fit(new(), 2)
    saved, images = both(learn), learn.sample(2, seed=0)
    path = learn.save('q')
    fit(learn, 2)
    assert not same(both(learn), saved)
    learn.load('q')
    assert same(both(learn), saved) and learn.sample(2, seed=0).equal(images) and learn.ddpm.steps == 4
    for other in (new(), fit(new())):
        assert same(both(other.load('q')), saved) and other.sample(2, seed=0).equal(images)
    assert all(a.equal(b) for a,b in zip(load_diffusion(path, 'cpu').parameters(), learn.averaged.parameters()))


def test_training_goes_on_as_if_it_had_not_been_loaded(new):
    "Weights, moments and the average's own count are back"
    learn = fit(new(), 2)
    learn.save('q')
    states, order = random_states(), learn.dls.train.rng.getstate()
    was = both(fit(learn))
    other = new().load('q')
    set_random_states(states)
    other.dls.train.rng.setstate(order)
    assert same(both(fit(other)), was) and other.ema.avg.n_averaged == learn.ema.avg.n_averaged == 3


def test_the_best_that_a_callback_keeps(new):
    class Spoil(Callback):
        "Make the second epoch's weights useless"
        order, seen = 59, None
        def after_epoch(self):
            if self.epoch == 0: self.seen = both(self.learn)
        def before_validate(self):
            if self.epoch: [p.data.fill_(100.) for d in (self.diffusion, self.averaged) for p in d.parameters()]
    spoil = Spoil()
    learn = fit(new(), 2, cbs=[SaveModelCallback(), spoil])
    assert same(both(learn), spoil.seen)


@pytest.mark.parametrize('kw', [dict(every_epoch=True), dict(at_end=True), dict(with_opt=True)])
def test_other_ways_to_keep(new, kw, tmp_path):
    learn = fit(new(), 2, cbs=SaveModelCallback(fname='m', **kw))
    assert len(list((tmp_path/'models').iterdir())) == (2 if 'every_epoch' in kw else 1)
    unharmed(learn, both(learn))


@pytest.mark.parametrize('with_opt', [True, False])
def test_fastais_own_files(new, tmp_path, with_opt):
    "The average begins with their weights"
    learn = fit(new(), 2)
    with learn.no_bar(), learn.no_logging(): quietly(learn.fit_one_cycle, 1) # leaves NumPy's numbers in the optimizer
    (tmp_path/'models').mkdir()
    save_model(tmp_path/'models/f.pth', learn.diffusion, learn.opt, with_opt=with_opt)
    for other in (new(), fit(new())):
        quietly(other.load, 'f')
        weights = list(learn.diffusion.parameters())
        assert same(weights, list(other.diffusion.parameters())) and same(weights, list(other.averaged.parameters()))
        fit(other)
        assert other.ema.avg.n_averaged == 1
        moments = other.opt.opt.state[next(other.diffusion.parameters())]['step']
        assert moments == (4 if with_opt else 2 if other.ddpm.steps > 1 else 1)


def test_looking_for_a_learning_rate_changes_nothing(new):
    learn = fit(new())
    was = both(learn)
    with learn.no_bar(): quietly(learn.lr_find, num_it=6, show_plot=False)
    assert learn.ema.avg.n_averaged == 1
    unharmed(learn, was)


def test_with_and_without_an_average(new):
    fit(new()).save('with')
    learn = new(ema=None).load('with')
    assert learn.averaged is learn.diffusion and not hasattr(learn, 'ema')
    fit(learn).save('without')
    other = fit(new())
    other.load('without')
    assert same(list(other.averaged.parameters()), list(learn.diffusion.parameters()))


class Own(nn.Module):
    "Someone's network, which has no `config`"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x, t): return self.conv(x)


def test_other_networks_and_optimizers(new):
    learn = fit(new(diffusion=Diffusion(Own(), image_size=8, timesteps=5), opt_func=Adam))
    was = both(learn)
    learn.save('own')
    fit(learn).load('own')
    unharmed(learn, was)


# Complete or not at all

def test_a_file_that_cannot_be_written(new, monkeypatch):
    learn = fit(new())
    path, was = learn.save('q'), both(learn)
    def full(*args): raise OSError(28, 'No space left on device')
    for f,name in ((learn.save, 'q'), (learn.export, 'e.pkl')):
        with monkeypatch.context() as m:
            m.setattr(os, 'fsync', full)
            with pytest.raises(CannotWrite): f(name)
        assert learn.opt and len(learn.dls.train_ds)
    assert not list(path.parent.glob('.tmp*')) and same(both(fit(learn).load('q')), was)


def test_files_that_are_refused(new, tmp_path):
    learn = fit(new())
    was, path = both(learn), new(dim=16).save('other')
    data = bytearray(learn.save('bad').read_bytes())
    data[len(data)//2] ^= 1
    (path.parent/'bad.pth').write_bytes(data)
    (path.parent/'text.pth').write_text('hello')
    torch.save([1], path.parent/'list.pth')
    torch.save(dict(learn.diffusion.state_dict()) | {'more': torch.zeros(1)}, path.parent/'more.pth')
    for name,says in dict(none='is not there', other='tensors do not fit', bad='checksum', text='BadZipFile',
                          list='it holds a list', more='1 tensors do not fit').items():
        with pytest.raises(BadInput, match=says): learn.load(name)
    with pytest.raises(BadInput, match='file must be a path'): learn.save(io.BytesIO())
    (tmp_path/'file').write_text('')
    with pytest.raises(CannotWrite): new(path=tmp_path/'file').save('q')
    unharmed(learn, was)


# Export

def test_an_exported_learner_samples_and_holds_no_pictures(new, tmp_path):
    folder = tmp_path/'run'
    folder.mkdir()
    learn = fit(new([StepLoss(folder), CheckpointCallback(folder), GridCallback(folder, 4)]).to_bf16())
    images, opt, pics = learn.sample(2, seed=0), learn.opt, learn.dls.train_ds
    x, files = pics[0][0].numpy().tobytes(), str(pics.files.path).encode()
    quietly(learn.export)
    data = (tmp_path/'export.pkl').read_bytes()
    for o in (x, files, str(folder).encode(), pics.names[0].encode()): assert o not in data
    assert learn.opt is opt and learn.dls.train_ds is pics and learn.step_loss.rows
    other = quietly(load_learner, tmp_path/'export.pkl')
    assert other.sample(2, seed=0).equal(images) and len(other.dls.train_ds) == 0 and other.opt is None
    assert not hasattr(other, 'checkpoint') and {o.name for o in other.cbs} >= {'ddpm', 'ema', 'finite', 'half'}
    other.dls = learn.dls
    unharmed(other, both(other))
    unharmed(learn, both(learn))


def test_a_learner_that_was_never_trained_and_pictures_that_stay_on_the_disk(new, pics, tmp_path):
    learn = new(ema=None)
    learn.dls = image_dls(pics, image_size=8, batch_size=16, limit=0, device='cpu')
    quietly(learn.export, 'b.pkl')
    other = quietly(load_learner, tmp_path/'b.pkl')
    assert other.sample(2, seed=0).equal(learn.sample(2, seed=0)) and learn.opt is None


# What is refused

REFUSED = dict(
    get_preds=lambda l: l.get_preds(), losses=lambda l: l.get_preds(with_loss=True), predict=lambda l: l.predict(0),
    tta=lambda l: l.tta(), interpret=Interpretation.from_learner, fetch=lambda l: fit(l, cbs=FetchPredsCallback),
    mixup=lambda l: fit(l, cbs=MixUp()), cutmix=lambda l: l.add_cb(CutMix), half=lambda l: l.to_non_native_fp16(),
    accumulate=lambda l: fit(l, cbs=GradientAccumulation(64)),
    precision=lambda l: l.to_bf16().add_cb(MixedPrecision()))


@pytest.mark.parametrize('name', REFUSED)
def test_refusals_leave_the_learner_as_it_was(new, name):
    learn = fit(new())
    was, loss_func = both(learn), learn.loss_func
    with pytest.raises(BadInput) as e: REFUSED[name](learn)
    assert '\n' not in str(e.value) and 'place here' in str(e.value) and learn.loss_func is loss_func
    unharmed(learn, was)


def test_other_pictures_are_validated(new):
    learn = fit(new())
    train = learn.dls.test_dl(learn.dls.train_ds)
    assert quietly(learn.validate, dl=train)[0] != quietly(learn.validate)[0]
    unharmed(learn, both(learn))


# What comes back

def test_validation_and_summary_leave_a_run_alone(new, tmp_path):
    folder = tmp_path/'run'
    folder.mkdir()
    keep = SaveModelCallback(fname='best')
    cbs = [StepLoss(folder), CheckpointCallback(folder), GridCallback(folder, 4), Curves(folder), keep]
    learn = fit(new(cbs), 2)
    def left(): return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob('*') if p.suffix}
    with learn.no_bar():
        files, order, was = left(), list(learn.cbs), both(learn)
        assert 0 < quietly(learn.validate)[0] != quietly(learn.validate, 0)[0]
        assert 'Total params' in quietly(learn.summary)
        assert list(learn.cbs) == order and learn.checkpoint.learn is learn
        assert [p.name for p,o in left().items() if files.get(p) != o] == []
    unharmed(learn, was)


@pytest.mark.parametrize('half, error, training', [
    ('to_bf16', KeyboardInterrupt, True), ('to_bf16', ValueError, False), ('to_fp16', ValueError, True)])
def test_an_interrupted_batch_leaves_half_precision(new, half, error, training):
    class Break(Callback):
        order, on = 5, True
        def after_pred(self):
            if self.on and self.training == training: raise error('stop')
    learn = getattr(new(), half)()
    at = Break()
    with pytest.raises(error): fit(learn, cbs=at)
    at.on = False
    unharmed(learn, both(learn))


def test_one_precision_at_a_time(new):
    learn = new().to_fp16().to_bf16()
    assert [o.amp_mode.value for o in learn.cbs if isinstance(o, MixedPrecision)] == ['bf16']
    assert not [o for o in learn.to_fp32().cbs if isinstance(o, MixedPrecision)]
    fit(learn)
