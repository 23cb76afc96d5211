"Build `ddpm_nb` from `settings.ini`, the one place where names, versions and requirements are written."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name, repo, branch = cfg['lib_name'], cfg['git_url'], cfg['branch']
versions = ['3', '3 :: Only', *cfg['python_versions'].split()]
extras = {k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')}

# Links that lead into the repository need its address where the README is shown elsewhere
readme = (here/'README.md').read_text(encoding='utf-8')
readme = re.sub(r'(!\[[^\]]*\]\()(?!https?:|#)', rf'\1{repo}/raw/{branch}/', readme)
readme = re.sub(r'((?<!!)\[[^\]]*\]\()(?!https?:|#)', rf'\1{repo}/blob/{branch}/', readme)

setup(
    name=name,
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['doc_host'] + cfg['doc_baseurl'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl'], 'Source': repo, 'Issues': f'{repo}/issues',
                  'Changelog': f'{repo}/blob/{branch}/CHANGELOG.md'},
    keywords=cfg['keywords'].split(),
    license_expression='Apache-2.0 AND CC-BY-NC-4.0', # the code, and the weights in weights/
    license_files=['LICENSE'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Education',
                 f"Intended Audience :: {cfg['audience']}",
                 'Operating System :: OS Independent', 'Framework :: Jupyter', 'Typing :: Typed',
                 *[f'Programming Language :: Python :: {o}' for o in versions],
                 'Topic :: Education', 'Topic :: Multimedia :: Graphics',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence',
                 'Topic :: Scientific/Engineering :: Image Processing'],
    packages=find_packages(include=[name, f'{name}.*']),
    package_data={name: ['py.typed', 'weights/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{name}={name}._modidx:d']},
)
