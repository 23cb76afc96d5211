"The Hub's side of `Diffusion`, without a network: what an upload would hold, and a download that is in the cache already."
import re, socket
from importlib.resources import files
from pathlib import Path

import huggingface_hub, pytest, torch
from huggingface_hub.hub_mixin import HfApi

from ddpm_nb.core import BadInput
from ddpm_nb.diffusion import Diffusion
from ddpm_nb.faces import faces
from ddpm_nb.unet import Unet


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Diffusion(Unet(8, dim_mults=(1, 2)), image_size=16, timesteps=5)


def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())


def test_push(small, tmp_path, monkeypatch):
    "The folder that goes up is one that can be read, and its card says what it is"
    def create_repo(self, repo_id, **kwargs): return huggingface_hub.RepoUrl(f'https://huggingface.co/{repo_id}')
    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        Path(folder_path).rename(tmp_path/'up')
        return repo_id
    monkeypatch.setattr(HfApi, 'create_repo', create_repo)
    monkeypatch.setattr(HfApi, 'upload_folder', upload_folder)
    assert small.push_to_hub('someone/cats', model_card_kwargs=dict(title='Cats', name='someone/cats')) == 'someone/cats'
    assert {o.name for o in (tmp_path/'up').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    card = huggingface_hub.ModelCard.load(tmp_path/'up'/'README.md')
    assert card.data.library_name == 'ddpm_nb' and '# Cats' in card.text and "from_pretrained('someone/cats')" in card.text
    assert same(small, Diffusion.from_pretrained(tmp_path/'up', 'cpu'))


def test_a_repository_in_the_cache(small, tmp_path):
    "As the Hub's client lays it out; asked for by name, with no network"
    repo, commit = tmp_path/'models--someone--cats', 'a'*40
    small.save_pretrained(repo/'snapshots'/commit)
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text(commit)
    again = Diffusion.from_pretrained('someone/cats', 'cpu', cache_dir=tmp_path, local_files_only=True)
    assert same(small, again) and not again.training
    with pytest.raises(BadInput, match='pretrained: found'): Diffusion.from_pretrained('someone/dogs', cache_dir=tmp_path, local_files_only=True)


def test_the_model_of_the_package(monkeypatch):
    "It is there without a network, small, described, and knows noise in pictures of cats that it has never seen"
    monkeypatch.setattr(socket, 'socket', lambda *args, **kwargs: pytest.fail('a connection'))
    weights = files('ddpm_nb')/'weights'
    assert {o.name for o in weights.iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert sum(o.stat().st_size for o in weights.iterdir()) < 5e6
    card = (weights/'README.md').read_text()
    assert re.search(r'held-out L1 \| 0\.1[0-3]', card) and 'floor' in card and '**Limits.**' in card
    d = Diffusion.from_pretrained(device='cpu')
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(faces('cat', 16).float()/127.5 - 1, 32, mode='area')
    assert d(x).item() < .3 # the loss; without training it is at 0.8
    images = d.sample(4)
    assert images.shape == (4, 3, 32, 32) and .1 < images.std() < .4
