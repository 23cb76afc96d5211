"The Hub's side of a model, without a network: what an upload would hold, and a download that is in the cache already."
import re, socket
from importlib.resources import files
from pathlib import Path

import huggingface_hub, numpy as np, pytest, torch
from huggingface_hub import HfApi
from PIL import Image
from torchvision.utils import make_grid

from ddpm_nb.diffusion import Diffusion
from ddpm_nb.kit.checks import BadInput
from ddpm_nb.kit.faces import faces
from ddpm_nb.kit.files import load_diffusion, push_to_hub, save_pretrained
from ddpm_nb.unet import Unet


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=5)


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())


def test_push(small, tmp_path, monkeypatch):
    "The folder that goes up is one that can be read, and its card says what it is and how to load it"
    asked = []
    def create_repo(self, repo_id, **kwargs):
        asked.append((repo_id, self.token, kwargs))
        return huggingface_hub.RepoUrl(f'https://huggingface.co/{repo_id}')
    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        asked.append((repo_id, self.token, kwargs))
        Path(folder_path).rename(tmp_path/'up')
        (Path(folder_path)).mkdir()
        return 'sent'
    monkeypatch.setattr(HfApi, 'create_repo', create_repo)
    monkeypatch.setattr(HfApi, 'upload_folder', upload_folder)
    assert push_to_hub(small, 'someone/cats', token='mine', private=True, commit_message='Cats') == 'sent'
    assert asked == [('someone/cats', 'mine', dict(private=True, exist_ok=True)),
                     ('someone/cats', 'mine', dict(commit_message='Cats'))]
    assert {o.name for o in (tmp_path/'up').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    card = huggingface_hub.ModelCard.load(tmp_path/'up'/'README.md')
    assert card.data.library_name == 'ddpm_nb' and card.data.license == 'apache-2.0'
    assert '# someone/cats' in card.text and "load_diffusion('someone/cats')" in card.text
    assert same(small, load_diffusion(tmp_path/'up', 'cpu'))


def test_a_card_of_your_own(small, tmp_path):
    "It stays when the weights are written again"
    save_pretrained(small, tmp_path, card='# Mine')
    save_pretrained(small, tmp_path)
    assert (tmp_path/'README.md').read_text() == '# Mine'


def test_the_snippet_of_the_card_runs(small, tmp_path, monkeypatch):
    save_pretrained(small, tmp_path/'cats')
    code = re.search('```python\n(.*?)```', (tmp_path/'cats/README.md').read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names['images'].shape == (16, 3, 16, 16)


def test_a_repository_in_the_cache(small, tmp_path):
    "As the Hub's client lays it out; asked for by name, with no network"
    repo, commit = tmp_path/'models--someone--cats', 'a'*40
    save_pretrained(small, repo/'snapshots'/commit)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text(commit)
    offline = dict(cache_dir=tmp_path, local_files_only=True)
    again = load_diffusion('someone/cats', 'cpu', **offline)
    assert same(small, again) and not again.training
    assert same(small, Diffusion.from_pretrained('someone/cats', 'cpu', **offline)) # the name that kit.files adds
    with pytest.raises(BadInput, match='someone/dogs is neither here nor on the Hub'):
        load_diffusion('someone/dogs', **offline)


def test_the_model_of_the_package(monkeypatch):
    "It is there without a network, small, described, and knows noise in pictures of cats that it has never seen"
    monkeypatch.setattr(socket, 'socket', lambda *args, **kwargs: pytest.fail('a connection'))
    weights = files('ddpm_nb')/'weights'
    assert {o.name for o in weights.iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert sum(o.stat().st_size for o in weights.iterdir()) < 5e6
    card = (weights/'README.md').read_text()
    assert re.search(r'held-out L1 \| 0\.14', card) and 'CC BY-NC 4.0' in card and '**Limits.**' in card
    assert 'photographs' in card
    assert "load_diffusion('pretrained')" in card
    d = load_diffusion('pretrained', 'cpu')
    assert same(d, load_diffusion(device='cpu'))
    x = torch.nn.functional.interpolate(faces('cat', 64).float()/127.5 - 1, 32, mode='area')
    def losses(seed):
        torch.manual_seed(seed)
        with torch.no_grad(): return [d(x).item() for _ in range(4)]
    assert sum(losses(0))/4 == pytest.approx(.1646, abs=.002) # these times and this noise
    assert sum(sum(losses(o)) for o in (1, 2, 3))/12 == pytest.approx(.177, abs=.015) # any
    torch.manual_seed(0)
    images = d.sample(36)
    assert images.shape == (36, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert .3 < images.mean() < .6 and .18 < images.std() < .32
    grid = make_grid(torch.nn.functional.interpolate(images, scale_factor=3, mode='bicubic'), 9, padding=4, pad_value=1)
    page = np.asarray(Image.open(Path(__file__).parent.parent/'nbs/images/samples.jpg'), float)
    assert np.abs(grid.clamp(0, 1).permute(1, 2, 0).numpy()*255 - page).mean() < 4 # the first picture of the front page
