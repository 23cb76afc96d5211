"A step of training in one piece: when it takes the place of fastai's events, and what happens where it can't"
import copy, math
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from torch.optim.swa_utils import AveragedModel
import fastai.callback.schedule

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit import fast
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.fast import Captured, TrainStep, graphed
from ddpm_nb.kit.files import read_checkpoint
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.kit.runs import CheckpointCallback, GraphCallback, StepLoss, fit_steps
from ddpm_nb.learner import ddpm_learner, ema_average
from ddpm_nb.unet import Unet


def learner(pics, folder, *cbs, graph=True, seed=0, **kwargs):
    seed_everything(seed)
    dls = image_dls(pics, 16, 8, device='cpu')
    kwargs = dict(dim=8, dim_mults=(1, 2), timesteps=5, accumulate=1) | kwargs
    learn = ddpm_learner(dls, cbs=[StepLoss(folder), *cbs], path=folder, **kwargs)
    if graph: learn.add_cb(GraphCallback(learn.loss_func))
    return learn


def fit(learn, n=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn


def losses(learn): return [r[1] for r in learn.step_loss.rows]

def states(learn): return [*learn.diffusion.state_dict().values(), *learn.averaged.state_dict().values()]

def apart(a, b):
    "The mean difference of weights. Of single ones some are decided by rounding: a bias before a normalisation"
    return torch.cat([(p - q).abs().flatten() for p,q in zip(states(a), states(b))]).mean()

def same(a, b, tol=1e-5):
    assert losses(a) == pytest.approx(losses(b), abs=tol)
    assert apart(a, b) < tol


@pytest.mark.parametrize('ready', [
    lambda l: l, lambda l: l.add_cb(GradientClip(.01)), lambda l: l.remove_cb(l.ema)],
    ids=['plain', 'clipped', 'without an average'])
def test_one_piece_is_the_events(pics, tmp_path, ready):
    a, b = (fit(ready(learner(pics, tmp_path, graph=o))) for o in (False, True))
    assert b.graph.step and not hasattr(a, 'graph')
    same(a, b, 1e-4)
    assert a.recorder.values[-1][1] == pytest.approx(b.recorder.values[-1][1], abs=1e-4) # validation as ever
    assert a.recorder.losses == pytest.approx(b.recorder.losses, abs=1e-3)
    assert a.ddpm.steps == b.ddpm.steps == 10


def test_half_precision_is_the_events(pics, tmp_path):
    a, b = (fit(learner(pics, tmp_path, graph=o).to_bf16()) for o in (False, True))
    assert b.graph.step.dtype is torch.bfloat16
    same(a, b, 2e-3)
    assert losses(fit(learner(pics, tmp_path))) != pytest.approx(losses(b), abs=1e-5)


def test_the_random_state_is_the_events(pics, tmp_path):
    states = []
    for o in (False, True):
        fit(learner(pics, tmp_path, graph=o))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_schedule_of_the_learning_rate(pics, tmp_path):
    from fastai.callback.schedule import ParamScheduler, SchedCos
    a, b = (fit(learner(pics, tmp_path, graph=o), cbs=[ParamScheduler({'lr': SchedCos(1e-3, 1e-2)})])
            for o in (False, True))
    assert b.graph.step and b.graph.follows
    same(a, b)
    c = fit(learner(pics, tmp_path)) # the schedule makes a difference
    assert losses(b) != pytest.approx(losses(c), abs=1e-5)


@pytest.mark.parametrize('bf16', [False, True])
def test_one_cycle_falls_back(pics, tmp_path, bf16):
    "It moves the momentum too, which a graph holds fast"
    def run(graph):
        learn = learner(pics, tmp_path, graph=graph)
        if bf16: learn.to_bf16()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
        return learn
    a, b = run(False), run(True)
    assert b.graph.step and not b.graph.follows
    same(a, b, 2e-3 if bf16 else 1e-4)
    fit(b, 1)
    assert b.graph.follows # the next fit is looked at anew


def test_learning_rate_finder(pics, tmp_path):
    learn = learner(pics, tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    assert learn.ddpm.steps == 0 and learn.ema.avg is None and len(learn.recorder.losses) >= 5
    fit(learn)
    assert learn.ddpm.steps == 10


class Hook(Callback):
    def before_step(self): self.seen = True

class Late(Callback):
    order = 200
    def before_batch(self): self.seen = True


@pytest.mark.parametrize('change', [
    lambda l: l.add_cb(Hook()), lambda l: l.add_cb(Late()), lambda l: setattr(l, 'loss_func', lambda o, *_: o),
    lambda l: setattr(l, 'opt_func', fastai.optimizer.Adam)], ids=['event', 'order', 'loss', 'optimizer'])
def test_what_it_does_not_know_goes_by_events(pics, tmp_path, change):
    runs = []
    for graph in (False, True):
        learn = learner(pics, tmp_path, graph=graph)
        change(learn)
        runs.append(fit(learn))
    assert runs[1].graph.step is None and all(o.seen for o in runs[1].cbs if isinstance(o, (Hook, Late)))
    same(*runs)


class Spoil(Callback):
    "A batch with pixels that are no numbers"
    order = -1
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.learn.ddpm.steps + 1 == self.at: self.learn.xb = (self.xb[0]*float('nan'),)


def test_a_step_that_is_not_finite(pics, tmp_path, capsys):
    learn = learner(pics, tmp_path, Spoil(3))
    with pytest.raises(BadInput, match=r'loss of step 3 is not finite \(loss nan, learning rate 0.001\)'): fit(learn)
    assert all(o.isfinite().all() for o in states(learn))
    learn = fit(learner(pics, tmp_path, Spoil(3), nonfinite='skip'))
    assert 'step 3 is not finite' in capsys.readouterr().err
    assert learn.finite.skipped == 1 and learn.ddpm.steps == 10
    assert all(o.isfinite().all() for o in states(learn)) and learn.recorder.smooth_loss.value.isfinite()
    assert learn.opt.opt.state[next(learn.diffusion.parameters())]['step'] == 9 # Adam has not counted it
    other = fit(learner(pics, tmp_path, Spoil(3), nonfinite='skip', graph=False))
    assert apart(learn, other) < 1e-5


def setup(dtype=None, clip=None, **kwargs):
    torch.manual_seed(0)
    d = Diffusion(fast.fast(Unet(8, dim_mults=(1, 2))), image_size=16, timesteps=10)
    opt = torch.optim.Adam(d.parameters(), lr=1e-3, fused=True)
    return d, opt, TrainStep(d, opt, dtype, max_norm=clip, **kwargs)


class Given(Diffusion):
    "Times and noise that depend on the image alone"
    def draw(self, x_0, noise=None):
        return (x_0.mean((1, 2, 3)).abs()*1e3).long() % self.num_timesteps, x_0.flip(-1)


def test_two_batches_are_one():
    "The gradient of 64 images is that of twice 32, and pieces change nothing"
    x, grads = torch.randn(8, 3, 16, 16).clamp(-1, 1), []
    for pieces in (1, 2, 8):
        d, opt, step = setup()
        d.__class__, step.pieces, step.adam = Given, pieces, lambda: None
        step.opt.zero_grad = lambda: None # so that the gradients stay
        step.scaler.update = lambda: None
        grads.append([step(x)[0], *(p.grad for p in d.parameters())])
    d, opt, step = setup()
    d.__class__ = Given
    for o in x.split(4): (d(o)/2).backward()
    grads.append([grads[0][0], *(p.grad for p in d.parameters())])
    for other in grads[1:]:
        for a,b in zip(grads[0], other): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fp16_scales_and_backs_off():
    "In float16 an overflow halves the scale and leaves the step out, without a word; a loss that is no number is told"
    d, opt, step = setup(torch.float16)
    x = torch.randn(4, 3, 16, 16).clamp(-1, 1)
    for _ in range(3): assert not step(x)[1]
    was = [p.clone() for p in d.parameters()]
    step.scaler.load_state_dict(step.scaler.state_dict() | dict(scale=2.**80))
    loss, bad = step(x)
    assert loss.isfinite() and not bad and step.scaler.get_scale() == 2.**79
    assert all(map(torch.equal, was, d.parameters()))
    assert step(x*float('nan'))[1]
    was = [p.clone() for p in d.parameters()]
    d.p_losses = lambda x_0, t, noise: Diffusion.p_losses(d, x_0, t, noise) + math.inf # with gradients that are finite
    loss, bad = step(x)
    assert bad and loss.isinf() and all(map(torch.equal, was, d.parameters()))
    d, opt, full = setup()
    assert abs(full(x)[0] - setup(torch.float16)[2](x)[0]) < 5e-3


def test_no_memory_takes_more_pieces(pics, tmp_path):
    learn, seen = learner(pics, tmp_path), []
    whole = Diffusion.forward
    class Small(Diffusion):
        def forward(self, x_0, noise=None, t=None):
            if self.training: seen.append(len(x_0))
            if len(x_0) > 4 and self.training: raise torch.OutOfMemoryError('CUDA out of memory')
            return whole(self, x_0, noise, t)
    learn.diffusion.__class__ = Small
    fit(learn, 1)
    assert seen == [8] + [4, 4]*5 and learn.graph.step.pieces == 2 and learn.ddpm.steps == 5


def test_a_large_sample_takes_smaller_pieces():
    net = fast.fast(Unet(8, dim_mults=(1,)))
    x, t = torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad(): want = net(x, t)
    whole = Unet.forward
    class Small(fast.FastUnet):
        def embed(self, emb):
            if len(emb) > 2: raise torch.OutOfMemoryError('CUDA out of memory')
            return super().embed(emb)
    net.__class__, net.most = Small, 6*64
    real, fast.FastUnet.limit = fast.FastUnet.limit, lambda self, x: self.most
    try:
        with torch.no_grad(): got = net(x, t)
    finally: fast.FastUnet.limit = real
    torch.testing.assert_close(got, want)
    assert net.most <= 2*64


# The seam: what is recorded, and when. A stand-in for a CUDA tensor has all that `Captured` looks at.

def cuda(*shape): return SimpleNamespace(device=SimpleNamespace(type='cuda'), shape=shape, dtype=torch.float32)


@pytest.fixture
def seam(monkeypatch):
    log = []
    monkeypatch.setattr(fast, 'aside', lambda f, *xs: log.append('aside') or f(*xs))
    monkeypatch.setattr(fast, 'record', lambda f, *xs: log.append('record') or (lambda *xs: log.append('replay') or 1))
    return log


def test_recorded_after_three_calls(seam):
    f = Captured(lambda x: seam.append('f') or 0)
    assert [f(cuda(2)) for _ in range(5)] == [0, 0, 0, 1, 1]
    assert seam == ['aside', 'f']*3 + ['record', 'replay', 'replay']
    assert f(cuda(3)) == 0 and seam[-2:] == ['aside', 'f'] # another shape begins anew
    assert f(torch.ones(2)) == 0 and seam[-2:] != ['aside', 'f'] # a CPU needs none


def test_no_more_graphs_than_allowed(seam):
    f = Captured(lambda x: 0, warm=0, most=2)
    for i in range(4): f(cuda(i))
    assert seam == ['record', 'replay']*2


def test_where_recording_fails(seam, monkeypatch, capsys):
    def fails(f, *xs): raise RuntimeError('operation not permitted when stream is capturing\nmore')
    monkeypatch.setattr(fast, 'record', fails)
    f = Captured(lambda x: 7, warm=0)
    assert [f(cuda(1)) for _ in range(3)] == [7]*3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith('no CUDA graph (operation not permitted')


def test_a_copy_records_its_own(seam):
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    d.denoise = Captured(d.denoise)
    e = copy.deepcopy(d)
    assert e.denoise.f.__self__ is e and d.denoise.f.__self__ is d and e.denoise.seen is not d.denoise.seen
    assert graphed(e) is e and e.sample(1).shape == (1, 3, 8, 8)


@pytest.mark.parametrize('graph', [True, False])
def test_resume_in_float16(pics, tmp_path, graph):
    "A run that was stopped goes on to the last bit, the scale of the gradient included"
    def run(folder, total, ckpt=None):
        folder.mkdir(exist_ok=True)
        learn = learner(pics, folder, CheckpointCallback(folder), graph=graph).to_fp16()
        with learn.no_bar(), learn.no_logging(): fit_steps(learn, total, 3, ckpt, resume=ckpt is not None)
        return learn
    whole = run(tmp_path/'whole', 9)
    run(tmp_path/'part', 3)
    part = run(tmp_path/'part', 9, read_checkpoint(tmp_path/'part'/'model.pt'))
    assert losses(whole) == losses(part) and all(map(torch.equal, states(whole), states(part)))
    a, b = (read_checkpoint(tmp_path/o/'model.pt')['train']['scaler'] for o in ('whole', 'part'))
    assert a == b and a['scale'] == 2.**16 and a['_growth_tracker'] == 9


def test_a_checkpoint_of_other_batches(pics, tmp_path):
    "Batches of another size are counted as images: a run goes on where another device takes more of them at once"
    from ddpm_nb.kit.runs import go_on
    learn = learner(pics, tmp_path, CheckpointCallback(tmp_path))
    fit(learn, 1)
    ckpt = read_checkpoint(tmp_path/'model.pt')
    ckpt['train'] |= dict(batch=6, bs=4)
    assert go_on(learn, ckpt) == 3 and learn.checkpoint.going_on['batch'] == 3
