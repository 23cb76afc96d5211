"What follows from the sidebar has been written since it changed: the index's tables, the map's last one, the README."
import re

import numpy as np, pytest
from PIL import Image

from pages import head, made, nbs, pages, picture, prose, readme, sidebar, small, top


@pytest.mark.parametrize('page', ['index.ipynb', 'map.ipynb'])
def test_tables_are_made(page):
    assert made(page) == (nbs/page).read_text(encoding='utf-8'), 'run python tests/pages.py'


def test_readme_is_made_from_index():
    assert (top/'README.md').read_text(encoding='utf-8') == readme(), 'run python tests/pages.py'


def test_readme_lists_every_page_once_in_the_order_of_the_sidebar():
    chapters = re.findall(r'^\| \[\d\d (.+?)\]\(nbs/([\w/]+\.ipynb)\) \| ([^|]+) \|', readme(), re.M)
    assert [o for _,o,_ in chapters] == pages('Course')
    for title, page, line in chapters: assert (title, line) == head(page)
    others = re.findall(r'^\| (\w+) \| (\[.+\)) \|$', readme(), re.M)
    assert [o.title() for o,_ in others] == [o for o in sidebar() if o not in ('', 'Course')]
    for section, links in others:
        found = re.findall(r'\[(.+?)\]\(nbs/([\w/]+\.ipynb)\)', links)
        assert found == [(head(o)[0], o) for o in pages(section.title())]


def test_map_goes_through_the_pages_in_the_order_of_the_sidebar():
    last = prose('map.ipynb').split('## Page by page')[1]
    found = re.findall(r'\]\(([\w/]+\.ipynb)\) \|', last)
    assert len(found) > 15 and found == [o for o in pages() if o in found]
    assert set(found) == set(re.findall(r'\]\(([\w/]+\.ipynb)', prose('map.ipynb')))


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)\)', (top/'README.md').read_text())
    assert len(links) > 40
    assert [o for o in links if not o.startswith('http') and not (top/o).exists()] == []


def test_the_map_leads_to_headings_that_are_there():
    tables = prose('map.ipynb').split('## Page by page')[0]
    rows = re.findall(r'\[([A-Z\d][^\]]+)\]\(([\w/]+\.ipynb)[^)]*\)', tables)
    assert len(rows) >= 45
    for section, page in rows: assert f'# {section}\n' in prose(page) + '\n', (page, section)


def test_the_map_has_every_question_and_equation():
    first = re.findall(r'^\| ([^|]+?) \|', prose('map.ipynb'), re.M)
    questions = '2.1.a 2.1.b 2.1.c.i 2.1.c.ii 3.1 3.2 4.1.a 4.1.b 4.1.c 4.1.d 5.1 5.2 5.3 6.1 6.2 6.3 6.4 6.5 ' \
                '7.1 7.2 7.3 7.4 7.5'.split()
    assert set(questions) <= set(first)
    assert sorted(int(n) for o in first if o.startswith('Eq.') for n in re.findall(r'\d+', o)) == [*range(1, 20)]


def test_the_pictures_of_the_chapters_are_theirs():
    for o in pages('Course'):
        mine, theirs = Image.open(nbs/small(o)), picture(o)[0]
        assert mine.size == theirs.size and picture(o)[1], f'{o}: run python tests/pages.py'
        apart = np.abs(np.asarray(mine, float) - np.asarray(theirs)).mean()
        assert apart < 10, f'{o}: run python tests/pages.py'
