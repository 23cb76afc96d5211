"""The share of the mutants that the tests caught, by module, after `mutmut run`; fails below `AIM`."""
import json, sys
from collections import Counter
from pathlib import Path

AIM = .9
SURVIVED, UNTESTED = 0, 33 # mutmut's exit codes; any other is a test that failed, or took too long


def counts(path):
    "Caught, survived and untested mutants of a module"
    codes = json.loads(path.read_text())['exit_code_by_key'].values()
    return Counter({SURVIVED: 'survived', UNTESTED: 'untested', None: 'not tried'}.get(o, 'caught') for o in codes)


def main(folder='mutants/ddpm_nb'):
    total = Counter()
    for path in sorted(Path(folder).rglob('*.meta')):
        c = counts(path)
        total += c
        print(f'{path.stem:15} {c["caught"]/c.total():6.1%} of {c.total():4} caught', *(
            f', {c[k]} {k}' for k in ('survived', 'untested', 'not tried') if c[k]), sep='')
    share = total['caught']/max(total.total(), 1)
    print(f'{"all":15} {share:6.1%} of {total.total():4} caught')
    return share < AIM


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
