"What a GPU would run, on tensors with its device and no content: nothing of the CPU gets in, nothing waits for a value"
from types import SimpleNamespace

import fastai.callback.schedule, pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_nb.diffusion import Diffusion, ancestral
from ddpm_nb.kit.data import Images, eval_view, image_dls, train_view
from ddpm_nb.kit.fast import (HALF, Captured, MergedAttention, NormAct, TrainStep, autocast, fast, graphed,
                              plain)
from ddpm_nb.kit.files import read_checkpoint
from ddpm_nb.kit.processes import seed_everything
from ddpm_nb.kit.runs import CheckpointCallback, StepLoss, fit_steps
from ddpm_nb.learner import ddpm_learner, ema_average
from ddpm_nb.sampling import ddim
from ddpm_nb.unet import Unet

try:
    with FakeTensorMode(): torch.ones(2, device='cuda')[:, None] + 1
    none = False
except (RuntimeError, AssertionError): none = True
pytestmark = pytest.mark.skipif(none, reason='a PyTorch that knows no CUDA')


@pytest.fixture
def gpu():
    with FakeTensorMode(): yield torch.device('cuda')


def moved(o, device):
    "A module whose tensors are on the device"
    like = lambda v: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device)
    for m in o.modules():
        for k,v in m._parameters.items(): m._parameters[k] = None if v is None else nn.Parameter(like(v))
        for k,v in m._buffers.items(): m._buffers[k] = like(v)
    return o


@pytest.fixture(params=[(fast, 'all'), (fast, 'none'), (nn.Module.train, 'all')], ids=['fast', 'lean', 'plain'])
def model(request, gpu):
    form, attention = request.param
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        d = Diffusion(form(Unet(8, dim_mults=(1, 2), attention=attention)), image_size=16, timesteps=10)
    return moved(d, gpu)


def test_a_value_cannot_be_waited_for(gpu):
    "The check itself: these tensors refuse what would stop a GPU's stream, and to be mixed with a CPU's"
    x = torch.ones(3, device=gpu)
    with pytest.raises(DataDependentOutputException): x.sum().item()
    with pytest.raises(Exception, match='device'): x + torch.ones(3)


def test_loss_and_step(model, gpu):
    ps = list(model.parameters())
    loss = model(torch.ones(4, 3, 16, 16, device=gpu))
    assert (loss.device.type, loss.dtype, loss.requires_grad) == ('cuda', torch.float32, True)
    mean = [torch.empty_like(p) for p in ps]
    ema_average(mean, [p.data for p in ps], torch.tensor(3, device=gpu))
    assert {o.device.type for o in mean} == {'cuda'}


def test_backward(gpu):
    "The two gradients that are written by hand"
    def back(f, *inputs, **kept):
        ctx = SimpleNamespace(save_for_backward=lambda *o: setattr(ctx, 'saved_tensors', o))
        with torch.no_grad(): return f.backward(ctx, torch.empty_like(f.forward(ctx, *inputs, **kept)))
    e = lambda *shape: torch.empty(shape, device=gpu, dtype=torch.bfloat16)
    z, w, m = e(2, 64, 8), e(128, 8), e(4, 8, 8)
    outs = back(MergedAttention, z, w, w, m)
    assert [(o.shape, o.device.type, o.dtype) for o in outs] == [(o.shape, 'cuda', o.dtype) for o in (z, w, w, m)]
    given = e(2, 64, 8), e(8), e(2, 8), e(2, 8)
    outs = back(NormAct, *given, groups=4)[:-1]
    assert [(o.shape, o.device.type) for o in outs] == [(o.shape, 'cuda') for o in given]


@pytest.mark.parametrize('kwargs', [{}, dict(sampler=ddim, steps=3), dict(sampler=ddim, eta=.5)])
def test_sampling(model, gpu, kwargs):
    "All steps, up to images on the device"
    x = model.sample(6, **kwargs)
    assert (x.shape, x.device.type) == ((6, 3, 16, 16), 'cuda')


def test_batches_are_born_there(pics, gpu, monkeypatch):
    "Decoded pictures are moved once, and a batch never leaves the device"
    def blank(self, progress): return torch.zeros(len(self), 3, *self.size, dtype=torch.uint8)
    monkeypatch.setattr(Images, 'decode_all', blank)
    for dl, view in zip(image_dls(pics, 16, 8, device='cuda'), (train_view, eval_view)):
        x = view(dl.dataset.x[[0, 3, 1]], 16)
        assert (dl.dataset.x.device.type, x.device.type, x.shape) == ('cuda', 'cuda', (3, 3, 16, 16))


class Unasked(TorchDispatchMode):
    "Refuses every operation that waits for a value, or whose shape depends on one"
    waits = '_local_scalar_dense nonzero equal masked_select is_nonzero unique_dim _unique2 item'.split()
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        masks = name.startswith('index') and any(o is not None and o.dtype == torch.bool for o in args[1])
        if name in self.waits or masks: raise RuntimeError(f'{name} waits for a value')
        return f(*args, **kwargs or {})


@pytest.mark.parametrize('form', [fast, plain], ids=['fast', 'plain'])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_a_whole_step_never_asks_for_a_value(form, dtype):
    "So that a CUDA graph can hold it: draws, loss, gradient, unscaling, clipping, Adam, the average"
    d = Diffusion(form(Unet(8, dim_mults=(1, 2))), image_size=16, timesteps=10)
    opt = torch.optim.Adam(d.parameters(), lr=1e-3, fused=True)
    step = TrainStep(d, opt, dtype, avg=AveragedModel(d, multi_avg_fn=ema_average), max_norm=1.)
    x, shapes = torch.randn(4, 3, 16, 16), ((), ())
    step(x) # Adam makes its state, the scaler its scale
    with Unasked():
        for lr in (1e-3, 1e-4):
            opt.param_groups[0]['lr'] = lr
            step.set_lr()
            loss, bad = step(x)
            with pytest.raises(RuntimeError, match='waits for a value'): bool(bad)
    assert (loss.shape, bad.shape) == shapes and not bad
    assert opt.param_groups[0]['lr'] == 1e-4 # the float is back where fastai looks for it


# What follows needs a GPU

real = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU on this machine')


def pieces(pics, folder, graph, precision='fp32', steps=20, ckpt=None, seed=0):
    "A learner that has trained on the GPU, as one graph a step or the same function eagerly"
    seed_everything(seed)
    folder.mkdir(exist_ok=True)
    dls = image_dls(pics, 16, 8, device='cuda', epoch_size=160)
    learn = ddpm_learner(dls, dim=8, dim_mults=(1, 2), timesteps=5, cbs=[StepLoss(folder), CheckpointCallback(folder)])
    if precision in HALF: learn.to_fp16(precision)
    if not graph: learn.graph.take = lambda x: learn.graph.step(x)
    torch.backends.cudnn.deterministic = True
    with learn.no_bar(), learn.no_logging(): fit_steps(learn, steps, 10, ckpt, ckpt is not None)
    return learn


def weights(learn):
    "Of the model and of its average. Single ones are decided by rounding, such as a bias before a normalisation"
    return torch.cat([p.detach().flatten() for o in (learn.diffusion, learn.averaged) for p in o.parameters()])

def recorded(f): return [v for v in f.seen.values() if callable(v) and v is not f.f]


@real
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_graph_and_eager_are_the_same(pics, tmp_path, precision):
    if precision == 'bf16' and not torch.cuda.is_bf16_supported(): pytest.skip('a GPU without bfloat16')
    a = pieces(pics, tmp_path/'a', False, precision)
    random = torch.cuda.get_rng_state()
    b = pieces(pics, tmp_path/'b', True, precision)
    assert len(recorded(b.graph.captured)) == 1 and b.ema.avg.n_averaged == 20
    tol = 1e-5 if precision == 'fp32' else 1e-2
    assert [r[1] for r in a.step_loss.rows] == pytest.approx([r[1] for r in b.step_loss.rows], abs=tol)
    assert (weights(a) - weights(b)).abs().mean() < tol/10
    assert torch.equal(random, torch.cuda.get_rng_state())


@real
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_resume_across_a_graph(pics, tmp_path, precision):
    whole = pieces(pics, tmp_path/'whole', True, precision)
    pieces(pics, tmp_path/'part', True, precision, steps=10)
    ckpt = read_checkpoint(tmp_path/'part'/'model.pt')
    part = pieces(pics, tmp_path/'part', True, precision, ckpt=ckpt, seed=9)
    scales = [read_checkpoint(tmp_path/o/'model.pt')['train']['scaler'] for o in ('whole', 'part')]
    assert part.ddpm.steps == 20 and scales[0] == scales[1]
    assert (weights(whole) - weights(part)).abs().mean() < 1e-6


@real
def test_a_step_waits_for_nothing(pics, tmp_path):
    learn = pieces(pics, tmp_path, True)
    x, batches = torch.rand(16, 3, 16, 16, device='cuda'), iter(learn.dls.train)
    next(batches) # an epoch's order is moved to the GPU once
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            learn.graph.take(x)
            next(batches)
    finally: torch.cuda.set_sync_debug_mode('default')


@real
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_with_and_without_a_gradient(precision):
    "Pixels are normalised by another way where no gradient is asked for"
    torch.manual_seed(0)
    net, x = fast(Unet(8, dim_mults=(1, 2))).cuda(), torch.randn(6, 3, 16, 16, device='cuda')
    with autocast('cuda', precision):
        want = net(x, t := torch.arange(6, device='cuda'))
        with torch.no_grad(): got = net(x, t)
    torch.testing.assert_close(got, want.detach(), rtol=0, atol=5e-3 if precision == 'fp32' else 2e-2) # tf32, fp16


@real
@pytest.mark.parametrize('kwargs', [{}, dict(sampler=ddim, steps=5), dict(sampler=ddim, eta=.5)])
def test_samples_of_a_graph(kwargs):
    torch.manual_seed(0)
    d = Diffusion(fast(Unet(8, dim_mults=(1, 2))), image_size=16, timesteps=10).cuda()
    draws = lambda: setattr(d, 'noise_like', lambda shape, device=None: torch.randn(
        shape, generator=g).to('cuda')) or torch.Generator().manual_seed(0)
    g = draws()
    want = d.sample(6, **kwargs)
    graphed(d)
    for _ in range(2):
        g = draws()
        torch.testing.assert_close(d.sample(6, **kwargs), want, rtol=0, atol=1e-3)
    assert len(recorded(d.denoise)) == 1


@real
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_a_graph_reads_the_weights_of_the_moment(precision):
    "Changed in place, in half precision too, whose casts of the weights PyTorch likes to keep; and moved elsewhere"
    torch.manual_seed(0)
    d = graphed(Diffusion(fast(Unet(8, dim_mults=(1, 2))), image_size=16, timesteps=10).cuda())
    def both():
        torch.manual_seed(1)
        with autocast(d.device, precision):
            x = d.sample(4)
            torch.manual_seed(1)
            return x, d.p_sample_loop(d.noise_like(x.shape), lambda f, *a: ancestral(d.denoise.f, *a))
    for change in (lambda: None, lambda: [p.data.mul_(1.1) for p in d.parameters()], lambda: d.cpu().cuda()):
        change()
        torch.testing.assert_close(*both(), rtol=0, atol=1e-3 if precision == 'fp32' else 2e-2)
    assert len(recorded(d.denoise)) == 1


@real
def test_events_then_a_graph(pics, tmp_path):
    "A fit that a graph cannot follow leaves nothing that spoils the recording of the next"
    learn = pieces(pics, tmp_path, True)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        assert not learn.graph.follows
        learn.fit(1)
    assert learn.graph.follows and len(recorded(learn.graph.captured)) == 1


@real
def test_a_step_that_is_not_finite_in_a_graph(pics, tmp_path):
    learn = pieces(pics, tmp_path, True)
    x, was = torch.rand(16, 3, 16, 16, device='cuda'), weights(learn)
    for spoil in (float('nan'), float('inf')):
        loss, bad = learn.graph.take(x*spoil)
        assert bad and not loss.isfinite()
    ps = [p.detach().flatten() for p in learn.diffusion.parameters()]
    assert torch.equal(torch.cat(ps), was[:sum(map(len, ps))])
    loss, bad = learn.graph.take(x)
    assert loss.isfinite() and not bad


@real
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU only')
def test_a_graph_on_the_second_gpu():
    f = Captured(lambda x: x*2)
    assert [f(torch.full((2,), float(i), device='cuda:1')).sum().item() for i in range(6)] == [0, 4, 8, 12, 16, 20]


@real
def test_scores_on_the_gpu(pics):
    "Half precision moves the distance by less than 0.5 %"
    from ddpm_nb.fid import frechet_distance
    from ddpm_nb.kit.faces import faces
    from ddpm_nb.kit.scores import get_network
    net, (a, b) = get_network('efficientnet-lite0'), (faces(o, 256, size=32) for o in ('cat', 'dog'))
    d = {o: frechet_distance(net(a, o), net(b, o)) for o in ('cpu', 'cuda')}
    assert abs(d['cuda']/d['cpu'] - 1) < .005
