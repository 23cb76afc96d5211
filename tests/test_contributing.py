"`CONTRIBUTING.md` and the workflows on GitHub: the programs in the one run, the steps of the others are in it."
import re
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml

top = Path(__file__).parent.parent
text = (top/'CONTRIBUTING.md').read_text()
workflows = sorted((top/'.github'/'workflows').glob('*.yml'))
programs = re.findall(r'^## Add an? ([\w ]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```', text, re.M | re.S)


@pytest.mark.parametrize('name,src', programs, ids=[o for o,_ in programs])
def test_program_runs_as_written(name, src, tmp_path, monkeypatch):
    from ddpm_nb.sampling import SAMPLERS
    from ddpm_nb.schedule import SCHEDULES
    monkeypatch.chdir(tmp_path)
    for d in (SAMPLERS, SCHEDULES): # what a program registers is gone after it
        for k in ('means', 'power'): monkeypatch.setitem(d, k, None); monkeypatch.delitem(d, k)
    assert len(src.splitlines()) < 30 and re.search(r'^test_\w+\(', src, re.M)
    exec(compile(src, f'CONTRIBUTING.md, Add a {name}', 'exec'), {'__name__': 'contributing'})


def test_there_is_a_program_of_each_kind():
    assert [o for o,_ in programs] == ['sampler', 'schedule', 'data set'] and text.count('```python') == 3


def test_links_lead_somewhere():
    for name in ('CONTRIBUTING.md', 'SECURITY.md', 'CODE_OF_CONDUCT.md', 'CHANGELOG.md'):
        links = re.findall(r'\]\(([^)#]+)\)', (top/name).read_text())
        assert links and [o for o in links if not o.startswith('https://') and not (top/o).exists()] == [], name


@pytest.mark.parametrize('path', workflows, ids=[p.stem for p in workflows])
def test_workflow_is_careful_and_written_down(path):
    w = yaml.safe_load(path.read_text())
    assert w['permissions'] == {'contents': 'read'} and w['concurrency']['group'].startswith(path.stem)
    for name,job in w['jobs'].items():
        if 'steps' not in job: assert (top/job['uses']).exists(); continue
        assert job['timeout-minutes'] <= 120, name
        if job.get('permissions'): assert job['environment']['name'] in ('pypi', 'github-pages')
        for s in job['steps']:
            if 'uses' in s:
                assert re.fullmatch(r'(actions|quarto-dev|pypa)/[\w/-]+@(v\d+|release/v\d+)', s['uses'])
                if 'checkout' in s['uses']: # the default keeps a token where any step can read it
                    assert s['with']['persist-credentials'] is False
            else:
                assert s['run'] in text, s['run']
                assert '${{' not in s['run'] # what GitHub pastes into a command can be chosen by others


def test_tested_versions_are_those_of_the_metadata():
    ini = ConfigParser(delimiters=['='])
    ini.read(top/'settings.ini')
    jobs = yaml.safe_load((top/'.github/workflows/test.yml').read_text())['jobs']
    matrix = jobs['develop']['strategy']['matrix']
    assert matrix['python'] == ini['DEFAULT']['python_versions'].split()
    assert {o.split('-')[0] for o in matrix['os']} == {'ubuntu', 'macos'}
