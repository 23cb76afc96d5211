"What distances refuse, and what a score says of few images."
import math
import pytest, torch
from ddpm_nb import fid
from ddpm_nb.fid import *
from ddpm_nb.kit.checks import BadInput

colour = Network(lambda x: x.mean((2, 3))/255, 'mean colour')


@pytest.mark.parametrize('x, says', [
    (torch.zeros(1, 3), r'features must be at least 2 rows of finite numbers, but are of shape \(1, 3\)'),
    (torch.zeros(3), r'but are of shape \(3,\)'),
    (torch.tensor([[0., float('nan')], [1, 2]]), 'but are of shape .2, 2., some of them NaN or infinite')])
def test_features(x, says):
    with pytest.raises(BadInput, match=says): Features(x)


@pytest.mark.parametrize('change, says', [
    (lambda x: x*2, r'images must be in \[0, 1\], but are from 0\.\d+ to [12]\.?\d*'),
    (lambda x: -x, r'images must be in \[0, 1\], but are from -'),
    (lambda x: x*float('nan'), 'images must be finite'),
    (lambda x: x[0], r'images must be of shape \(n, 3, h, w\), but are of shape \(3, 8, 8\)'),
    (lambda x: x[:, :2], r'but are of shape \(5, 2, 8, 8\)')])
def test_images(change, says):
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BadInput, match=says): colour(change(x), 'cpu')


def test_grey_images_and_bytes_are_images():
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(colour(x, 'cpu').x, colour(x.expand(-1, 3, -1, -1), 'cpu').x)
    assert torch.equal(colour((x*255 + .5).byte(), 'cpu').x, colour(x, 'cpu').x)


@pytest.mark.parametrize('f, says', [
    (lambda x: x, r'but returned shape \(5, 3, 299, 299\)'),
    (lambda x: x.mean((2, 3))[1:], r'but returned shape \(4, 3\)'),
    (lambda x: [1], 'but returned list')])
def test_network(f, says):
    says = r"the network 'odd' must return features of shape \(5, d\) for 5 images, " + says
    with pytest.raises(BadInput, match=says): Network(f, 'odd')(torch.rand(5, 3, 8, 8), 'cpu')


def test_a_network_of_numbers_that_are_not_finite():
    with pytest.raises(BadInput, match='NaN or infinite'):
        Network(lambda x: x.mean((2, 3))/0, 'odd')(torch.rand(5, 3, 8, 8), 'cpu')


def test_compute_fid():
    real = Features(torch.rand(50, 7))
    with pytest.raises(BadInput, match='seen by the same network, but have 3 and 7 features'):
        compute_fid(torch.rand(9, 3, 8, 8), real, colour, device='cpu')
    for n, m in ((5, 50), (6, 5)):
        with pytest.raises(BadInput, match=f'at least 6 on both sides, but are {n} against {m} real ones'):
            compute_fid(Features(torch.rand(n, 7)), Features(torch.rand(m, 7)), colour)
    s = compute_fid(Features(torch.rand(6, 7)), real, colour)
    assert (s.n, s.n_real, s.label) == (6, 50, 'FD (mean colour)') and not hasattr(s, 'infinity')
    assert s.notes == fid_notes(6, 50, 7) and 'note: 6 images cannot span 7 features' in repr(s)


def test_the_floor_says_at_how_many():
    real = Features(torch.rand(20, 3))
    assert '(at 10)' in repr(compute_fid(Features(torch.rand(15, 3)), real, colour))
    assert '(at' not in repr(compute_fid(Features(torch.rand(10, 3)), real, colour))
    floor, n = fid_floor(Features(torch.rand(3, 2)), 5)
    assert n == 1 and math.isnan(floor)


def test_extrapolation(monkeypatch):
    "From a fifth of the images to all of them, along 1/n"
    sizes = []
    def law(a, b):
        sizes.append(len(a))
        return 3 + 7/len(a)
    monkeypatch.setattr(fid, 'frechet_distance', law)
    assert fid_infinity(Features(torch.rand(200, 2)), None) == pytest.approx(3)
    assert sizes == [40, 57, 75, 93, 111, 128, 146, 164, 182, 200]


def test_what_is_known_of_a_reference_is_computed_once(monkeypatch):
    real, calls = Features(torch.rand(40, 5)), []
    for k in ('fid_floor', 'radii', 'kernel_sums'):
        f = getattr(fid, k)
        monkeypatch.setattr(fid, k, lambda *args, k=k, f=f: (calls.append(k) if args[0] is real else None, f(*args))[1])
    scores = [compute_fid(Features(torch.rand(9, 5)), real, colour) for _ in range(3)]
    assert calls.count('fid_floor') == 1 and calls.count('radii') == 2 and len({s.floor for s in scores}) == 1
    assert calls.count('kernel_sums') == 1 + 3 # over itself once, over each set of samples
    compute_fid(Features(torch.rand(8, 5)), real, colour)
    assert calls.count('fid_floor') == 2 # another number, another floor
