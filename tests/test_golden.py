"""The main job, held to what another implementation computed (golden/make.py), and to the statistics of Algorithm 1."""
import csv, inspect, io, json, math, re, sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from PIL import Image
from torch import nn

from ddpm_nb.diffusion import Diffusion, ancestral, step_back
from ddpm_nb.fid import (Features, Network, compute_fid, fid_floor, fid_infinity, frechet_distance, kernel_sums, kid,
                         leave_one_out, precision_recall)
from ddpm_nb.forward import q_chain, q_sample, q_step
from ddpm_nb.kit.data import decode, image_dls
from ddpm_nb.kit.fast import fast
from ddpm_nb.kit.files import load_diffusion, save_diffusion
from ddpm_nb.kit.plots import backward_strip, forward_strip, part_times, plot_loss, plot_scores, show_strip
from ddpm_nb.kit.scores import EfficientNetFeatures, FIDCallback, reference
from ddpm_nb.learner import DDPMCallback, DDPMLearner, EMACallback, ddpm_learner, ema_average
from ddpm_nb.loss import bits_per_dim, bound_terms, decoder_std, discrete_log_prob, loss_weights
from ddpm_nb.posterior import p_mean_std
from ddpm_nb.sampling import ddim, ddim_step, ddim_times
from ddpm_nb.schedule import (SCHEDULES, Schedule, clipped_alphas, cosine_alphas_cumprod, cosine_schedule, extract,
                              linear_schedule, make_schedule, snr)
from ddpm_nb.unet import Block, Down, LinearAttention, ResBlock, Unet, Up, time_embedding

sys.path.insert(0, str(Path(__file__).parent/'golden'))
import make

GOLD = dict(np.load(make.FILE))
NBS = Path(__file__).parent.parent/'nbs'
matplotlib.use('Agg')


def gold(k): return torch.tensor(GOLD[k])


def near(a, b, tol=1e-5):
    "The largest difference, measured by the size of what it should be, is at most `tol`"
    a, b = (np.asarray(o.detach() if torch.is_tensor(o) else o, dtype='d') for o in (a, b))
    assert a.shape == b.shape, f'{a.shape} for {b.shape}'
    assert np.abs(a - b).max() <= tol*max(1, np.abs(b).max()), f'off by {np.abs(a - b).max():.3g}'


def in_order(zs):
    "A source of noise that gives out `zs`, one at each call with a tensor of that shape"
    it = iter(zs)
    def noise_like(x):
        z = next(it)
        assert x.shape == z.shape
        return z
    return noise_like


# --- The U-Net

def named(c):
    "A network with weights by name"
    net = Unet(**c)
    net.load_state_dict(make.weights({k: v.shape for k, v in net.state_dict().items()}))
    return net


@pytest.mark.parametrize('form', [lambda net: net, fast], ids=['plain', 'fast'])
@pytest.mark.parametrize('name', make.NETS)
def test_unet(name, form):
    torch.manual_seed(0)
    net = Unet(**make.NETS[name])
    drawn, mine = make.drawn(make.NETS[name]), net.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in drawn.items()}
    assert all((mine[k] - drawn[k]).abs().max() < 1e-6 for k in drawn)
    x, t = gold(f'{name}/x'), gold(f'{name}/t')
    near(form(net)(x, t), gold(f'{name}/seed0'))
    near(form(named(make.NETS[name]))(x, t), gold(f'{name}/y'))
    with torch.no_grad(): near(form(named(make.NETS[name])).eval()(x, t), gold(f'{name}/y'))


@pytest.mark.parametrize('form', [lambda net: net, fast], ids=['plain', 'fast'])
def test_training_step(form):
    d = Diffusion(form(named(make.NETS['small'])), image_size=8, timesteps=50)
    x_0, t, noise = (gold(f'step/{k}') for k in ('x_0', 't', 'noise'))
    near(d(x_0, noise, t), gold('step/loss'))
    loss = d.p_losses(x_0, t, noise)
    loss.backward()
    near(loss, gold('step/loss'))
    grads = [p.grad for _, p in sorted(d.model.named_parameters())]
    near(torch.stack([g.norm() for g in grads]), gold('step/grads'))
    near(torch.stack([g.sum() for g in grads]), gold('step/grad_sums'))


def test_defaults():
    "Of the starter code, so that its readers find what they know"
    def of(f): return {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
    mults = (1, 2, 4, 8)
    assert of(Unet) == dict(dim=16, init_dim=None, out_dim=None, dim_mults=mults, channels=3, resnet_block_groups=8,
                            attention='all')
    assert sum(p.numel() for p in Unet().parameters()) == 2465827
    assert [Unet(8, dim_mults=mults[:n]).downsampling for n in (1, 2, 3)] == [1, 2, 4]
    assert of(Diffusion) == dict(channels=3, timesteps=1000, schedule='cosine')
    assert of(Diffusion.sample)['batch_size'] == of(DDPMLearner.sample)['n'] == 16
    assert of(Block)['groups'] == of(ResBlock)['groups'] == 8 and of(cosine_schedule) == dict(s=.008)
    assert of(ema_average) == of(EMACallback) == dict(decay=.9995) and of(DDPMCallback) == dict(seed=2024)
    assert of(DDPMLearner.show_results)['max_n'] == 6
    want = dict(dim=16, dim_mults=mults, timesteps=50, lr=1e-3, accumulate=2, ema=.9995, schedule='cosine')
    assert {k: of(ddpm_learner)[k] for k in want} == want
    config = dict(dim=8, init_dim=8, out_dim=3, dim_mults=(1,), channels=3, resnet_block_groups=8, attention='all')
    assert Unet(8, dim_mults=[1]).config == config
    small = make.NETS['deep']
    assert Unet(**small).config == small and Unet(**small).channels == 1
    assert Block(8, 16).norm.num_groups == ResBlock(8, 8, 32).block2.norm.num_groups == 8
    assert all(isinstance(o(8, 8, 32, 8, True).attn, LinearAttention) for o in (Down, Up))
    d = Diffusion(Stub(), image_size=4)
    assert d.num_timesteps == len(d.schedule) == 1000
    assert d.sample(sampler=lambda *o: [(0, o[2], 0)]).shape == (16, 3, 4, 4)


# --- Algorithm 1

class Stub(nn.Module):
    "A network that guesses no noise; it remembers what it is told, and which way the loss pulls each number"
    def __init__(self):
        super().__init__()
        self.shift, self.told, self.pulls = nn.Parameter(torch.zeros(())), [], []
    def forward(self, x, t):
        self.told.append((x.detach(), t.detach()))
        y = torch.zeros_like(x) + self.shift
        if y.requires_grad: y.register_hook(lambda g: self.pulls.append(-g.sign()))
        return y


class Record(Callback):
    "Remembers each batch of images before anything is made of it, and `shift` before training and after each step"
    order = -1000
    def __init__(self): self.images, self.held, self.shifts, self.losses = [], [], [], []
    def before_batch(self):
        (self.images if self.training else self.held).append(self.x.as_subclass(torch.Tensor).clone())
    def before_fit(self):
        self.net = next(m for m in self.learn.model.modules() if isinstance(m, Stub))
        self.shifts.append(float(self.net.shift))
    def after_loss(self):
        if self.training: self.losses.append(float(self.learn.loss.detach()))
    def after_step(self): self.shifts.append(float(self.net.shift))


def recovered(x_0, x_t, t, T):
    "The noise in `x_t`"
    ab = torch.tensor(np.cumprod(make.cosine(T)), dtype=torch.float32)[t][:, None, None, None]
    return (x_t - ab.sqrt()*x_0)/(1 - ab).sqrt()


def check_algorithm_1(batches, T):
    "`batches` of (x_0, x_t, t, pulls): are the times uniform, one an image, and is one noise in both places?"
    times = torch.stack([t for _, _, t, _ in batches])
    n = times.numel()
    assert times.dtype == torch.int64 and times.min() == 0 and times.max() == T - 1
    counts = torch.bincount(times.flatten(), minlength=T)
    assert ((counts - n/T)**2/(n/T)).sum() < T + 6*(2*T)**.5 # χ² of T-1 degrees of freedom
    same = (times[:, 1:] == times[:, :-1]).float()
    assert abs(same.mean() - 1/T) < 5*(1/T/same.numel())**.5 # each image its own
    noise = torch.stack([recovered(x_0, x_t, t, T) for x_0, x_t, t, _ in batches])
    assert abs(noise.mean()) < 5/noise.numel()**.5 and abs(noise.std() - 1) < 5/noise.numel()**.5
    for axis in (0, 1): # batches, images: none has the noise of its neighbour
        a, b = noise.narrow(axis, 1, noise.shape[axis] - 1), noise.narrow(axis, 0, noise.shape[axis] - 1)
        assert abs((a*b).mean()) < 6/a.numel()**.5
    clear = noise.abs() > 1e-2 # rounding
    assert (torch.stack([p for *_, p in batches]) == noise.sign())[clear].all()
    return noise


def test_forward_is_algorithm_1():
    torch.manual_seed(0)
    T, net = 10, Stub()
    d = Diffusion(net, image_size=4, channels=1, timesteps=T)
    x_0 = torch.linspace(-1, 1, 16)[:, None, None, None].expand(-1, 1, 4, 4)
    losses = [d(x_0) for _ in range(150)]
    torch.stack(losses).sum().backward()
    pulls = net.pulls[::-1] # the last one is asked first
    if not torch.equal(pulls[0], recovered(x_0, *net.told[0], T).sign()): pulls = net.pulls
    noise = check_algorithm_1([(x_0, x, t, p) for (x, t), p in zip(net.told, pulls)], T)
    near(torch.stack(losses), noise.abs().flatten(1).mean(1), 1e-5)


def test_given_noise_is_the_noise():
    net = Stub()
    d, x_0 = Diffusion(net, image_size=4, channels=1, timesteps=10), torch.linspace(-1, 1, 64).reshape(4, 1, 4, 4)
    z = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    near(d(x_0, z), z.abs().mean())
    near(recovered(x_0, *net.told[-1], 10), z, 1e-4)
    asked = []
    def noise_like(shape, device=None):
        asked.append((shape, device))
        return z
    d.noise_like = noise_like
    t = torch.tensor([0, 3, 5, 9])
    ab = torch.tensor(np.cumprod(make.cosine(10)), dtype=torch.float32)[t][:, None, None, None]
    near(d.q_sample(x_0, t), ab.sqrt()*x_0 + (1 - ab).sqrt()*z)
    near(d.p_losses(x_0, t), z.abs().mean())
    assert d.draw(x_0)[1] is z and d.draw(x_0, 2*z)[1][0, 0, 0, 0] == 2*z[0, 0, 0, 0]
    d.p_sample(x_0, t, 3)
    d.p_sample_loop(x_0)
    assert asked == [(x_0.shape, x_0.device)]*(4 + 9)
    with pytest.raises(ValueError, match=re.escape('must be of shape (1, 4, 4), but are of (3, 4, 4)')):
        d(torch.zeros(2, 3, 4, 4))


def test_everything_stays_on_its_device():
    "Where tensors have no numbers, those of two devices still do not mix"
    d, x_0 = fake_diffusion(T=5).to('meta'), torch.zeros(3, 2, 4, 4, device='meta')
    t, noise = d.draw(x_0)
    res = [t, noise, d(x_0), d.p_losses(x_0, t), d.q_sample(x_0, t), d.denoise(x_0, t), d.p_sample(x_0, t, 3),
           d.sample(3), d.sample(3, sampler=ddim, eta=1., steps=3), bits_per_dim(d.denoise, d.schedule, x_0),
           d.noise_like((2, 2)), q_chain(d.schedule, x_0, 3), time_embedding(t, 8)]
    assert all(o.device.type == 'meta' for o in res) and d.device.type == 'meta'
    assert d.noise_like((2,), 'cpu').device.type == 'cpu'
    seen = []
    def denoise(x, t):
        seen.append(t.device.type)
        return x
    for f in (ancestral, ddim): list(f(denoise, d.schedule, x_0))
    bound_terms(denoise, d.schedule, x_0)
    assert set(seen) == {'meta'}


def flat_pictures(path, n=32, size=17):
    "Pictures of one colour each, in AFHQ's layout, with eight to validate on"
    for i in range(n + 8):
        f = path/('train' if i < n else 'val')/'cat'/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (size, size), (6*i, 255 - 6*i, 3*i)).save(f)
    return path


def learner(path, T=5, size=16, batch=16, epochs=1, **kwargs):
    "A learner of a `Stub`, and what it records"
    rec = Record()
    dls = image_dls(path, size, batch, epoch_size=batch*epochs, device='cpu')
    d = Diffusion(Stub(), image_size=size, timesteps=T)
    return ddpm_learner(dls, diffusion=d, cbs=[rec], **kwargs), rec


def fixed(): return torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(2024))[:8] # held-out noise


def test_a_run_is_algorithm_1(tmp_path):
    torch.manual_seed(1)
    T = 5
    learn, rec = learner(flat_pictures(tmp_path), T, epochs=150, ema=None, accumulate=1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=1e-12) # the guess stays at zero
    told = rec.net.told[:150]
    assert len(rec.images) == len(rec.net.pulls) == 150
    noise = check_algorithm_1([(x_0, x, t, p) for x_0, (x, t), p in zip(rec.images, told, rec.net.pulls)], T)
    near(rec.losses, noise.abs().flatten(1).mean(1))
    held, first = rec.held[0], rec.net.told[150] # one fixed time and noise for each image held out
    assert first[1].tolist() == [i % T for i in range(8)]
    near(recovered(held, *first, T), fixed(), 1e-4)
    near(learn.recorder.values[-1][1], fixed().abs().mean())


@pytest.mark.parametrize('accumulate', [1, 2, 3])
def test_accumulated_batches_make_one_step(tmp_path, accumulate):
    torch.manual_seed(2)
    T = 5
    learn, rec = learner(flat_pictures(tmp_path), T, epochs=6, ema=None, accumulate=accumulate, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.5)
    noise = [recovered(x_0, *told, T) for x_0, told in zip(rec.images, rec.net.told)]
    shift, want = 0., [0.]
    for i in range(0, 6, accumulate):
        shift -= .5*float(np.mean([(shift - o).sign().mean() for o in noise[i:i+accumulate]]))
        want.append(shift)
    near(rec.shifts, want)
    assert learn.ddpm.steps == 6//accumulate


def test_training_takes_adam_steps(tmp_path):
    torch.manual_seed(3)
    learn, rec = learner(flat_pictures(tmp_path), epochs=4, ema=None, accumulate=1, lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    noise = [recovered(x_0, *told, 5) for x_0, told in zip(rec.images, rec.net.told)]
    shift, want, m, v = 0., [0.], 0., 0.
    for i, o in enumerate(noise, 1):
        g = float((shift - o).sign().mean())
        m, v = .9*m + .1*g, .999*v + .001*g*g
        shift -= 1e-3*m/(1 - .9**i)/(math.sqrt(v/(1 - .999**i)) + 1e-8)
        want.append(shift)
    near(np.array(rec.shifts)*1e3, np.array(want)*1e3, 1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(rec.images) == 12 and learn.ddpm.steps == 12 # all epochs of the next call, too


def test_noise_for_more_held_out_images():
    x, cb = torch.zeros(700, 1, 4, 4), DDPMCallback()
    cb.learn = SimpleNamespace(iter=0, diffusion=SimpleNamespace(num_timesteps=5))
    for _ in range(2):
        parts = []
        for cb.learn.iter, o in enumerate(x.split(250)): parts.append(cb.held_out(o))
        _, noise, t = (torch.cat(o) for o in zip(*parts))
        assert t.tolist() == [i % 5 for i in range(700)]
        near(noise, torch.randn(700, 1, 4, 4, generator=torch.Generator().manual_seed(2024)), 1e-6)


@pytest.mark.parametrize('decay', [.3, .9995])
def test_average_of_the_weights(tmp_path, decay):
    torch.manual_seed(4)
    learn, rec = learner(flat_pictures(tmp_path), epochs=25, ema=decay, accumulate=1, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.5)
    avg = rec.shifts[1] # begins with the weights after the first step
    for n, w in enumerate(rec.shifts[2:], 1):
        k = min(decay, (1 + n)/(10 + n))
        avg = k*avg + (1 - k)*w
    near(learn.averaged.model.shift, avg, 1e-6)
    assert avg != rec.shifts[-1]
    for n, w in (0, 1.), (1, max(9/11, 1 - decay)): # where nobody else looks at the count, the first step is whole
        mean = [torch.zeros(2)]
        learn.ema.avg.multi_avg_fn(mean, [torch.ones(2)], torch.tensor(n))
        near(mean[0], torch.full((2,), w), 1e-6)
    assert len(learn.averaged.model.told) and len(rec.net.told) == 25 # validation asks the average
    near(learn.recorder.values[-1][1], (fixed() - avg).abs().mean())


class Fake(nn.Module):
    "A network that guesses by `make.fake`"
    def __init__(self):
        super().__init__()
        self.one, self.told = nn.Parameter(torch.ones(())), []
    def forward(self, x, t):
        self.told.append((x.detach(), t))
        return self.one*make.fake(x, t[:, None, None, None].to(x.dtype), torch.tanh, torch.cos)


def test_a_learner_makes_its_model(tmp_path):
    dls = image_dls(flat_pictures(tmp_path), 16, 16, device='cpu')
    def seen(learn):
        d, config = learn.diffusion, learn.diffusion.model.config
        assert d is learn.model and d.image_size == 16 and d.num_timesteps == len(d.schedule)
        assert d.channels == config['channels'] == 3
        ema, n = getattr(learn, 'ema', None), getattr(learn, 'gradient_accumulation', None)
        return dict({k: config[k] for k in ('dim', 'dim_mults', 'attention')}, timesteps=d.num_timesteps, lr=learn.lr,
                    accumulate=n.n_acc//16 if n else 1, ema=ema and ema.decay, schedule=d.schedule_name)
    want = dict(dim=16, dim_mults=(1, 2, 4, 8), timesteps=50, lr=1e-3, accumulate=2, ema=.9995, schedule='cosine',
                attention='all')
    assert seen(ddpm_learner(dls)) == want
    want = dict(dim=8, dim_mults=(1, 2), timesteps=7, lr=.01, accumulate=1, ema=None, schedule='linear',
                attention='none')
    assert seen(ddpm_learner(dls, **want)) == want
    assert EMACallback().decay == .9995 and not any(
        p.requires_grad for p in fitted(ddpm_learner(dls, 8, (1,), 5)).averaged.parameters())


def fitted(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn


def test_a_repeated_sample_starts_from_its_seed(tmp_path):
    T = 5
    learn, _ = learner(flat_pictures(tmp_path), T, ema=None)
    d = learn.diffusion
    d.model = Fake()
    torch.manual_seed(7)
    x = torch.randn(2, 3, 16, 16)
    zs = [*(torch.randn(2, 3, 16, 16).numpy() for _ in range(T - 1)), 0]
    *_, (want, _) = make.ancestral(make.fake, make.cosine(T), x.numpy(), zs)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for _ in range(2): near(learn.sample(2, seed=7), (want.clip(-1, 1) + 1)/2, 1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert (learn.sample(2, seed=8) - learn.sample(2, seed=7)).abs().max() > .1
    assert (learn.sample(2) - learn.sample(2)).abs().max() > .1


def test_show_results_shows_guesses_of_the_image(tmp_path):
    from matplotlib import pyplot as plt
    T = 5
    learn, _ = learner(flat_pictures(tmp_path), T, ema=None)
    d, noise = learn.diffusion, torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    d.model, d.noise_like = Fake(), lambda shape, device=None: noise[:shape[0]]
    plt.close('all')
    learn.show_results(max_n=5)
    shown = np.stack([ax.images[0].get_array() for ax in plt.gcf().axes if ax.images])
    assert plt.gcf().axes[0].get_subplotspec().get_gridspec().get_geometry() == (3, 5)
    shown = shown.reshape(3, 5, 16, 16, 3).transpose(0, 1, 4, 2, 3)
    plt.close('all')
    x_0 = next(iter(learn.dls.valid))[0].as_subclass(torch.Tensor)[:5].numpy()
    a = make.cosine(T)
    ab = np.cumprod(a)[:, None, None, None] # times 0 to 4, one an image
    x_t = np.sqrt(ab)*x_0 + np.sqrt(1 - ab)*noise.numpy()
    guess = np.concatenate([make.guess(a, x_t[i:i+1], i, make.fake(x_t[i:i+1], i), True) for i in range(5)])
    near(shown, ((np.stack([x_0, x_t, guess]) + 1)/2).clip(0, 1), 1e-4)


# --- The images that training sees

def placed_pictures(path, n=12, size=35):
    "Pictures whose pixels say where they are: red the row, green the column, blue the picture"
    at = np.arange(size)*7
    for i in range(n + 4):
        im = np.stack([at[:, None] + 0*at, at + 0*at[:, None], np.full((size, size), i)], -1).astype('u1')
        f = path/('train' if i < n else 'val')/'cat'/f'{i:02}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(f)
    return path


def places(x):
    "For each image of a batch in [-1, 1]: top, left, mirrored, which"
    x = (x.as_subclass(torch.Tensor) + 1)*127.5
    assert (x - x.round()).abs().max() < 1e-3 # whole levels from 0 to 255
    x = x.round().int()
    top, left, flip = x[:, 0, 0, 0]//7, x[:, 1, 0].min(1).values//7, x[:, 1, 0, 0] > x[:, 1, 0, -1]
    rows = (top[:, None] + torch.arange(x.shape[2]))*7
    cols = (left[:, None] + torch.arange(x.shape[3]))*7
    assert (x[:, 0] == rows[:, :, None]).all()
    assert (x[:, 1] == torch.where(flip[:, None], cols.flip(1), cols)[:, None]).all()
    return torch.stack([top, left, flip.int(), x[:, 2, 0, 0]], 1)


def test_training_view(tmp_path):
    torch.manual_seed(5)
    dls = image_dls(placed_pictures(tmp_path), 32, 12, device='cpu')
    epochs = [places(b[0]) for _ in range(30) for b in dls.train]
    assert len(epochs) == 30
    assert all(sorted(o[:, 3].tolist()) == list(range(12)) for o in epochs) # each picture once in an epoch
    assert len({tuple(o[:, 3].tolist()) for o in epochs}) > 25 # in another order each time
    p = torch.cat(epochs)
    counts = torch.bincount(p[:, 0]*4 + p[:, 1])
    n = len(p)/16
    assert len(counts) == 16 and p[:, :2].max() == 3 # 4 × 4 places
    assert ((counts - n)**2/n).sum() < 16 + 6*32**.5
    assert abs(p[:, 2].float().mean() - .5) < 4*.5/len(p)**.5
    assert np.mean([len(set(map(tuple, o[:, :2].tolist()))) for o in epochs]) > 6 # within a batch
    assert abs(np.corrcoef(p[:, 2], p[:, 1])[0, 1]) < .3 and abs(np.corrcoef(p[:, 0], p[:, 1])[0, 1]) < .3


def test_validation_view(tmp_path):
    dls = image_dls(placed_pictures(tmp_path), 32, 4, device='cpu')
    for _ in range(3):
        got = torch.cat([places(b[0]) for b in dls.valid])
        assert got.tolist() == [[1, 1, 0, i] for i in range(12, 16)]


@pytest.mark.parametrize('size,room', [(16, 17), (20, 22), (32, 35), (8, 8)])
def test_room_for_the_crop(tmp_path, size, room):
    r = np.random.RandomState(size)
    for i, split in enumerate(['train', 'val']):
        im = r.randint(0, 256, (2*room, 3*room, 3)).astype('u1')
        f = tmp_path/split/'cat'/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(f)
    dls = image_dls(tmp_path, size, 1, device='cpu')
    got, o = next(iter(dls.valid))[0][0], (room - size)//2
    want = make.shrink(im, room)[o:o+size, o:o+size].transpose(2, 0, 1)
    near(got.as_subclass(torch.Tensor), want/127.5 - 1, 1.01/127.5)


@pytest.mark.parametrize('name', ['wide', 'tall'])
def test_pictures_are_shrunk(name):
    f = io.BytesIO()
    Image.fromarray(GOLD[f'pictures/{name}']).save(f, 'png')
    near(decode(f.getvalue(), 17)/255, GOLD[f'pictures/{name}/small'].transpose(2, 0, 1)/255, 1.01/255)


# --- Schedules, Algorithm 2 and DDIM

@pytest.mark.parametrize('name', ['cosine', 'linear', 'sigmoid'])
def test_schedules(name):
    a = GOLD[f'alphas/{name}']
    near(SCHEDULES[name](50), a, 1e-12)
    s, x, ab = Schedule(torch.tensor(a), dtype=torch.float64), GOLD['chains/x'], np.cumprod(a)
    near(s.alphas_cumprod, ab, 1e-12)
    z, t = GOLD['chains/zs'], torch.tensor([0, 20, 49])
    at = ab[t][:, None, None, None]
    near(q_sample(s, torch.tensor(x), t, torch.tensor(z[0])), np.sqrt(at)*x + np.sqrt(1 - at)*z[0], 1e-12)
    at = a[t][:, None, None, None]
    near(q_step(s, torch.tensor(x), t, torch.tensor(z[0])), np.sqrt(at)*x + np.sqrt(1 - at)*z[0], 1e-12)
    want = x
    for i in range(8): want = np.sqrt(a[i])*want + np.sqrt(1 - a[i])*z[i]
    near(q_chain(s, torch.tensor(x), 8, in_order(torch.tensor(z))), want, 1e-12)


def test_coefficients():
    a = make.cosine(20)
    ab, s = np.cumprod(a), Schedule(torch.tensor(a), dtype=torch.float64)
    prev, x, x_0 = np.array([1., *ab[:-1]]), np.array(.7), np.array(-.4)
    means, variances = zip(*(make.posterior(a, x, x_0, t) for t in range(20)))
    want = dict(
        alphas=a, sqrt_alphas=a**.5, sqrt_one_minus_alphas=(1 - a)**.5, alphas_cumprod=ab, alphas_cumprod_prev=prev,
        sqrt_alphas_cumprod=ab**.5, sqrt_one_minus_alphas_cumprod=(1 - ab)**.5, sqrt_recip_alphas_cumprod=ab**-.5,
        sqrt_recipm1_alphas_cumprod=(1/ab - 1)**.5, posterior_variance=variances, posterior_std=np.sqrt(variances))
    for k, v in want.items(): near(getattr(s, k), v, 1e-12)
    near(s.posterior_mean_coef_xt*x + s.posterior_mean_coef_x0*x_0, means, 1e-12)
    assert set(s.state_dict()) == {*want, 'posterior_mean_coef_xt', 'posterior_mean_coef_x0'}
    assert len(s) == 20 and 'timesteps=20' in repr(s)
    near(snr(torch.tensor(a)), ab/(1 - ab), 1e-12)
    u = np.cos((np.arange(6)/5 + .008)/1.008*np.pi/2)**2
    near(cosine_alphas_cumprod(5), u/u[0], 1e-12)
    near(clipped_alphas(torch.tensor([1., .5, .6, 1e-9])), [.5, 1, .001], 1e-7)
    with pytest.raises(AssertionError, match='int64 time indices, but is float32$'):
        extract(torch.tensor(a), torch.tensor([3.]), (1, 1))
    near(extract(torch.tensor(a), torch.tensor([3, 0]), (2, 1, 4, 4)), a[[3, 0]].reshape(2, 1, 1, 1), 0)


@pytest.mark.parametrize('name,kwargs', [
    ('cosine', {}), ('cosine', dict(s=.1)), ('linear', {}), ('linear', dict(beta_start=.001, beta_end=.01)),
    ('sigmoid', {}), ('sigmoid', dict(start=-1, end=4))])
def test_made_schedules(name, kwargs):
    s = make_schedule(name, 8, **kwargs)
    near(s.alphas, getattr(make, name)(8, *kwargs.values()))
    assert s.alphas.dtype == torch.float32
    near(make_schedule().alphas, make.cosine(50))
    assert linear_schedule(8).min() == .001 # clipped


def eps_of(name, a):
    "The denoiser of a chain's name, for PyTorch"
    abar = torch.tensor(np.cumprod(a))
    def at(t): return t[:, None, None, None]
    if 'fake' in name: return lambda x, t: make.fake(x, at(t).double(), torch.tanh, torch.cos)
    return lambda x, t: make.oracle(at(abar[t]), x)


@pytest.mark.parametrize('name', make.CHAINS)
def test_chains(name):
    f, kwargs, T = make.CHAINS[name]
    a, x, zs = make.cosine(T), gold('chains/x'), gold('chains/zs')
    sampler, asked = dict(ancestral=ancestral, ddim=ddim)[f.__name__], []
    def noise_like(x):
        asked.append(x.shape)
        return zs[len(asked) - 1]
    steps = list(sampler(eps_of(name, a), Schedule(torch.tensor(a), dtype=torch.float64), x, noise_like, **kwargs))
    assert all(o == x.shape for o in asked)
    times = [T - 1 if kwargs.get('start') is None else kwargs['start']]
    while times[-1] and f is make.ancestral: times.append(times[-1] - 1)
    if f is make.ddim: times = [round(o) for o in np.linspace(T - 1, 0, kwargs.get('steps') or T)]
    assert [int(i) for i, *_ in steps] == times
    near(torch.stack([o[1] for o in steps])[:, :1], gold(f'chains/{name}/x'), 3e-5)
    near(torch.stack([o[2] for o in steps])[:, :1], gold(f'chains/{name}/x_0'), 3e-5)
    near(steps[-1][1], gold(f'chains/{name}/last'), 3e-5)
    assert len(asked) == (len(times) - 1 if f is make.ancestral else len(times) if kwargs.get('eta') else 0)


def test_an_oracle_makes_its_images():
    "The exact oracle of Gaussian images: without noise the chain maps x_T to mean + std·x_T, up to the steps' size"
    a, x = make.cosine(100), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    s = Schedule(torch.tensor(a), dtype=torch.float64)
    *_, (_, y, _) = ddim(eps_of('oracle', a), s, x, clamp=False)
    near(y, .2 + .4*x, .04)
    torch.manual_seed(0)
    for f, kwargs in ((ancestral, {}), (ddim, dict(eta=1.)), (ddim, dict(eta=.5, steps=50))):
        *_, (_, y, _) = f(eps_of('oracle', a), s, torch.randn(4, 1, 32, 32, dtype=torch.float64), clamp=False, **kwargs)
        assert abs(y.mean() - .2) < .03 and abs(y.std() - .4) < .03


def fake_diffusion(T=8, size=4, channels=2): return Diffusion(Fake(), image_size=size, channels=channels, timesteps=T)


def given(d, zs):
    "Let `d` take its noise from `zs`"
    it = iter(zs)
    d.noise_like = lambda shape, device=None: next(it).float().reshape(shape)
    return d


@pytest.mark.parametrize('name', [o for o in make.CHAINS if 'fake' in o])
def test_samples_are_the_end_of_the_chain(name):
    f, kwargs, T = make.CHAINS[name]
    d, x, zs = fake_diffusion(T), gold('chains/x').float(), gold('chains/zs')
    want = (GOLD[f'chains/{name}/last'].clip(-1, 1) + 1)/2
    loop = dict(kwargs, sampler=ancestral if f is make.ancestral else ddim)
    d.train()
    near(given(d, zs).p_sample_loop(x, **loop), want, 1e-4)
    assert d.training and d.model.training
    if 'from' not in name: near(given(d, [x, *zs]).sample(3, **loop), want, 1e-4)
    assert all(len(set(t.tolist())) == 1 for _, t in d.model.told)


def test_one_step_back():
    a, x, z = make.cosine(8), GOLD['chains/x'], GOLD['chains/zs'][0]
    for t in (0, 1, 4, 7):
        x_0 = make.guess(a, x, t, make.fake(x, t), True)
        mean, var = make.posterior(a, x, x_0, t)
        d = given(fake_diffusion(), [torch.tensor(z)])
        near(d.p_sample(torch.tensor(x).float(), torch.full((3,), t), t), mean + (t > 0)*np.sqrt(var)*z, 1e-4)


def test_sampling_draws_from_its_generator():
    d = fake_diffusion(T=6)
    torch.manual_seed(3)
    x, *zs = (torch.randn(2, 2, 4, 4).numpy() for _ in range(6))
    *_, (want, _) = make.ancestral(make.fake, make.cosine(6), x, [*zs, 0])
    torch.manual_seed(3)
    near(d.sample(2), (want.clip(-1, 1) + 1)/2, 1e-4)


def test_steps():
    a, (x, x_0, z) = make.cosine(8), (torch.tensor(o) for o in (GOLD['chains/x'], *GOLD['chains/zs'][:2]))
    s, ab = Schedule(torch.tensor(a), dtype=torch.float64), np.cumprod(a)
    for t, to in ((7, 6), (5, 1), (3, -1), (0, -1)):
        b = ab[to] if to >= 0 else 1.
        eps = (x - np.sqrt(ab[t])*x_0)/np.sqrt(1 - ab[t])
        near(ddim_step(s, x, x_0, t, to), np.sqrt(b)*x_0 + np.sqrt(1 - b)*eps, 1e-9)
        var = .49*(1 - b)/(1 - ab[t])*(1 - ab[t]/b)
        near(ddim_step(s, x, x_0, t, to, z, .7), np.sqrt(b)*x_0 + np.sqrt(1 - b - var)*eps + np.sqrt(var)*z, 1e-9)
    assert ddim_times(50, 5) == [49, 37, 24, 12, 0] and ddim_times(50, 2) == [49, 0] and ddim_times(50, 1) == [49]
    assert ddim_times(7) == ddim_times(7, 7) == [6, 5, 4, 3, 2, 1, 0]
    t, fake = torch.full((3,), 5), eps_of('fake', a)
    want = make.guess(a, x.numpy(), 5, make.fake(x.numpy(), 5), True)
    mean, guess = step_back(fake, s, x, t)
    near(guess, want, 3e-5)
    near(mean, make.posterior(a, x.numpy(), want, 5)[0], 3e-5)
    near(p_mean_std(s, x, t, fake(x, t))[2], want, 3e-5)


# --- The bound

@pytest.mark.parametrize('clamp', [True, False])
def test_bound(clamp):
    x_0, zs, off = (gold(f'bound/{k}') for k in ('x_0', 'zs', 'off'))
    a = torch.tensor(make.cosine(6))
    ab, sched = a.cumprod(0), Schedule(a, dtype=torch.float64)
    def denoise(x, t):
        at = ab[t][:, None, None, None]
        return (x - at.sqrt()*(x_0 + off))/(1 - at).sqrt()
    near(bound_terms(denoise, sched, x_0, in_order(zs), clamp=clamp), gold(f'bound/terms/{clamp}'), 1e-9)
    near(bits_per_dim(denoise, sched, x_0, noise_like=in_order(zs), clamp=clamp), gold(f'bound/bits/{clamp}'), 1e-9)
    near(bound_terms(denoise, sched, x_0, in_order(zs)), gold('bound/terms/True'), 1e-9)
    real = bound_terms(denoise, sched, x_0, in_order(zs), clamp=clamp, discrete=False)
    near(real, torch.cat([gold(f'bound/real/{clamp}')[:, None], gold(f'bound/terms/{clamp}')[:, 1:]], 1), 1e-9)


def test_weights_of_the_bound():
    a = make.cosine(20)
    w_0, w_noise = loss_weights(Schedule(torch.tensor(a), dtype=torch.float64))
    for t in range(1, 20): # what an error of 1 in x_0 does to the mean, against the variance
        (m, var), (n, _) = (make.posterior(a, 0., x_0, t) for x_0 in (0., 1.))
        near(w_0[t], (n - m)**2/(2*var), 1e-9)
        ab = np.cumprod(a)[t]
        near(w_noise[t], w_0[t]*(1 - ab)/ab, 1e-9) # an error of 1 in the noise is one of that size in x_0
    assert w_0[0] == w_noise[0] == math.inf
    for T in (1, 2, 20):
        s = Schedule(torch.tensor(make.cosine(T)), dtype=torch.float64)
        near(decoder_std(s), s.posterior_std[1] if T > 1 else (1 - s.alphas[0]).sqrt(), 1e-12)


def test_levels_share_all_probability():
    levels = torch.arange(256, dtype=torch.float64)/127.5 - 1
    for mean, std in ((0., .3), (.7, .01), (-1.5, .2), (1., .002)):
        p = discrete_log_prob(levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
        near(p.exp().sum(), 1., 1e-9)
    far = discrete_log_prob(levels, torch.tensor(5., dtype=torch.float64), torch.tensor(.1, dtype=torch.float64))
    assert far.isfinite().all() and (far[:-1].diff() > 0).all()


def test_loading_takes_the_average(tmp_path):
    d, avg = (Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=5) for _ in range(2))
    save_diffusion(d, tmp_path/'model.pt', 3, avg)
    for ema, want in ((True, avg), (False, d)):
        got = load_diffusion(tmp_path/'model.pt', 'cpu', ema=ema)
        assert all(torch.equal(a, b) for a, b in zip(got.model.state_dict().values(), want.model.state_dict().values()))
    near(load_diffusion(tmp_path/'model.pt', 'cpu').model.out.weight, avg.model.out.weight, 0)


# --- Scores

def sets(): return Features(gold('scores/a')), Features(gold('scores/b'))


def test_scores():
    a, b = sets()
    near(frechet_distance(a, b), gold('scores/value'))
    near(frechet_distance(b, a), gold('scores/value'))
    near(frechet_distance(Features(a.x[:3]), b), gold('scores/few'))
    near(kid(a, b), [gold('scores/kid'), gold('scores/kid_se')])
    for k, v in precision_recall(a, b).items(): near(v, gold(f'scores/{k}'), 1e-6)
    for n in (8, 20):
        near(fid_floor(b, n)[0], gold(f'scores/floor/{n}'))
        assert fid_floor(b, n)[1] == n
    near(fid_floor(b, 1000), [gold('scores/floor/20'), 20])
    near(fid_infinity(a, b), gold('scores/infinity'), 1e-4)
    near(fid_infinity(Features(a.x[:12]), b), gold('scores/infinity/few'), 1e-4)
    sums = kernel_sums(a, a), kernel_sums(b, b), kernel_sums(a, b), kernel_sums(b, a)
    for k, v in zip('ab', leave_one_out(*sums)): near(v, gold(f'scores/kid_without/{k}'))


def test_images_reach_the_network_as_clean_fid_has_them():
    seen = []
    def f(x):
        seen.append(x)
        return x.mean((2, 3))
    Network(f, 'some', batch_size=4)(gold('pictures/unit'), 'cpu')
    assert [o.shape for o in seen] == [(4, 3, 299, 299), (2, 3, 299, 299)]
    near(torch.cat(seen)[:, :, ::23, ::23]/255, gold('pictures/large')/255, 1e-4)


def test_report():
    a, b = sets()
    s = compute_fid(a, b, Network(lambda x: x, 'some'), infinity=True)
    companions = ('kid', 'kid_se', 'precision', 'recall', 'density', 'coverage')
    want = {k: float(GOLD[f'scores/{k}']) for k in ('value', *companions, 'infinity')}
    more = dict(floor=float(GOLD['scores/floor/20']), n=25, n_real=41, floor_n=20)
    for k, v in (want | more).items(): near(s[k], v, 1e-4)
    line = 'KID (\\S+) ± (\\S+), precision (\\S+), recall (\\S+), density (\\S+), coverage (\\S+)'
    for v, k in zip(re.search(line, repr(s)).groups(), companions):
        assert abs(float(v) - want[k]) < (.2*abs(want[k]) if 'kid' in k else .0051), k
    first = repr(s).splitlines()[0]
    assert first.startswith('FD (some) ') and '25 images' in first and '41 real' in first
    assert abs(float(re.search(r'floor (\S+)', first)[1]) - float(GOLD['scores/floor/20'])) < .01
    assert abs(float(re.search(r'many images: (\S+)', repr(s))[1]) - want['infinity']) < .01


def test_efficientnet_sees_images_in_its_scale():
    net, seen = EfficientNetFeatures.__new__(EfficientNetFeatures), []
    nn.Module.__init__(net)
    class Inner(nn.Module):
        def extract_features(self, x):
            seen.append(x)
            return x
    net.net = Inner()
    levels = torch.tensor([0., 127., 255.])[:, None, None, None].expand(-1, 3, 299, 299)
    near(net(levels), torch.tensor([-127/128, 0, 1])[:, None].expand(-1, 3))
    assert seen[0].shape == (3, 3, 224, 224)


def test_references_are_kept_by_network(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    path, runs = flat_pictures(tmp_path/'pics'), []
    def network(name, k):
        def f(x):
            runs.append(name)
            return k*x.flatten(2).mean(2)
        return Network(f, name)
    one, two = network('one', 1.), network('two', 2.)
    a, b = reference(path, one, 16, device='cpu'), reference(path, two, 16, device='cpu')
    colours = torch.tensor([[6.*i, 255 - 6*i, 3*i] for i in range(32)])
    near(a.x, colours, 1e-4)
    near(b.x, 2*colours, 1e-4)
    n = len(runs)
    near(reference(path, one, 16, device='cpu').x, colours, 1e-4)
    near(reference(path, two, 16, device='cpu').x, 2*colours, 1e-4)
    assert len(runs) == n # from the cache


def test_a_run_is_scored(tmp_path):
    "Each row of `fid.csv` is the report of the seed's samples"
    torch.manual_seed(6)
    net = Network(lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), 'some', '')
    r = np.random.RandomState(0)
    real = Features(r.uniform(0, 255, (20, 6)).astype('f'))
    learn, _ = learner(flat_pictures(tmp_path/'pics'), 5, ema=None)
    cb = FIDCallback(real, net, tmp_path, n=8, seed=3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=1e-3, cbs=cb)
    want = compute_fid(learn.sample(8, seed=3), real, net, device='cpu')
    with (tmp_path/'fid.csv').open() as f: rows = list(csv.DictReader(f))
    assert len(rows) == 1
    for k in ('value', 'floor', 'kid', 'kid_se', 'precision', 'recall', 'density', 'coverage', 'n', 'n_real'):
        near(float(rows[0][k]), want[k], 1e-4)


# --- Pictures

def test_forward_strip_has_one_noise():
    d, x = fake_diffusion(T=50), gold('chains/x').float().clamp(-1, 1)
    times, zs = [0, 12, 25, 37, 49], torch.randn(9, *x.shape, generator=torch.Generator().manual_seed(0))
    assert part_times(50) == times
    got = forward_strip(given(d, zs), x)
    ab = np.cumprod(make.cosine(50))[times].reshape(5, 1, 1, 1, 1)
    near(got, np.sqrt(ab)*x.numpy() + np.sqrt(1 - ab)*zs[0].numpy())


def test_backward_strip_shows_its_times():
    d, x, r = fake_diffusion(T=50), GOLD['chains/x'], np.random.RandomState(0)
    zs = r.standard_normal((50, *x.shape))
    got = backward_strip(given(d, torch.tensor(zs)), torch.tensor(x).float())
    xs = [x, *(o for o, _ in make.ancestral(make.fake, make.cosine(50), x, zs))] # at times 49, 48, ..., 0 and the image
    near(got, np.stack([x, xs[49 - 37], xs[49 - 25], xs[49 - 12], xs[50]]), 1e-3)
    assert [int(o[1][0]) for o in d.model.told] == list(range(49, -1, -1))


def test_strips_are_shown_as_they_are():
    xs = torch.linspace(-1.2, 1.2, 5*2*3*4).reshape(5, 2, 3, 2, 2)
    fig = show_strip(xs, [f't = {i}' for i in range(5)])
    want = ((xs.clamp(-1, 1) + 1)/2).permute(0, 1, 3, 4, 2)
    axes = [a for a in fig.axes if a.images]
    assert len(axes) == 10
    left = sorted({round(a.get_subplotspec().colspan.start) for a in axes})
    for a in axes:
        at = a.get_subplotspec()
        j, i = left.index(at.colspan.start), at.rowspan.start
        near(a.images[0].get_array(), want[j, i])
        assert a.get_title() == (f't = {j}' if i == 0 else '')


def test_curves():
    r = np.random.RandomState(0)
    loss = r.uniform(.1, 1, 40)
    rows = [(i + 1, v, .5 + i/100 if i % 10 == 9 else None) for i, v in enumerate(loss)]
    lines = plot_loss(rows, 8).axes[0].lines
    near(lines[0].get_xydata(), np.stack([np.arange(1, 41), loss], 1))
    near(lines[1].get_ydata(), [loss[max(0, i - 7):i + 1].mean() for i in range(40)])
    near(lines[2].get_xydata(), [(i, .5 + (i - 1)/100) for i in (10, 20, 30, 40)])
    ax = plot_scores([dict(step=i, value=9. - i, floor=.5*i, label='FID', n=8) for i in (1, 2)]).axes[0]
    labels = {o.get_label(): o.get_xydata() for o in ax.lines}
    near(labels['samples'], [(1, 8.), (2, 7.)])
    near(next(v for k, v in labels.items() if 'floor' in k), [(1, .5), (2, 1.)])


# --- Foundations

def from_notebook(name, *wanted):
    "Names that the cells of a notebook define, without running what is between"
    cells = json.loads((NBS/f'{name}.ipynb').read_text())['cells']
    ns = {'__name__': name}
    for c in cells:
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or 'default_exp' in src or 'nbdev_export' in src: continue
        if re.search(r'^(import|from|def|class) ', src, re.M):
            try: exec(src, ns)
            except (NameError, SyntaxError): pass # a cell that also shows something, or calls the shell
        if all(o in ns for o in wanted): break
    return [ns[o] for o in wanted]


@pytest.mark.parametrize('causal', [True, False])
def test_transformer(causal):
    model = from_notebook('foundations/02_sequences', 'TinyTransformer')[0](6 if causal else 5, 5, 6, causal)
    model.load_state_dict(make.weights({k: v.shape for k, v in model.state_dict().items()}))
    near(model(gold('foundations/ids')), gold(f'foundations/transformer/{causal}'))


def test_painter():
    net = from_notebook('foundations/03_inpainting', 'Painter')[0](1, 8)
    net.load_state_dict(make.weights({k: v.shape for k, v in net.state_dict().items()}))
    near(net(gold('foundations/x'), gold('foundations/m')), gold('foundations/painted'))
