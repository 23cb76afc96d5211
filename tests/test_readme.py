"`README.md` is made from `nbs/index.ipynb`: `python tests/test_readme.py` makes it, and the test says whether it was."
import re
from pathlib import Path

import nbformat

top = Path(__file__).parent.parent


def make():
    "The text of the README: the prose of the notebook, with links that lead from the top"
    text = '\n\n'.join(c.source for c in nbformat.read(top/'nbs'/'index.ipynb', 4).cells if c.cell_type == 'markdown')
    return re.sub(r'\]\((?!https?:|#)', '](nbs/', text) + '\n'


def test_readme_is_made_from_index():
    assert (top/'README.md').read_text() == make(), 'run python tests/test_readme.py'


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)\)', (top/'README.md').read_text())
    assert len(links) > 10
    assert [o for o in links if not o.startswith('http') and not (top/o).exists()] == []


def texts(name):
    "The prose of a notebook"
    return '\n'.join(o.source for o in nbformat.read(top/'nbs'/name, 4).cells if o.cell_type == 'markdown') + '\n'


def test_the_map_leads_to_headings_that_are_there():
    rows = re.findall(r'\[([A-Z\d][^\]]+)\]\(([\w/]+\.ipynb)[^)]*\)', texts('map.ipynb'))
    assert len(rows) >= 45
    for section, name in rows: assert f'# {section}\n' in texts(name), (name, section)


def test_the_map_has_every_question_and_equation():
    first = re.findall(r'^\| ([^|]+?) \|', texts('map.ipynb'), re.M)
    questions = '2.1.a 2.1.b 2.1.c.i 2.1.c.ii 3.1 3.2 4.1.a 4.1.b 4.1.c 4.1.d 5.1 5.2 5.3 6.1 6.2 6.3 6.4 6.5 7.1 7.2 7.3 7.4 7.5'.split()
    assert set(questions) <= set(first)
    assert sorted(int(n) for o in first if o.startswith('Eq.') for n in re.findall(r'\d+', o)) == [*range(1, 20)]


if __name__ == '__main__': (top/'README.md').write_text(make())
