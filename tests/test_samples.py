"A model and a sampler by their names, and folders of samples: what is refused."
import shutil
import pytest, torch
from PIL import Image
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.files import save_diffusion, save_pretrained
from ddpm_nb.kit.samples import *
from ddpm_nb.kit.scores import are_images, load_samples
from ddpm_nb.unet import Unet


@pytest.mark.parametrize('args, says', [
    (('heun',), "sampler must be ancestral or ddim, but is 'heun'"),
    (('ddim', 0), 'steps must be a whole number of at least 1'),
    (('ddim', 6, 0., 5), 'steps must be a whole number from 1 to 5, but is 6'), (('ddim', 2, 1.1), 'eta must be'),
    (('ancestral', 2), 'steps must not be given with sampler ancestral, which takes all of them: choose sampler ddim')])
def test_samplers(args, says):
    with pytest.raises(BadInput, match=says): pick_sampler(*args)


def save(folder, sizes):
    folder.mkdir()
    for name, size in sizes.items(): Image.new('RGB', size).save(folder/name)
    return folder


def test_folders_of_samples(tmp_path):
    many = save(tmp_path/'many', {'0.png': (16, 16), '1.png': (20, 20)})
    says = 'of one size, but 0.png is of 16×16 pixels and 1.png of 20×20'
    with pytest.raises(BadInput, match=says): load_samples(many)
    (many/'1.png').write_bytes(b'no')
    with pytest.raises(BadInput, match="samples: 1.png can't be read .UnidentifiedImageError"): load_samples(many)
    wide = save(tmp_path/'wide', {'0.png': (16, 20)})
    with pytest.raises(BadInput, match='samples must be square, but 0.png is of 16×20 pixels'): load_samples(wide)
    one = save(tmp_path/'one', {'0.png': (16, 16)})
    zipped = shutil.make_archive(tmp_path/'one', 'zip', one)
    assert are_images(zipped) and load_samples(zipped).shape == (1, 3, 16, 16)
    with pytest.raises(BadInput, match='samples must be a path'): are_images(3)


def test_a_model_is_a_file_a_runs_folder_or_a_folder_for_others(tmp_path, monkeypatch, capsys):
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    (tmp_path/'results').mkdir()
    save_diffusion(d, tmp_path/'results/model.pt')
    save_pretrained(d, tmp_path/'given')
    monkeypatch.chdir(tmp_path)
    for path in (None, 'results', 'results/model.pt', 'given'):
        assert load_model(path, 'cpu').num_timesteps == 3 and not are_images(path)
    assert capsys.readouterr().out == ''
    assert load_model('pretrained', 'cpu').num_timesteps == 50
    shutil.rmtree('results')
    assert load_model(device='cpu').num_timesteps == 50
    assert 'CC BY-NC 4.0' in capsys.readouterr().out
    with pytest.raises(BadInput, match='none.pt is not there'): load_model('none.pt', 'cpu')


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(BadInput, match="save_folder: '.*file' can't be written .File exists.. Choose a folder"):
        with written_to(tmp_path/'file'): pass


def test_passes_are_new_images(tmp_path):
    d = Diffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=3)
    x = list(passes(d, 5, size=2))
    assert [len(o) for o in x] == [2, 2, 1] and len(set(o.mean().item() for o in torch.cat(x))) == 5
    assert torch.cat(x).min() >= 0 and torch.cat(x).max() <= 1
