"""Run notebooks as Colab does: top to bottom, each in a folder with nothing of the repository, with what is installed.

    python tests/run_notebooks.py [PART OF A NAME...]

It needs `ddpm_nb`, `nbclient` and `ipykernel`, and is for environments without the development requirements. A notebook
whose first cell installs an extra gets that extra, after all the others have run without.
"""
import os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from pages import cells, nbs, pages, sidebar, top


def notebooks():
    "All pages in the order of the sidebar; long experiments and tutorials on other machines are left out"
    return pages(*(sidebar().keys() - {'Experiments', 'Tutorials'}))


def extra(page):
    "The extra that a notebook's first cells install, such as `offline`, or ''"
    m = re.search(r'pip install[^\n]*ddpm_nb\[(\w+)\]', '\n'.join(cells(page)[:2]))
    return m[1] if m else ''


def run(page, timeout=600):
    "The seconds it took, and what went wrong or ''"
    nb, start = nbformat.read(nbs/page, 4), time.monotonic()
    os.environ['IN_TEST'] = '1' # as nbdev_test does: the tour then trains for a moment only
    with tempfile.TemporaryDirectory() as d:
        cwd = Path(d)/'content'
        cwd.mkdir()
        if page == 'benchmarks.ipynb': # its first cell clones the repository
            shutil.copytree(top/'benchmarks', Path(d)/'benchmarks')
        client = NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': cwd}})
        try: client.execute()
        except CellExecutionError as e: return time.monotonic() - start, str(e)
    return time.monotonic() - start, ''


if __name__ == '__main__':
    names, failed = sys.argv[1:], []
    todo = [(extra(p), p) for p in notebooks() if not names or any(o in p for o in names)]
    for what in sorted({o for o,_ in todo}):
        if what: subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', f'ddpm_nb[{what}]'], check=True)
        for page in [p for o,p in todo if o == what]:
            secs, error = run(page)
            line = f"{'failed' if error else 'passed'} {secs:5.0f} s  {page}{f' [{what}]' if what else ''}"
            print(line, error, sep='\n' if error else '', flush=True)
            if error: failed.append(page)
    print(f'{len(todo) - len(failed)} passed, {len(failed)} failed')
    sys.exit(bool(failed or not todo))
