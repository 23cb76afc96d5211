"Training through fastai: its numbers are those of a plain loop, and impossible arguments are refused at the door"
import copy, random

import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.learner import load_learner
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelValidException
from fastai.data.core import DataLoaders, TfmdDL
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from fastai.data.transforms import Normalize
from fastai.vision.augment import Resize
from PIL import Image
from torch import Tensor

from ddpm_nb import learner
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.data import image_dls
from ddpm_nb.kit.processes import random_states, seed_everything, set_random_states
from ddpm_nb.learner import ddpm_learner
from ddpm_nb.sampling import ddim
from ddpm_nb.schedule import cosine_schedule


def tiny(pics, cbs=None, batch_size=8, **kwargs):
    dls = image_dls(pics, image_size=16, batch_size=batch_size, device='cpu')
    return ddpm_learner(dls, **(dict(dim=8, dim_mults=(1, 2), timesteps=10, cbs=cbs) | kwargs))


def fit(learn, n=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kwargs)
    return learn


@pytest.fixture
def learn(pics):
    seed_everything(1)
    return tiny(pics)


class Watch(Callback):
    "What the model is given, and the losses"
    order = 99
    def before_fit(self): self.losses, self.given, self.images = [], [], []
    def before_batch(self): self.given.append(tuple(o.clone() for o in self.xb))
    def after_loss(self): self.losses.append(self.learn.loss.item())


# Numbers

@pytest.mark.parametrize('accumulate, ema', [(1, None), (2, .25), (3, .9995)])
def test_a_plain_loop_takes_the_same_steps(pics, accumulate, ema):
    "Algorithm 1 written out, with PyTorch's Adam, gradients accumulated, and an average after each step"
    seed_everything(2)
    learn = tiny(pics, Watch(), accumulate=accumulate, ema=ema, lr=2e-3, batch_size=4)
    net, dl = copy.deepcopy(learn.diffusion.model), learn.dls.train
    states, order = random_states(), dl.rng.getstate()
    fit(learn)
    set_random_states(states)
    dl.rng.setstate(order)

    opt, losses, n, ws = torch.optim.Adam(net.parameters(), 2e-3, fused=True), [], 0, list(net.parameters())
    for i, (x,) in enumerate(dl, 1):
        x = x.as_subclass(Tensor)
        t, noise = torch.randint(10, (len(x),)), torch.randn(x.shape)
        x_t = learn.diffusion.q_sample(x, t, noise) # Adam would magnify other rounding
        loss = torch.nn.functional.l1_loss(net(x_t, t), noise)
        (loss/accumulate).backward()
        losses.append(loss.item())
        if i % accumulate: continue
        opt.step()
        opt.zero_grad()
        d = 0 if n == 0 or ema is None else min(ema, (1 + n)/(10 + n)) # the first step's weights begin the average
        mean = [p.detach().clone() if d == 0 else d*m + (1 - d)*p.detach() for m,p in zip(mean if n else ws, ws)]
        n += 1
    assert learn.ddpm.steps == n == len(dl)//accumulate
    assert learn.watch.losses[:len(dl)] == pytest.approx(losses, abs=1e-6)
    for mine, theirs in ((learn.diffusion, ws), (learn.averaged, mean)):
        for p,w in zip(mine.model.parameters(), theirs): torch.testing.assert_close(p, w, atol=1e-6, rtol=0)


def test_a_batch_is_the_loaders_images_and_nothing_else(learn):
    "Training gets whole images in [-1, 1]; `forward` draws the rest"
    learn.add_cb(Watch())
    order, states = learn.dls.train.rng.getstate(), random_states()
    fit(learn)
    learn.dls.train.rng.setstate(order)
    set_random_states(states)
    first = next(iter(learn.dls.train))[0].as_subclass(Tensor)
    assert len(learn.watch.given[0]) == 1 and learn.watch.given[0][0].equal(first)
    assert first.min() < -.5 and first.max() > .5


def test_validation_is_the_same_every_time(pics):
    "Image i has time i mod T and noise of its own, and the loss is the average's"
    seed_everything(3)
    learn = tiny(pics, Watch(), batch_size=2) # four held-out images at a time
    fit(learn, 2)
    given = [o for o in learn.watch.given if len(o) == 3]
    half = len(given)//2
    for a,b in zip(given[:half], given[half:]): assert all(x.equal(y) for x,y in zip(a, b))
    x, noise, t = (torch.cat(o) for o in zip(*given[:half]))
    assert t.tolist() == [i % 10 for i in range(len(x))] and len(x) == len(learn.dls.valid_ds)
    assert abs(noise.mean()) < .05 and abs(noise.std() - 1) < .05
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < .2 # no two alike
    with torch.no_grad(): by_hand = learn.averaged.p_losses(x, t, noise).item()
    assert learn.recorder.values[-1][1] == pytest.approx(by_hand, abs=1e-6)


# The average's place

@pytest.mark.parametrize('error', [CancelValidException, CancelEpochException, CancelFitException, ValueError,
                                   KeyboardInterrupt])
def test_the_average_leaves_however_validation_ends(learn, error):
    class Break(Callback):
        order, seen = 5, 0
        def before_batch(self):
            if self.training or self.seen: return
            self.seen += 1
            assert self.learn.model is self.learn.ema.avg.module
            raise error('stop')
    learn.add_cb(Break())
    try: fit(learn)
    except (ValueError, KeyboardInterrupt): pass # fastai calls nobody after these
    assert learn.model is learn.diffusion
    trained = [p for k,p in learn.diffusion.named_parameters() if 'conv.bias' not in k] # which a normalisation removes
    before = [p.detach().clone() for p in trained]
    fit(learn)
    assert learn.model is learn.diffusion
    assert all(not a.equal(b) for a,b in zip(before, trained)) # not the average


def test_without_an_average(pics):
    learn = fit(tiny(pics, ema=None))
    assert learn.averaged is learn.diffusion is learn.model and not hasattr(learn, 'ema')


# Samples

def test_a_seed_decides_the_samples_and_disturbs_nothing(learn):
    fit(learn)
    states, python = random_states(), (random.getstate(), np.random.get_state()[1].tolist())
    a, b = learn.sample(3, seed=5), learn.sample(3, seed=5, sampler=ddim, steps=4)
    assert torch.get_rng_state().equal(states['torch'])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == python
    torch.manual_seed(5)
    noise = torch.randn(3, 3, 16, 16)
    by_hand = learn.averaged.p_sample_loop(noise, ddim, steps=4)
    assert (b - by_hand).abs().max() < .05 # bfloat16, where the CPU has it
    assert learn.sample(3, seed=5).equal(a) and not learn.sample(3, seed=6).equal(a)
    assert not learn.sample(3).equal(learn.sample(3))


def test_samples_are_the_averages(learn):
    fit(learn)
    with torch.no_grad(): [p.zero_() for p in learn.averaged.parameters()] # a network that says zero
    torch.manual_seed(1)
    x = torch.randn(2, 3, 16, 16)
    x_0 = (x/cosine_schedule(10).prod().sqrt()).clamp(-1, 1)
    torch.testing.assert_close(learn.sample(2, seed=1, sampler=ddim, steps=1), ((x_0 + 1)/2).float(), atol=1e-5, rtol=0)
    assert (learn.diffusion.p_sample_loop(x, ddim, steps=1) - (x_0 + 1)/2).abs().max() > .1


def test_show_results_shows_the_guess_of_the_image(learn, monkeypatch):
    fit(learn)
    shown = []
    monkeypatch.setattr(learner, 'show_images', lambda images, **kw: shown.append((images, kw)))
    noise = torch.randn(4, 3, 16, 16)
    monkeypatch.setattr(type(learn.diffusion), 'noise_like', lambda self, shape, device=None: noise)
    learn.show_results(max_n=4)
    images, kw = shown[0]
    assert (len(images), kw['nrows'], kw['ncols']) == (12, 3, 4)
    x = learn.dls.valid.one_batch()[0].as_subclass(Tensor)[:4]
    t, abar = torch.tensor([0, 3, 6, 9]), cosine_schedule(10).cumprod(0).float()
    a = abar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt()*x + (1 - a).sqrt()*noise
    guess = (x_t - (1 - a).sqrt()*learn.averaged.denoise(x_t, t))/a.sqrt()
    for o,row in zip((x, x_t, guess), (images[:4], images[4:8], images[8:])):
        torch.testing.assert_close(torch.stack(row), ((o + 1)/2).clamp(0, 1), atol=1e-4, rtol=0)


# The door

@pytest.mark.parametrize('kwargs, says', [
    (dict(lr=0), 'learning_rate must be a number above 0, but is 0'),
    (dict(accumulate=0), 'accumulate must be a whole number of at least 1, but is 0'),
    (dict(ema=1), 'ema must be a number of at least 0 and below 1, but is 1'),
    (dict(nonfinite='hope'), "nonfinite must be stop or skip, but is 'hope'"),
    (dict(dim=12), 'dim must be'), (dict(dim=0), 'dim must be'), (dict(timesteps=0), 'timesteps must be'),
    (dict(dim_mults=(1, 2, 4, 8, 16, 32)), 'image_size must be a multiple of 32'),
    (dict(schedule='wiggly'), 'schedule must be'), (dict(attention='some'), 'attention must be'),
], ids=lambda o: '-'.join(o) if isinstance(o, dict) else '')
def test_impossible_arguments(pics, kwargs, says):
    with pytest.raises(BadInput) as e: tiny(pics, **kwargs)
    assert str(e.value).startswith(says)


def test_a_model_for_other_images(pics, learn):
    learn.diffusion.image_size = 24
    with pytest.raises(ValueError, match=r'images must be of shape \(3, 24, 24\)'):
        fit(tiny(pics, diffusion=learn.diffusion))


@pytest.mark.parametrize('c, h, w', [(3, 16, 24), (1, 24, 16), (1, 16, 16)])
def test_a_model_has_the_shape_of_the_loaders_images(c, h, w):
    x = torch.rand(24, c, h, w)*2 - 1
    dls = DataLoaders(*[TfmdDL([(o,) for o in x], bs=8, num_workers=0) for _ in range(2)], device='cpu')
    learn = fit(ddpm_learner(dls, dim=8, dim_mults=(1, 2), timesteps=5))
    assert learn.diffusion.image_size == (h if h == w else (h, w)) and learn.sample(2).shape == (2, c, h, w)
    learn.show_results(max_n=3)
    axes = plt.gcf().axes
    assert len(axes) == 9 and all(ax.images[0].get_array().shape == (h, w, 3) for ax in axes)
    plt.close('all')


def photos(x, bs=8, kind=torch.utils.data.DataLoader, **kwargs):
    return DataLoaders(*[kind(list(x), bs, **kwargs) for _ in range(2)])

x_0 = torch.rand(24, 3, 16, 16)*2 - 1

@pytest.mark.parametrize('x, says', [
    (x_0/2 + .5, r'from \S+ to 1\.'), (x_0*127.5 + 127.5, 'to 25[45]'), ((x_0*127.5 + 127.5).byte(), 'to 25[45]'),
    (x_0*2.5, 'from -2.5 to 2.5'), (x_0*.75 + .75, 'to 1.5'), (x_0 - .2, 'from -1.2'),
    (torch.zeros_like(x_0), 'from 0 to 0')])
@pytest.mark.parametrize('kind', [torch.utils.data.DataLoader, TfmdDL])
def test_images_in_another_range_are_refused(x, says, kind):
    kw = {} if kind is not TfmdDL else dict(num_workers=0)
    match = rf'^dls must give images in \[-1, 1\], but they are .*{says}.*image_dls.*Normalize'
    with pytest.raises(BadInput, match=match):
        ddpm_learner(photos([(o,) for o in x], kind=kind, **kw), 8, (1, 2), 5)


def test_bright_and_dark_pictures_are_no_other_range(tmp_path):
    for i in range(10): Image.new('RGB', (16, 16), 'white').save(tmp_path/f'{i}.png')
    ddpm_learner(image_dls(tmp_path, 16, 4, device='cpu'), 8, (1, 2), 5)
    ddpm_learner(photos(x_0/3 - .6), 8, (1, 2), 5)
    ddpm_learner(photos(x_0*1.0001), 8, (1, 2), 5) # rounding


def test_fastais_own_loaders_with_the_transform_that_is_asked_for(pics):
    kw = dict(valid_pct=.2, bs=8, item_tfms=Resize(16), num_workers=0, device='cpu')
    with pytest.raises(BadInput, match=r'must give images in \[-1, 1\], but they are from 0\.\d* to'):
        ddpm_learner(ImageDataLoaders.from_folder(pics, **kw), 8, (1, 2), 5)
    with pytest.raises(BadInput, match='must give images in'):
        ddpm_learner(ImageDataLoaders.from_folder(pics, batch_tfms=Normalize.from_stats(*imagenet_stats), **kw))
    dls = ImageDataLoaders.from_folder(pics, batch_tfms=Normalize.from_stats([.5]*3, [.5]*3), **kw)
    assert fit(ddpm_learner(dls, 8, (1, 2), 5)).sample(2).shape == (2, 3, 16, 16)


class Watched(Callback):
    "What the model is given in training and in validation"
    order = 99
    def before_fit(self): self.given = {True: [], False: []}
    def before_batch(self): self.given[self.training].append(self.xb[0].clone())


@pytest.mark.parametrize('make', [lambda o: o, lambda o: (o,), lambda o: (o, 7), lambda o: [o, 'a label'],
                                  lambda o: (o.double(), 1)], ids=['tensor', 'tuple', 'labels', 'list', 'float64'])
def test_pytorchs_loaders(make):
    dls = photos([make(o) for o in x_0])
    learn = ddpm_learner(dls, 8, (1, 2), 10, cbs=Watched())
    fit(learn)
    assert learn.ddpm.steps == 1 and learn.dls is not dls # two batches a step
    for training in (True, False): assert torch.equal(torch.cat(learn.watched.given[training]), x_0)
    mark = learn.recorder.values[-1][1]
    with learn.no_bar(): assert learn.validate()[0] == pytest.approx(mark, abs=1e-6)
    learn.show_results(max_n=2)
    assert len(plt.gcf().axes) == 6
    plt.close('all')
    assert isinstance(dls.train, torch.utils.data.DataLoader) and ddpm_learner(dls, 8, (1, 2), 10).dls.train.bs == 8


def test_another_loader_of_pytorch_is_the_one_that_counts(tmp_path):
    dls = photos([(o, 0) for o in x_0])
    learn = ddpm_learner(dls, 8, (1, 2), 10, path=tmp_path)
    other = torch.utils.data.DataLoader(x_0[:4], 2)
    test = learn.dls.test_dl(other)
    assert torch.equal(torch.cat([o[0] for o in test]), x_0[:4]) and test.bs == 2
    with learn.no_bar(): assert learn.validate(dl=test)[0] != learn.validate()[0]
    with pytest.raises(BadInput, match='bs is 8: a loader of PyTorch keeps'): learn.dls.valid.new(bs=4)
    learn.export()
    alone = load_learner(tmp_path/'export.pkl')
    assert len(alone.dls.train.dataset) == 0 and alone.sample(1).shape == (1, *x_0.shape[1:])


def test_a_list_of_files_is_no_test_set(pics):
    with pytest.raises(BadInput, match='images must be Images.* but are a list'):
        tiny(pics).dls.test_dl(['a.jpg'])


@pytest.mark.parametrize('n, kwargs', [(20, {}), (20, dict(drop_last=True)), (24, dict(shuffle=True))])
def test_pytorchs_loaders_shuffle_and_drop_as_they_do(n, kwargs):
    dls = photos([(o, 0) for o in x_0[:n]], **kwargs)
    learn = fit(ddpm_learner(dls, 8, (1, 2), 10, cbs=Watched(), accumulate=1))
    sizes = [len(o) for o in learn.watched.given[True]]
    assert sizes == [8, 8, 4, 8, 8, 8][:3] if n == 20 and not kwargs else sizes == [8]*(n//8)
    got, want = (o.flatten(1)[:, 0].tolist() for o in (torch.cat(learn.watched.given[True]), x_0[:sum(sizes)]))
    assert sorted(got) == sorted(want) and (got == want) != ('shuffle' in kwargs)


def test_other_loaders():
    "Batches made by a sampler of batches; fastai's loader of bare tensors; what can't be trained on"
    loader, x = torch.utils.data.DataLoader, list(x_0)
    by_sampler = [loader(x, batch_sampler=torch.utils.data.BatchSampler(range(24), 6, False)) for _ in range(2)]
    for loaders, bs in ((by_sampler, 6), ([TfmdDL(x, bs=8, num_workers=0) for _ in range(2)], 8)):
        learn = fit(ddpm_learner(DataLoaders(*loaders, device='cpu'), 8, (1, 2), 5, cbs=Watched()))
        assert torch.equal(torch.cat(learn.watched.given[True]), x_0) and learn.dls.train.bs == bs
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(x)
    for dl, says in ((loader([dict(image=o) for o in x], 8), 'tuples that begin with them, but give a dict'),
                     (loader([o[0] for o in x], 8), r'but give of shape \(8, 16, 16\)'),
                     (loader(Endless(), 8), 'dls must have a length')):
        with pytest.raises(BadInput, match=says): ddpm_learner(DataLoaders(dl, dl), 8, (1, 2), 5)


def test_a_batch_size_set_by_hand_counts(pics):
    "Where an earlier learner has the loader take two batches at once, as on a GPU"
    dls = image_dls(pics, image_size=16, batch_size=8, device='cpu')
    for set_to, bs in (16, 8), (4, 4):
        dls.train.at_once, dls.train.bs = (8, 16), set_to
        ddpm_learner(dls, dim=8, dim_mults=(1, 2), timesteps=10)
        assert dls.train.bs == bs
