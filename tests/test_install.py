"The package on its own: what an import brings along, and an installation with the newest of everything."
import ast, subprocess, sys
from pathlib import Path

from conftest import TINY, command

top = Path(__file__).parent.parent


def test_sampling_needs_neither_fastai_nor_matplotlib():
    code = 'import sys, ddpm_nb.diffusion, ddpm_nb.sampling; print([m for m in ("fastai", "matplotlib", "IPython") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_modules_import_only_from_the_floors_below():
    order = [p.stem.split('_', 1)[1] for p in sorted((top/'nbs').glob('[0-9]*.ipynb'))]
    assert order[0] == 'core' and order[-1] == 'train'
    for i,m in enumerate(order):
        tree = ast.parse((top/'ddpm_nb'/f'{m}.py').read_text())
        used = [o.module.removeprefix('ddpm_nb.') for o in ast.walk(tree) if isinstance(o, ast.ImportFrom) and (o.level or o.module.startswith('ddpm_nb.'))]
        assert used or m == 'core'
        assert [o for o in used if o not in order[:i]] == [], m


def test_newest_stack_trains_samples_and_visualizes(newest, pics, tmp_path):
    r = command('python', '-c', 'import importlib.util as u; print([m for m in ("nbdev", "wandb", "tensorboard") if u.find_spec(m)])', bin=newest, cwd=tmp_path)
    assert r.stdout.strip() == '[]'
    for args in (['ddpm_train', '--data_path', pics, '--train_steps', 3, '--save_and_sample_every', 2, *TINY],
                 ['ddpm_sample', '--n', 3], ['ddpm_visualize', '--data_path', pics, '--n_samples', 2]):
        r = command(*args, bin=newest, cwd=tmp_path)
        assert r.returncode == 0, r.stderr[-3000:]
    assert (tmp_path/'samples/00002.png').exists() and (tmp_path/'results/forward_diffusion.png').exists()
