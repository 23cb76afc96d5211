"Files are complete or not there; what is no model is refused by its name, before anything is built from it."
import copy, json, math, os, re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit import files
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.fast import fast
from ddpm_nb.kit.files import (CannotWrite, build, check_model, complete, config_of, load_diffusion, load_weights,
                               png_text, read_checkpoint, save_diffusion, save_png, save_pretrained, write_csv)
from ddpm_nb.unet import Unet


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=5)


@pytest.fixture
def file(small, tmp_path):
    "A checkpoint whose average differs from its weights"
    avg = copy.deepcopy(small)
    avg.model.out.bias.data += 1
    save_diffusion(small, tmp_path/'model.pt', 7, avg, train=dict(epoch=1))
    return tmp_path/'model.pt'


def names(path): return sorted(o.name for o in path.iterdir())


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())


# Complete or not there

def test_a_file_that_is_interrupted_is_not_there(tmp_path):
    for error in (InterruptedError, KeyboardInterrupt, ValueError):
        (tmp_path/'a.txt').write_text('old')
        with pytest.raises(CannotWrite if error is InterruptedError else error), complete(tmp_path/'a.txt') as o:
            o.write_text('ne')
            raise error
        assert (tmp_path/'a.txt').read_text() == 'old' and names(tmp_path) == ['a.txt']
    with complete(tmp_path/'a.txt') as o: o.write_text('new')
    assert (tmp_path/'a.txt').read_text() == 'new'


def test_where_one_cannot_write(tmp_path, small):
    for f in (lambda p: write_csv(p, 'ab', []), lambda p: save_diffusion(small, p)):
        with pytest.raises(CannotWrite, match=r"none/a can't be written \(No such file or directory\). Choose a"):
            f(tmp_path/'none/a')
    (tmp_path/'file').touch()
    with pytest.raises(CannotWrite, match="file/x can't be written"): save_pretrained(small, tmp_path/'file/x')
    assert names(tmp_path) == ['file']


def test_a_table(tmp_path, monkeypatch):
    write_csv(tmp_path/'a.csv', ('step', 'loss'), [(1, .5), (2, '')])
    assert (tmp_path/'a.csv').read_bytes() == b'step,loss\r\n1,0.5\r\n2,\r\n'
    monkeypatch.setattr(files, 'rank', lambda: 1)
    write_csv(tmp_path/'b.csv', ('step',), [])
    assert names(tmp_path) == ['a.csv']


def test_what_was_written_is_verified(small, tmp_path, monkeypatch):
    save_diffusion(small, tmp_path/'model.pt', 1)
    monkeypatch.setattr(torch, 'save', lambda obj, f: f.write(b'half'))
    with pytest.raises(CannotWrite, match='model.pt.*what was written is damaged'):
        save_diffusion(small, tmp_path/'model.pt', 2)
    assert read_checkpoint(tmp_path/'model.pt')['step'] == 1 and names(tmp_path) == ['model.pt']


# Which models there can be

@pytest.mark.parametrize('line,kw', [
    ('image_size must be a multiple of 8, but is 30', dict(image_size=30)),
    ('image_size must be a whole number from 1 to 16384, but is 32768', dict(image_size=2**15)),
    ('image_size must be a multiple of 8, but is (32, 60)', dict(image_size=(32, 60))),
    ('image_size must be a multiple of 8, but is (30, 64)', dict(image_size='30x64')),
    ('image_size must be a whole number from 1 to 16384, but is 0', dict(image_size=[64, 0])),
    ('timesteps must be a whole number of at least 1, but is 0', dict(timesteps=0)),
    ('channels must be a whole number of at least 1, but is 0', dict(channels=0)),
    ('dim must be a whole number of at least 4, but is 0', dict(dim=0)),
    ('dim must be even, but is 15', dict(dim=15)),
    ('dim must be a multiple of 8, the groups of the normalisation, but is 18', dict(dim=18)),
    ('init_dim must be a multiple of 8, the groups of the normalisation, but is 12', dict(init_dim=12)),
    ('init_dim must be a whole number of at least 1, but is 0', dict(init_dim=0)),
    ('dim_mults must be a whole number of at least 1, but is -2', dict(dim_mults=(1, -2))),
    ('dim_mults must be 1 to 16 whole numbers, one for each level, but is ()', dict(dim_mults=())),
    ('dim_mults must be 1 to 16 whole numbers, one for each level, but is 4', dict(dim_mults=4)),
    ('out_dim must be 3, as channels are, but is 6', dict(out_dim=6)),
    ("attention must be one of all, none, but is 'some'", dict(attention='some')),
    ("schedule must be one of cosine, linear, sigmoid, but is 'square'", dict(schedule='square'))])
def test_models_that_cannot_be(line, kw):
    with pytest.raises(BadInput) as e: check_model(**dict(image_size=32) | kw)
    assert e.value.line == line


def test_models_that_can_be():
    check_model(32)
    check_model(7, dim_mults=(1,))
    for o in ((32, 64), [8, 16], '64x32'): check_model(o)
    check_model(64, channels=1, timesteps=1, schedule='linear', dim=4, dim_mults=[3, 1], attention='none', init_dim=8,
                out_dim=1, resnet_block_groups=4)


# Checkpoints

@pytest.mark.parametrize('size, kept, channels', [
    (16, 16, 1), ((16, 16), 16, 3), ((16, 24), (16, 24), 3), ([24, 16], (24, 16), 1)])
def test_a_model_of_any_shape_comes_back(tmp_path, size, kept, channels):
    d = Diffusion(Unet(8, dim_mults=(1, 2), channels=channels), image_size=size, channels=channels, timesteps=2)
    save_diffusion(d, tmp_path/'model.pt')
    save_pretrained(d, tmp_path/'folder')
    conf = json.loads((tmp_path/'folder/config.json').read_text())
    assert conf['image_size'] == read_checkpoint(tmp_path/'model.pt')['config']['image_size'] \
        == (kept if kept == 16 else list(kept))
    for o in ('model.pt', 'folder'):
        e = load_diffusion(tmp_path/o, 'cpu')
        assert e.image_size == kept and same(d, e) and e.sample(2).shape == (2, *d.image_shape)
    h, w = d.image_shape[1:]
    card = (tmp_path/'folder/README.md').read_text()
    assert f'{h}×{w} pixels' in card and f'(16, {channels}, {h}, {w})' in card
    with pytest.raises(ValueError, match=rf'must be of shape \({channels}, {h}, {w}\)'):
        d(torch.zeros(1, channels, h + 8, w))


def test_a_checkpoint_comes_back(small, file):
    ckpt, d = read_checkpoint(file), load_diffusion(file, 'cpu', ema=False)
    assert (ckpt['step'], ckpt['train'], ckpt['config']) == (7, dict(epoch=1), config_of(small))
    assert same(d, small) and config_of(d) == config_of(small) and not d.training
    avg = load_diffusion(file.parent, 'cpu') # a run's folder, and the average
    assert torch.equal(avg.model.out.bias, small.model.out.bias + 1)
    assert type(avg.model) is type(fast(Unet(8))) # the fast form
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 4])
    assert torch.allclose(d.denoise(x, t), small.denoise(x, t), atol=1e-4)


class Mine(Unet): "A network of one's own with a config, and weights like a Unet's"


class Wise(torch.nn.Conv2d):
    "One whose config couldn't be pickled"
    def __init__(self): super().__init__(3, 3, 1); self.config = dict(f=lambda x: x)
    def forward(self, x, t): return super().forward(x)


@pytest.mark.parametrize('make, other', [(lambda: Mine(8, dim_mults=(1, 2)), lambda: Mine(16, dim_mults=(1, 2))),
                                         (Wise, lambda: torch.nn.Conv2d(3, 3, 3))])
def test_a_network_of_ones_own_comes_back(tmp_path, make, other):
    "Its weights are kept, and whoever loads them brings a network of the kind"
    d = Diffusion(make(), image_size=14, timesteps=5) # a size that our U-Net of four levels would refuse
    save_diffusion(d, tmp_path/'model.pt', ema=d)
    save_pretrained(d, tmp_path/'folder')
    for path in tmp_path, tmp_path/'folder':
        with pytest.raises(BadInput, match=f'of a network of yours, {type(d.model).__name__}. In Python give'):
            load_diffusion(path)
        e = load_diffusion(path, 'cpu', net=(net := make()))
        assert e.model is net and same(d, e) and e.sample(1).shape == (1, 3, 14, 14)
        with pytest.raises(BadInput, match='tensors do not fit'): load_diffusion(path, net=other())


def test_damaged_checkpoints(file):
    whole, bad = file.read_bytes(), file.with_name('bad.pt')
    i = whole.index(read_checkpoint(file)['model']['schedule.alphas'].numpy().tobytes())
    one_bit = whole[:i] + bytes([whole[i] ^ 1]) + whole[i+1:]
    for content in (b'', b'hello', whole[:5000], one_bit):
        bad.write_bytes(content)
        with pytest.raises(BadInput, match='bad.pt is no checkpoint, or a damaged one'): load_diffusion(bad)
    assert names(file.parent) == ['bad.pt', 'model.pt']


def nan(c): c['model']['model.stem.weight'][0] = math.nan
def no_config(c): del c['config']
def text(c): c['step'] = 'seven'
def no_weight(c): del c['ema']['model.stem.weight']
def too_many(c): c['ema']['model.more'] = torch.zeros(1)
def half(c): c['ema']['model.stem.weight'] = c['ema']['model.stem.weight'].half()
def long(c): c['config'] = c['config'] | dict(timesteps=10**9) # terabytes, if it were built
def wide(c): c['config'] = c['config'] | dict(unet=c['config']['unet'] | dict(dim=8*10**6))
def odd(c): c['config'] = c['config'] | dict(image_size=15)
def cube(c): c['config'] = c['config'] | dict(image_size=[16, 16, 16])
def gray(c): c['config'] = c['config'] | dict(channels=1)


@pytest.mark.parametrize('change,says', [
    (nan, '1 tensors are not finite, such as model.model.stem.weight'), (no_config, 'it has no config'),
    (text, 'its step is a str'), (half, 'such as model.stem.weight'), (too_many, 'such as model.more'),
    (no_weight, 'of another configuration: 1 tensors do not fit, such as model.stem.weight'),
    (long, 'weights are not for 1000000000 timesteps'), (wide, 'of another configuration'),
    (odd, 'image_size must be a multiple of 2, but is 15'), (cube, 'image_size must be a whole number'),
    (gray, 'two numbers of channels')])
def test_checkpoints_that_are_none(file, change, says):
    ckpt, bad = read_checkpoint(file), file.with_name('bad.pt')
    change(ckpt)
    torch.save(ckpt, bad)
    with pytest.raises(BadInput, match=re.escape(str(bad)) + '.*' + re.escape(says)): load_diffusion(bad, 'cpu')


def test_weights_of_another_model(small, file):
    other = Diffusion(Unet(8), image_size=16, timesteps=5)
    was = copy.deepcopy(other)
    with pytest.raises(BadInput, match='checkpoint is of another configuration: .* do not fit'):
        load_weights(other, read_checkpoint(file)['model'])
    assert same(other, was)
    with pytest.raises(BadInput, match='a.pt is of another configuration'): load_weights(small, {}, 'a.pt')
    with pytest.raises(BadInput, match='a.pt has a configuration that makes no model'): build({}, {}, 'a.pt')


@pytest.mark.parametrize('path,says', [
    ('none.pt', 'none.pt is not there. Give a checkpoint'), ('results/model.pt', 'results/model.pt is not there'),
    (3, 'load_path must be a path'), ('.', r'\. holds no model: neither model.pt nor model.safetensors')])
def test_where_no_model_is(path, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=says): load_diffusion(path, 'cpu')
    os.mkdir('results')
    with pytest.raises(BadInput, match='results/cats is not there'): load_diffusion('results/cats') # no name on the Hub


# What save_pretrained wrote

def test_half_of_the_digits(small, tmp_path):
    net = copy.deepcopy(small)
    net.model.half()
    save_pretrained(net, tmp_path)
    again = load_diffusion(tmp_path, 'cpu')
    assert {o.dtype for o in again.parameters()} == {torch.float32}
    assert all(torch.equal(v, net.state_dict()[k].float()) for k,v in again.state_dict().items())


@pytest.mark.parametrize('content,says', [
    ('{', "isn't JSON"), ('['*10**5, "isn't JSON"), ('[]', 'makes no model'), ('{"timesteps": 50}', 'makes no model'),
    (None, 'not for 1000000000 timesteps')])
def test_damaged_configurations(small, tmp_path, content, says):
    save_pretrained(small, tmp_path)
    (tmp_path/'config.json').write_text(content or json.dumps(config_of(small) | dict(timesteps=10**9)))
    with pytest.raises(BadInput, match=says): load_diffusion(tmp_path, 'cpu')


def test_damaged_safetensors(small, tmp_path):
    save_pretrained(small, tmp_path)
    weights = tmp_path/'model.safetensors'
    whole = weights.read_bytes()
    for content in (b'', b'hello', whole[:5000], b'\xff'*8 + whole[8:]):
        weights.write_bytes(content)
        with pytest.raises(BadInput, match="model.safetensors isn't a safetensors file, or is damaged"):
            load_diffusion(tmp_path, 'cpu')
    net = copy.deepcopy(small)
    net.model.stem.weight.data[0] = math.inf
    save_pretrained(net, tmp_path)
    with pytest.raises(BadInput, match='1 tensors are not finite, such as model.stem.weight'):
        load_diffusion(tmp_path, 'cpu')


# Pictures

@pytest.mark.parametrize('n, nrow', [(1, 8), (1, 1), (5, 3), (5, 8), (6, 1), (36, 6)])
@pytest.mark.parametrize('shape', [(3, 8, 8), (1, 8, 8), (3, 5, 9), (1, 9, 5)])
def test_a_png_is_what_torchvision_writes(tmp_path, n, nrow, shape):
    x = torch.rand(n, *shape)*1.2 - .1 # out of range, too
    x[0, 0, 0, :5] = torch.tensor([.5, .5/255, 1.5/255, 254.5/255, 1.]) # where rounding decides
    save_png(tmp_path/'a.png', x, nrow, model='é, \u4e2d\n')
    save_image(x, tmp_path/'b.png', nrow=nrow)
    with Image.open(tmp_path/'a.png') as a, Image.open(tmp_path/'b.png') as b:
        assert a.mode == ('L' if shape[0] == 1 else 'RGB') and (np.asarray(a.convert('RGB')) == np.asarray(b)).all()
    assert png_text(tmp_path/'a.png') == dict(Software='ddpm_nb', model='é, \u4e2d\n')
    assert png_text(tmp_path/'b.png') == {}


def test_words_of_what_is_no_png(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path/'a.png', 'jpeg', comment='Software')
    (tmp_path/'b.png').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(40))
    for o in ('a.png', 'b.png', 'none.png', '.'): assert png_text(tmp_path/o) == {}


def test_quick_is_complete_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'to_disk', None)
    with pytest.raises(CannotWrite), complete(tmp_path/'a', sync=False) as f:
        f.write_text('ha')
        raise OSError
    assert list(tmp_path.iterdir()) == []
    with complete(tmp_path/'a', sync=False) as f: f.write_text('whole')
    assert [o.name for o in tmp_path.iterdir()] == ['a']
