"What a GPU would run, on tensors with its device and no content: nothing of the CPU gets in, nothing waits for a value"
from types import SimpleNamespace

import pytest, torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.data import Images, eval_view, image_dls, train_view
from ddpm_nb.kit.fast import MergedAttention, NormAct, fast
from ddpm_nb.learner import ema_average
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
    ema_average()(mean, [p.data for p in ps], 3)
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
    x, gain, bias = e(2, 64, 8), e(2, 8), e(2, 8)
    dx, dgain, dbias, _ = back(NormAct, x, gain, bias, groups=4)
    assert [(o.shape, o.device.type) for o in (dx, dgain, dbias)] == [(o.shape, 'cuda') for o in (x, gain, bias)]


@pytest.mark.parametrize('kwargs', [{}, dict(sampler=ddim, steps=3), dict(sampler=ddim, eta=.5)])
def test_sampling(model, gpu, kwargs):
    "All steps, up to images on the device"
    x = model.sample(6, **kwargs)
    assert (x.shape, x.device.type) == ((6, 3, 16, 16), 'cuda')


def test_batches_are_born_there(pics, gpu, monkeypatch):
    "Decoded pictures are moved once, and a batch never leaves the device"
    def blank(self, progress): return torch.zeros(len(self), 3, self.size, self.size, dtype=torch.uint8)
    monkeypatch.setattr(Images, 'decode_all', blank)
    for dl, view in zip(image_dls(pics, 16, 8, device='cuda'), (train_view, eval_view)):
        x = view(dl.dataset.x[[0, 3, 1]], 16)
        assert (dl.dataset.x.device.type, x.device.type, x.shape) == ('cuda', 'cuda', (3, 3, 16, 16))
