"Grids, curves and strips: what they show, and that they show at all"
import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.plots import (backward_strip, forward_strip, part_times, plot_loss, plot_scores, read_losses,
                               read_scores, show_grid, show_strip)

T = 50


class Guess(nn.Module):
    "Guesses a tenth of the image plus the time, and remembers what it was asked"
    def __init__(self): super().__init__(); self.seen, self.p = [], nn.Parameter(torch.zeros(()))
    def forward(self, x, t):
        self.seen.append((x.clone(), t.tolist()))
        return x/10 + t[:, None, None, None]/T


def model(timesteps=T):
    d, g = Diffusion(Guess(), image_size=4, timesteps=timesteps), torch.Generator().manual_seed(0)
    d.noise_like = lambda shape, device=None: torch.randn(shape, generator=g)
    return d


# Strips

def test_forward_strip_adds_one_noise_at_five_times():
    d, x = model(), torch.rand(3, 3, 4, 4)*2 - 1
    xs, a = forward_strip(d, x), d.schedule.alphas_cumprod[[0, 12, 25, 37, 49]].view(-1, 1, 1, 1, 1)
    noise = (xs - a.sqrt()*x)/(1 - a).sqrt()
    assert xs.shape == (5, 3, 3, 4, 4)
    assert (noise - noise[-1]).abs().max() < 1e-3 and .8 < noise[-1].std() < 1.2


@pytest.mark.parametrize('timesteps', [1, 3, 50, 400])
def test_backward_strip_is_one_chain_from_99_percent_to_the_image(timesteps):
    d, x = model(timesteps), torch.randn(2, 3, 4, 4)
    keep = part_times(timesteps)
    strip = backward_strip(d, x)
    seen = d.model.seen
    assert [t for _,t in seen] == [[i]*2 for i in reversed(range(keep[-1] + 1))]
    d = model(timesteps) # the same noise again, step by step
    for i in reversed(range(keep[-1] + 1)):
        assert torch.allclose(x, seen[keep[-1] - i][0], atol=1e-5)
        if i: assert all(torch.allclose(strip[j], x, atol=1e-5) for j,k in enumerate(reversed(keep)) if k == i)
        x = d.p_sample(x, torch.full((2,), i), i)
    assert torch.allclose(strip[-1], x, atol=1e-5) # finished, not what the last step begins with


def test_part_times(): assert part_times(50) == [0, 12, 25, 37, 49] and part_times(400)[-1] == 396


def test_show_strip_puts_each_time_under_its_label():
    xs = torch.linspace(-1, 1, 10).view(5, 2, 1, 1, 1).expand(-1, -1, 3, 4, 4)
    fig = show_strip(xs, list('abcde'))
    axes = np.array(fig.axes).reshape(2, 5)
    assert [ax.get_title() for ax in axes[0]] == list('abcde')
    for i,j in np.ndindex(2, 5):
        assert np.allclose(axes[i, j].images[0].get_array(), (xs[j, i].permute(1, 2, 0) + 1)/2, atol=1e-6)


@pytest.mark.parametrize('c', [1, 3])
def test_strips_of_oblong_and_grey_pictures(c):
    xs = torch.linspace(-1, 1, 10).view(5, 2, 1, 1, 1).expand(-1, -1, c, 4, 8)
    fig = show_strip(xs, list('abcde'))
    for ax,x in zip(np.array(fig.axes).reshape(2, 5).T.flat, xs.flatten(0, 1)): # in colour, or matplotlib picks its own
        a = ax.images[0].get_array()
        assert a.shape == (4, 8, 3) and np.allclose(a, (x[0, 0, 0] + 1)/2, atol=1e-6)
    assert np.allclose(fig.get_size_inches(), (5, 2*.5 + .3))
    d = Diffusion(Guess(), image_size=(4, 8), channels=c, timesteps=5)
    assert backward_strip(d, forward_strip(d, xs[0])[-1]).shape == xs.shape


# Grids

def test_a_grid_of_oblong_pictures_has_their_shape():
    for c in (1, 3):
        fig = show_grid(torch.rand(6, c, 8, 16), ncols=3, size=1.)
        assert fig.axes[0].images[0].get_array().shape == (2*10 + 2, 3*18 + 2, 3)
        assert np.allclose(fig.get_size_inches(), (3, 1))


def test_show_grid_row_by_row():
    x = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(-1, 3, 4, 4)
    g = np.asarray(show_grid(x, ncols=3).axes[0].images[0].get_array())
    assert g.shape == (2*6 + 2, 3*6 + 2, 3)
    for i in range(5): assert np.allclose(g[i//3*6 + 2:i//3*6 + 6, i%3*6 + 2:i%3*6 + 6], x[i, 0, 0, 0])
    assert (g[:2] == 1).all() and np.asarray(show_grid(x).axes[0].images[0].get_array()).shape == (14, 20, 3)
    for o in (x[:1], x[:, :1], x[:1, :1], x*3 - 1): # one picture, grey ones, out of range
        a = np.asarray(show_grid(o, title='what').axes[0].images[0].get_array())
        assert a.shape[-1] == 3 and 0 <= a.min() <= a.max() <= 1


def test_a_fresh_kernel_shows_each_picture_once():
    import nbformat
    from nbclient import NotebookClient
    code = ('import torch; from ddpm_nb.kit.plots import *; show_grid(torch.rand(4, 3, 8, 8))',
            'plot_loss([(1, .9, None), (2, .8, .7)])',
            "plot_scores([dict(step=1, value=2, floor=1, label='FID', n=6)])",
            "show_strip(torch.rand(5, 2, 3, 8, 8), 'abcde')",
            "from ddpm_nb.kit.files import *; d = load_diffusion(); show_grid(d.sample(1))",
            'Pictures([show_grid(torch.rand(4, 3, 8, 8)), plot_loss([])])')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in code])
    NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    for cell in nb.cells:
        out = [o for o in cell.outputs if o.output_type != 'stream']
        kind = ['display_data']*2 if 'Pictures' in cell.source else ['execute_result']
        assert [o.output_type for o in out] == kind and all(len(o.data['image/png']) > 500 for o in out)


def test_a_server_needs_no_backend(monkeypatch, tmp_path):
    import matplotlib.pyplot as plt
    was = plt.get_fignums()
    show_grid(torch.rand(4, 3, 8, 8)).savefig(tmp_path/'a.png')
    assert (tmp_path/'a.png').stat().st_size > 500 and plt.get_fignums() == was


# Curves

def lines(fig): return {o.get_label(): o for o in fig.axes[0].lines}


def test_plot_loss_draws_the_mean_of_the_window_and_leaves_out_what_is_no_number():
    rows = [(i, float(i), i/2 if i % 4 == 0 else None) for i in range(1, 13)]
    o = lines(plot_loss(rows, window=4))
    assert o['training, mean of 4 steps'].get_ydata() == pytest.approx([1, 1.5, 2, *(i - 1.5 for i in range(4, 13))])
    assert list(zip(*o['held out'].get_data())) == [(4, 2), (8, 4), (12, 6)]
    for bad in (math.nan, math.inf):
        for some in ([(1, bad, .5)], [*rows, (13, bad, .5)]):
            assert np.isfinite(plot_loss(some).axes[0].lines[0].get_ydata()).all()
    assert plot_loss([]).axes[0].get_ylim()[1] > 0


def test_plot_scores_draws_the_floor_where_it_is():
    fig = plot_scores([dict(step=f'{i}', value=f'{9 - i}', floor='.5', label='FID', n='64') for i in range(3)])
    o = lines(fig)
    assert list(o['samples'].get_ydata()) == [9, 8, 7] and list(o['real images, the floor'].get_ydata()) == [.5]*3
    assert (fig.axes[0].get_ylabel(), fig.axes[0].get_title(), fig.axes[0].get_ylim()[0]) == ('FID', '64 images', 0)


def test_rows_are_read_and_a_missing_file_is_refused(tmp_path):
    (tmp_path/'loss.csv').write_text('step,loss,held_out\n1,0.5,\n2,nan,0.25\n')
    (one, two) = read_losses(tmp_path/'loss.csv')
    assert one == (1, .5, None) and two[0] == 2 and math.isnan(two[1]) and two[2] == .25
    for f in (read_losses, read_scores):
        with pytest.raises(BadInput, match='none.csv is not there. Give a csv file that'): f(tmp_path/'none.csv')
