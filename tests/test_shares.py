"Three processes evaluate one batch that can't be divided by three, and all get what one would."
import os, sys

import pytest
from conftest import ranks, server

from ddpm_nb.kit import processes

PROGRAM = '''
import copy, os, torch
from ddpm_nb.kit.processes import *

class Model(torch.nn.Module):
    bias = 1.
    def denoise(self, x, t): self.n = len(x); return x*t[:, None] + self.bias

assert join_processes('cpu') == torch.device('cpu') and world() == 3
x, t, m = torch.arange(21.).view(7, 3), torch.arange(7), Model()
want = m.denoise(x, t)
assert shared(m) is m and torch.equal(m.denoise(x, t), want) and m.n == 3
c = copy.deepcopy(m)
c.bias = 5. # a copy is shared too, with its own numbers
assert torch.equal(c.denoise(x, t), want + 4) and torch.equal(m.denoise(x, t), want)
assert torch.equal(m.denoise(x[:1], t[:1]), want[:1]) # fewer than processes
assert everywhere(True) and not everywhere(rank() == 0)
print('one speaks')
torch.distributed.destroy_process_group()
'''


def one_of_three(env, path):
    os.environ.update(env)
    with open(path/env['RANK'], 'w') as sys.stdout: exec(PROGRAM, {})


@pytest.mark.xdist_group('processes')
def test_three_processes(tmp_path):
    three = [server.Process(target=one_of_three, args=(o, tmp_path)) for o in ranks(3, 30500 + os.getpid() % 1000)]
    for p in three: p.start()
    for p in three: p.join(120)
    assert [p.exitcode for p in three] == [0]*3
    assert [(tmp_path/o).read_text() for o in '012'] == ['one speaks\n', '', '']


@pytest.mark.parametrize('n', [1, 2, 6, 7])
def test_shares_cover_the_batch(n, monkeypatch):
    monkeypatch.setattr(processes, 'world', lambda: 3)
    shares = []
    for i in range(3):
        monkeypatch.setattr(processes, 'rank', lambda: i)
        shares.append(processes.my_share(n))
    assert len({len(o) for o in shares}) == 1 and sum(shares, [])[:n] == list(range(n))
