"What `python -m build` makes: the files that belong in it and no others, and metadata that PyPI takes."
import email, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from trove_classifiers import classifiers

import ddpm_nb

top = Path(__file__).parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(top/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def files(*folders):
    "What is of the project in `folders`, without what git ignores"
    ls = ['git', 'ls-files', '-z', '-co', '--exclude-standard', *folders]
    names = subprocess.check_output(ls, cwd=top, text=True).split('\0')
    return [o for o in names if o and (top/o).exists()]


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "A folder with the sdist, and the wheel that was built from the sdist"
    src = tmp_path_factory.mktemp('package')/'src' # a copy: an earlier `build/` or `egg-info` would get into the wheel
    for o in files():
        (src/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(top/o, src/o)
    r = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', src], cwd=src, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return src/'dist'


@pytest.fixture(scope='module')
def wheel(dist):
    "Name to content of the wheel"
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as z: return {o: z.read(o) for o in z.namelist()}


@pytest.fixture(scope='module')
def meta(wheel): return email.message_from_bytes(next(v for k,v in wheel.items() if k.endswith('/METADATA')))


def in_package(): return set(files('ddpm_nb'))


def test_the_package_has_modules_and_data_only():
    known = r'ddpm_nb/((kit/)?\w+\.py|py\.typed|weights/(model\.safetensors|config\.json|README\.md))'
    assert [o for o in in_package() if not re.fullmatch(known, o)] == [] and 'ddpm_nb/py.typed' in in_package()


def test_wheel_has_the_package_and_nothing_else(wheel):
    info = f"ddpm_nb-{cfg['version']}.dist-info/"
    about = 'METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'top_level.txt', 'licenses/LICENSE'
    assert set(wheel) == in_package() | {info + o for o in about}
    assert all(wheel[o] == (top/o).read_bytes() for o in in_package())
    assert wheel[info + 'licenses/LICENSE'] == (top/'LICENSE').read_bytes()


def test_sdist_has_what_builds_it_and_nothing_else(dist):
    root = f"ddpm_nb-{cfg['version']}/"
    with tarfile.open(next(dist.glob('*.tar.gz'))) as t:
        names = {o.name.removeprefix(root) for o in t.getmembers() if o.isfile()}
    made = {o for o in names if o in ('PKG-INFO', 'setup.cfg') or o.startswith('ddpm_nb.egg-info/')}
    builds = {'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md'}
    assert names - made == in_package() | builds


def test_the_version_has_one_place(meta):
    assert meta['Version'] == ddpm_nb.__version__ == cfg['version']


def test_the_changelog_keeps_its_form():
    text = (top/'CHANGELOG.md').read_text()
    heads = re.findall(r'^## (.*)$', text, re.M)
    dated = r'\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d'
    assert heads[0] == '[Unreleased]' and [o for o in heads[1:] if not re.fullmatch(dated, o)] == []
    kinds = {'Added', 'Changed', 'Deprecated', 'Removed', 'Fixed', 'Security'}
    assert set(re.findall(r'^### (.*)$', text, re.M)) <= kinds
    for o in heads: assert re.search(rf"^{re.escape(o.split(' ')[0])}: {cfg['git_url']}/", text, re.M), o


def test_metadata_is_complete(meta):
    urls = dict(o.split(', ') for o in meta.get_all('Project-URL'))
    assert set(urls) == {'Documentation', 'Source', 'Issues', 'Changelog'}
    assert urls['Source'] == cfg['git_url'] and urls['Documentation'] == cfg['doc_host'] + cfg['doc_baseurl']
    assert meta['License-Expression'] == 'Apache-2.0 AND CC-BY-NC-4.0' # the code, and the weights
    assert meta['Requires-Python'] == f">={cfg['min_python']}"
    classes = meta.get_all('Classifier')
    assert [o.split()[-1] for o in classes if re.search(r':: 3\.\d+$', o)] == cfg['python_versions'].split()
    assert 'Typing :: Typed' in classes
    assert not [o for o in classes if o.startswith('License')] # the expression is in their place
    extras = {'offline', 'processes', 'wandb', 'tensorboard', 'heic', 'bench', 'dev'}
    assert set(meta.get_all('Provides-Extra')) == extras


def test_classifiers_are_known(meta):
    assert [o for o in meta.get_all('Classifier') if o not in classifiers] == []


def test_pypi_takes_the_readme_and_its_links_lead_out(dist, meta):
    check = [sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir()]
    r = subprocess.run(check, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    text = meta.get_payload()
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert len(links) > 10 and [o for o in links if not o.startswith(('https://', '#'))] == []
    for o in links: # what is of this repository is in it
        m = re.match(rf"{cfg['git_url']}/(?:blob|raw)/{cfg['branch']}/([^#]+)", o)
        assert not m or (top/m[1]).exists(), o
    assert f"{cfg['git_url']}/raw/{cfg['branch']}/nbs/images" in text


def test_installed_requirements_fit():
    r = subprocess.run([sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout
