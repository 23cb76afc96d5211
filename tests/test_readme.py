"`README.md` is made from `nbs/index.ipynb`: `python tests/test_readme.py` makes it, and the test says whether it was."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

top = Path(__file__).parent.parent
pics = top/'nbs'/'index_files'


def make():
    "The text of the README, and the pictures in it by file name"
    nb = nbformat.read(top/'nbs'/'index.ipynb', 4)
    nb.metadata.language_info = dict(name='python')
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
    alts = [m[1] for c in nb.cells if (m := re.search(r'^#\|\s*fig-alt: "(.*)"', c.source, re.M))]
    for c in nb.cells: c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    text, res = MarkdownExporter().from_notebook_node(nb, dict(output_files_dir='nbs/index_files'))
    text = re.sub(r'\]\(([\w/]+\.ipynb)\)', r'](nbs/\1)', text)
    for alt in alts: text = re.sub(r'!\[(?:png|svg)\]', f'![{alt}]', text, count=1)
    return text.strip() + '\n', {Path(k).name: v for k,v in res['outputs'].items()}


def test_readme_is_made_from_index():
    text, files = make()
    assert (top/'README.md').read_text() == text, 'run python tests/test_readme.py'
    assert {p.name: p.read_bytes() for p in pics.iterdir()} == files


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)\)', (top/'README.md').read_text())
    assert len(links) > 10
    assert [o for o in links if not o.startswith('http') and not (top/o).exists()] == []


if __name__ == '__main__':
    text, files = make()
    (top/'README.md').write_text(text)
    pics.mkdir(exist_ok=True)
    for p in pics.iterdir(): p.unlink()
    for k,v in files.items(): (pics/k).write_bytes(v)


def texts(name):
    "The prose of a notebook"
    return '\n'.join(o.source for o in nbformat.read(top/'nbs'/name, 4).cells if o.cell_type == 'markdown') + '\n'


def test_the_map_leads_to_headings_that_are_there():
    rows = re.findall(r'\| \[(.+?)\]\((.+?)\) \|', texts('map.ipynb'))
    assert len(rows) >= 30
    for section, name in rows: assert f'# {section}\n' in texts(name), (name, section)
