"TensorBoard and W&B get each step once, with the numbers of loss.csv, however often a run is killed and resumed"
import sys
from types import SimpleNamespace

import pytest
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedLin

from ddpm_nb.kit.checks import Stopped
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.files import read_checkpoint
from ddpm_nb.kit.plots import read_losses
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.kit.runs import *
from ddpm_nb.learner import ddpm_learner


class Wandb:
    "W&B in memory: what it was told, and what it drops"
    Image = staticmethod(lambda path: ('image', path))
    def __init__(self): self.runs, self.inits, self.open = {}, [], None
    def init(self, id, **kwargs):
        assert self.open is None, 'the run before is still open'
        self.inits.append(dict(id=id, **kwargs))
        rows, self.open = self.runs.setdefault(id, []), id
        def log(values, step):
            assert not rows or step > rows[-1][0], 'W&B would drop it'
            rows.append((step, values))
        def finish(): self.open = None
        return SimpleNamespace(log=log, finish=finish)


@pytest.fixture
def wandb(monkeypatch):
    w = Wandb()
    monkeypatch.setitem(sys.modules, 'wandb', w)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    return w


class At(Callback):
    "Do something after a step"
    order = 0
    def __init__(self, step, do): self.step, self.do = step, do
    def after_step(self):
        if self.learn.ddpm.steps == self.step: self.do(self.learn)


def stop(learn): learn.checkpoint.stop = 2
def die(learn): raise MemoryError('killed')


@pytest.fixture
def train(pics, tmp_path):
    def _f(logger, total, cbs=(), ckpt=None, grid=True):
        "A run to step `total`, with a milestone each two steps"
        seed_everything(1)
        dls = image_dls(pics, image_size=8, batch_size=8, epoch_size=32, device='cpu')
        own = [StepLoss(tmp_path), CheckpointCallback(tmp_path, 3), *([GridCallback(tmp_path, 4)] if grid else [])]
        own += logger_cbs(logger, tmp_path, dict(a=1))
        learn = ddpm_learner(dls, dim=8, dim_mults=(1,), attention='none', timesteps=5, cbs=[*own, *cbs])
        if ckpt: ckpt = read_checkpoint(tmp_path/ckpt)
        with learn.no_bar(), learn.no_logging(): fit_steps(learn, total, 2, ckpt, resume=bool(ckpt))
        return learn
    return _f


def events(folder):
    "What TensorBoard shows: {name: [(step, value)]}"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    e = EventAccumulator(str(folder/'tensorboard'), size_guidance=dict(scalars=0, images=0)).Reload()
    tags = e.Tags()
    return {k: [(o.step, o.value) for o in e.Scalars(k)] for k in tags['scalars']} | \
           {k: [(o.step, (o.width, o.height)) for o in e.Images(k)] for k in tags['images']}


def wandb_events(wandb):
    assert len(wandb.runs) == 1 and wandb.open is None
    res = {}
    for step,values in next(iter(wandb.runs.values())):
        for k,v in values.items(): res.setdefault(k, []).append((step, v))
    return res


def check(e, folder, imgs=None, no_lr=()):
    "Steps 1 to N once each, with the values of loss.csv"
    rows = read_losses(folder/'loss.csv')
    assert [s for s,_ in e['loss']] == [s for s,_,_ in rows] == [*range(1, len(rows) + 1)]
    assert [v for _,v in e['loss']] == pytest.approx([l for _,l,_ in rows], rel=1e-6)
    assert [s for s,_ in e['lr']] == [s for s,_,_ in rows if s not in no_lr]
    assert [v for _,v in e['lr']] == pytest.approx([1e-3]*len(e['lr']))
    held = [(s, h) for s,_,h in rows if h is not None]
    assert [s for s,_ in e['held_out']] == [s for s,_ in held]
    assert [v for _,v in e['held_out']] == pytest.approx([h for _,h in held], rel=1e-6)
    assert [s for s,_ in e.get('img', [])] == ([s for s,_ in held] if imgs is None else imgs)


@pytest.mark.parametrize('logger', ['tensorboard', 'wandb'])
def test_stopped_within_a_milestone_and_resumed(train, wandb, tmp_path, logger):
    for at,ckpt in ((1, None), (4, 'model.pt')): # in a milestone, and at its end
        with pytest.raises(Stopped): train(logger, 5, [At(at, stop)], ckpt)
    train(logger, 5, ckpt='model.pt')
    check(events(tmp_path) if logger == 'tensorboard' else wandb_events(wandb), tmp_path)
    if logger == 'wandb':
        assert len({o['id'] for o in wandb.inits}) == 1 and len(wandb.inits) == 3
        assert {(o['project'], o['mode'], o['resume']) for o in wandb.inits} == {('DDPM_AFHQ', 'offline', 'allow')}


@pytest.mark.parametrize('logger', ['tensorboard', 'wandb'])
@pytest.mark.parametrize('ckpt, total', [('model.pt', 8), ('model_2.pt', 8), ('model_2.pt', 3)])
def test_killed_and_resumed_from_an_earlier_checkpoint(train, wandb, tmp_path, logger, ckpt, total):
    "The log has steps that come again; with a total below what was logged, TensorBoard hides them"
    with pytest.raises(MemoryError): train(logger, 8, [At(7, die)])
    wandb.open = None # as the process died
    train(logger, total, ckpt=ckpt)
    e = events(tmp_path) if logger == 'tensorboard' else wandb_events(wandb)
    if logger == 'tensorboard' or total == 8: check(e, tmp_path)
    else: assert [s for s,_ in e['loss']] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('logger', ['tensorboard', 'wandb'])
def test_without_the_logger_for_a_while(train, wandb, tmp_path, logger):
    "What loss.csv has is sent later; the samples and learning rates of that time are not"
    for total,o in ((2, logger), (4, 'none'), (6, logger)): train(o, total, ckpt='model.pt' if total > 2 else None)
    check(events(tmp_path) if logger == 'tensorboard' else wandb_events(wandb), tmp_path, [2, 6], no_lr=(3, 4))


def test_killed_before_the_milestone_is_sent(train, wandb, tmp_path):
    "The checkpoint is ahead of the log"
    class Die(Callback):
        order = 99
        def after_epoch(self):
            if self.learn.ddpm.steps == 4: raise MemoryError('killed')
    with pytest.raises(MemoryError): train('tensorboard', 6, [Die()])
    train('tensorboard', 6, ckpt='model.pt')
    check(events(tmp_path), tmp_path, [2, 6], no_lr=(3, 4))


@pytest.mark.parametrize('logger', ['tensorboard', 'wandb'])
def test_without_samples(train, wandb, tmp_path, logger):
    train(logger, 4, grid=False)
    check(events(tmp_path) if logger == 'tensorboard' else wandb_events(wandb), tmp_path, [])


def test_scores_images_and_a_learning_rate_that_changes(train, wandb, tmp_path):
    class Score(RunCallback):
        name, rows, metric, order = 'fid', [], SimpleNamespace(name='fid'), 49
        def after_validate(self): self.rows.append(dict(step=self.learn.ddpm.steps, value=self.learn.ddpm.steps/2))
    train('tensorboard', 4, [Score(), ParamScheduler({'lr': SchedLin(1e-3, 1e-4)})])
    e = events(tmp_path)
    assert e['fid'] == [(2, 1.), (4, 2.)] and [o for _,o in e['img']] == [(22, 22)]*2
    lrs = [v for _,v in e['lr']]
    assert lrs == sorted(lrs, reverse=True) and 1e-3 > lrs[0] > lrs[-1] > 1e-4


def test_looking_and_validating_are_not_logged(train, wandb, tmp_path):
    learn = train('wandb', 2)
    with learn.no_bar(): learn.validate(), learn.lr_find(num_it=6, show_plot=False)
    assert len(wandb.inits) == 1 and [s for s,_ in wandb_events(wandb)['loss']] == [1, 2]


@pytest.mark.parametrize('kept', ['{', '[]'])
def test_a_damaged_memory_begins_again(train, tmp_path, kept):
    "TensorBoard hides what's there, and gets all of loss.csv"
    train('tensorboard', 2)
    (tmp_path/'tensorboard.json').write_text(kept)
    train('tensorboard', 4, ckpt='model.pt')
    check(events(tmp_path), tmp_path, [4], no_lr=(1, 2))
