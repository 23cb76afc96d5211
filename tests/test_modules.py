"The checks of a notebook hold for the module that it makes too, with nothing else of the notebook at hand"
import importlib, warnings

import matplotlib, pytest
from test_mutants import NBS, code_cells


@pytest.mark.parametrize('name', ['01_schedule', '03_posterior', '05_loss'])
def test_checks_hold_for_the_module(name, monkeypatch):
    monkeypatch.chdir(NBS)
    matplotlib.use('Agg')
    warnings.simplefilter('ignore')
    module = importlib.import_module(f"ddpm_nb.{name.split('_', 1)[1]}")
    ns = {'__name__': name}
    for src in code_cells(name):
        exec(src, ns)
        if '#| export' in src: ns.update({k: getattr(module, k) for k in module.__all__ if k in ns})
    assert all(ns[k] is getattr(module, k) for k in module.__all__)
    matplotlib.pyplot.close('all')
