"""Our networks and the peers' on the same work, in turn A B A B, medians and ratios.

    pip install -e '.[bench]'
    python benchmarks/bench.py                                   # step, sample, memory, growth, score: 25 minutes
    python benchmarks/bench.py --what quality --data animals.zip # time to a held-out loss: 10 minutes more
    python benchmarks/bench.py --what plain --data animals.zip   # what the speed costs in quality: 10 minutes more
    python benchmarks/bench.py --what compile                    # what torch.compile would change: 5 minutes
    python benchmarks/bench.py --device cuda                     # on a GPU, step, sample and train: 5 minutes

Each line of work runs in a process of its own for each competitor and round. A competitor's setting (precision and
memory layout, and for sampling the images at a time) is the best of those tried, ours included. On a GPU all are
channels last: the peers eager in fp32 or bf16, or compiled; ours as this package runs them, in bf16 and as CUDA graphs.
Results go to results.json, with a description of the machine.
"""
import json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch
import torch.nn.functional as F

from ddpm_nb.kit.checks import refuse
from ddpm_nb.kit.commands import command

HERE = Path(__file__).parent
OURS, PEERS = ('assignment', 'lean'), ('diffusers', 'denoising-diffusion-pytorch')
STEPS, DEV = 50, os.environ.get('DEVICE', 'cpu')


class Sample(torch.nn.Module):
    "A network of diffusers as a function to its `sample`"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x, t): return self.net(x, t).sample


def network(name, dim=16, size=32):
    "A network of that name, as a function of (x, t)"
    torch.manual_seed(0)
    if name in OURS:
        from ddpm_nb.kit.fast import fast
        from ddpm_nb.unet import Unet
        return fast(Unet(dim, attention='all' if name == 'assignment' else 'none'))
    if name == 'diffusers':
        from diffusers import UNet2DModel
        return Sample(UNet2DModel(sample_size=size, block_out_channels=(dim, 2*dim, 4*dim, 8*dim),
                                  layers_per_block=2, norm_num_groups=8,
                                  down_block_types=('DownBlock2D',)*3 + ('AttnDownBlock2D',),
                                  up_block_types=('AttnUpBlock2D',) + ('UpBlock2D',)*3))
    from denoising_diffusion_pytorch import Unet
    return Unet(dim)


def ready(name, last, mode, *args):
    "A network on the device, in its layout, as it is ('eager'), 'compiled', or to be recorded as a 'graph'"
    net = network(name, *args).to(DEV)
    if last: net.to(memory_format=torch.channels_last)
    if mode == 'compiled': net.compile(mode='reduce-overhead')
    return net


def now():
    "Seconds on the clock, when the device is done"
    if DEV == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()


def medians(f, n=9, warm=3):
    "Median seconds of `f`"
    for _ in range(warm): f()
    ts = []
    for _ in range(n): start = now(); f(); ts.append(now() - start)
    return statistics.median(ts)


def settings(name):
    "bf16, channels_last and mode to try; our networks choose their own layout; a GPU has but five minutes"
    if DEV == 'cuda' and name in OURS: return [(True, True, 'graph')]
    if DEV == 'cuda': return [(False, True, 'eager'), (True, True, 'eager'), (True, True, 'compiled')]
    return [(b, l, 'eager') for b in (False, True) for l in ((True,) if name in OURS else (False, True))]


def step(name, bf16, last, mode='eager', batch=None, size=32, dim=16, n=9):
    "Seconds of one forward, backward and Adam step, on a GPU of the 64 images that training takes at once"
    batch = batch or (64 if DEV == 'cuda' else 32)
    net = ready(name, last, mode, dim, size)
    opt = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    x = torch.randn(batch, 3, size, size, device=DEV)
    if mode == 'graph':
        from ddpm_nb.diffusion import Diffusion
        from ddpm_nb.kit.fast import Captured, TrainStep
        d = Diffusion(net, image_size=size, timesteps=STEPS).to(DEV)
        whole = Captured(TrainStep(d, opt, torch.bfloat16 if bf16 else None)) # noising and draws are in it too
        seconds = medians(lambda: whole(x), n, 5)
        assert all(v is not whole.f for v in whole.seen.values()), 'nothing was recorded'
        return seconds
    if last: x = x.contiguous(memory_format=torch.channels_last)
    noise, t = torch.randn_like(x), torch.randint(0, STEPS, (batch,), device=DEV)
    def f():
        with torch.autocast(DEV, torch.bfloat16, enabled=bf16): loss = F.l1_loss(net(x, t).float(), noise)
        loss.backward(); opt.step(); opt.zero_grad()
    return medians(f, n)


def compiled(mode):
    "Seconds of the lean network's first step, and of a later one, compiled or eager"
    start, on = time.perf_counter(), mode
    step('lean', True, True, on, n=1)
    return dict(first=time.perf_counter() - start, later=step('lean', True, True, on))


def sample(name, bf16, last, mode, chunk, images=512, steps=STEPS):
    "Seconds an image for `images` of them by `steps` reverse steps, `chunk` at a time; compiling is not counted"
    from ddpm_nb.schedule import make_schedule
    from ddpm_nb.posterior import p_mean_std
    net, sched = ready(name, last, mode).eval(), make_schedule(timesteps=STEPS).to(DEV)
    if mode == 'graph':
        from ddpm_nb.kit.fast import Captured
        net = Captured(net)
    def one(steps):
        x = torch.randn(chunk, 3, 32, 32, device=DEV)
        if last: x = x.contiguous(memory_format=torch.channels_last)
        for i in reversed(range(STEPS - steps, STEPS)):
            t = torch.full((chunk,), i, device=DEV)
            with torch.autocast(DEV, torch.bfloat16, enabled=bf16): e = net(x, t).float()
            mean, std, _ = p_mean_std(sched, x, t, e)
            x = mean + std*torch.randn_like(x)
    with torch.no_grad():
        if DEV == 'cuda': one(5)
        start = now()
        for _ in range(0, images, chunk): one(steps)
        return (now() - start)/(-(-images//chunk)*chunk)


def train(steps, data):
    "On a GPU: seconds of `ddpm_train` at the defaults in all, to its first step, and of a later one; of 512 samples"
    from fastai.callback.core import Callback
    begin, every = time.perf_counter(), 100
    from ddpm_nb import train as t
    class Clock(Callback):
        run_valid, at = False, {} # when the first and the last step of each epoch were done
        def after_batch(self):
            if self.learn.ddpm.steps % every < 2: self.at[self.learn.ddpm.steps] = now()
    make = t.ddpm_learner
    t.ddpm_learner = lambda *args, cbs, **kwargs: make(*args, cbs=[*cbs, Clock()], **kwargs)
    with tempfile.TemporaryDirectory() as d:
        learn = t.train_diffusion(steps, every, save_folder=d, data_path=data, device=DEV)
    whole, at = now() - begin, Clock.at
    a_step = statistics.median((at[i + every] - at[i + 1])/(every - 1) for i in range(every, steps, every))
    return dict(steps=steps, seconds=whole, first=at[1] - begin, step=a_step,
                sample_512=medians(lambda: learn.sample(512), 3, 1), held_out=float(learn.recorder.values[-1][1]))


def memory(what, n):
    "Peak memory in MiB of training at the defaults for 20 steps, or of sampling `n` images"
    from ddpm_nb.train import train_diffusion
    from ddpm_nb.train import sample_diffusion
    with tempfile.TemporaryDirectory() as d:
        if what == 'train': train_diffusion(n, n, save_folder=f'{d}/run')
        else: sample_diffusion('pretrained', n, f'{d}/new', 'ddim', steps=1) # what counts is the number of images
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def score(which):
    "Seconds for the features of 512 images, from memory or by clean-fid's folder route"
    from ddpm_nb.kit.faces import faces
    from ddpm_nb.kit.scores import get_network
    net, x = get_network('efficientnet-lite0'), faces('cat', 512, size=32)
    if which == 'ours': return medians(lambda: net(x, 'cpu'), 1, 1)
    from cleanfid.fid import get_folder_features
    from torchvision.utils import save_image
    net.f.to(memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as d:
        for i,o in enumerate(x): save_image(o/255, f'{d}/{i}.png')
        cpu = torch.device('cpu')
        return medians(lambda: get_folder_features(d, net.f, device=cpu, verbose=False), 1, 1)


def quality(name, bf16, last, data, goal=.157, most=1000, every=25, own=True):
    "Seconds of training, without validation, to a held-out loss of `goal`; and the losses. Not `own`: plain modules"
    from fastai.callback.core import Callback, CancelFitException
    from ddpm_nb.diffusion import Diffusion
    from ddpm_nb.kit.data import image_dls
    from ddpm_nb.kit.fast import plain
    from ddpm_nb.kit.processes import seed_everything
    from ddpm_nb.learner import ddpm_learner
    class Watch(Callback):
        order, rows, spent = 100, [], 0.
        def before_train(self): self.start = time.perf_counter()
        def after_train(self): Watch.spent += time.perf_counter() - self.start
        def after_epoch(self):
            Watch.rows.append((self.learn.ddpm.steps, Watch.spent, float(self.learn.recorder.values[-1][1])))
        def before_epoch(self):
            if Watch.rows and Watch.rows[-1][2] <= goal: raise CancelFitException
    seed_everything(2024)
    net = network(name)
    if last: net.to(memory_format=torch.channels_last)
    d = Diffusion(net, image_size=32, timesteps=STEPS)
    learn = ddpm_learner(image_dls(data, epoch_size=every*64), diffusion=d, cbs=Watch())
    if not own: plain(net)
    if bf16: learn.to_bf16()
    with learn.no_bar(), learn.no_logging(): learn.fit(most//every)
    return dict(seconds=Watch.spent, steps=Watch.rows[-1][0], loss=Watch.rows[-1][2], rows=Watch.rows)


def held_out(name, plain, data, steps=1000):
    "Seconds of training and held-out loss after `steps`: at the defaults, or in float32 with plain modules"
    r = quality(name, not plain, True, data, goal=0, most=steps, every=steps, own=not plain)
    return dict(seconds=r['seconds'], loss=r['loss'])


def limit(bf16):
    "GFLOP/s of a product of two large matrices"
    a = torch.randn(2048, 2048, dtype=torch.bfloat16 if bf16 else torch.float32, device=DEV)
    return 2*2048**3/medians(lambda: a@a)/1e9


def apart(f, *args):
    "`f(*args)` in a process of its own; ours keeps freed memory, which is its default, and `KEEP` lets the peers too"
    keep = args[0] not in PEERS or bool(os.environ.get('KEEP'))
    code = f"import sys, json; sys.path.insert(0, {str(HERE)!r}); import bench, ddpm_nb.kit.fast as k\n" \
           f"if {keep}: k.keep_freed_memory()\n" \
           f"print('=>', json.dumps(bench.{f.__name__}(*{args!r})))"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    if r.returncode: sys.exit(f'{f.__name__}{args}\n{r.stderr}')
    return json.loads(r.stdout.rsplit('=>', 1)[1])


def machine():
    "What the figures were measured on"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((l.split(':')[1].strip() for l in lines if 'model name' in l), platform.processor())
    gpu = dict(gpu=torch.cuda.get_device_name()) if DEV == 'cuda' else {}
    return dict(**gpu, cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version(), system=platform.system(),
                gflops_fp32=round(apart(limit, False)), gflops_bf16=round(apart(limit, True)))


def in_turn(f, names, choices, rounds, *more):
    "For each name the best of its choices, then rounds A B A B with it: {name: dict(setting, times, median)}"
    def cost(n, c):
        try: return apart(f, n, *c, *more)
        except SystemExit as e:
            if DEV == 'cpu': raise
            print(f'{n} {c}: {str(e)[-300:]}') # such as a peer that does not compile
            return float('inf')
    best = {n: min(choices(n), key=lambda c: cost(n, c)) for n in names}
    times = {n: [] for n in names}
    for _ in range(rounds):
        for n in names: times[n].append(apart(f, n, *best[n]))
    return {n: dict(setting=best[n], times=times[n], median=statistics.median(times[n])) for n in names}


def show(title, res, unit=1e3):
    "One table: medians, and ratios to the peers"
    print(f'\n{title}')
    for n,r in res.items():
        ratios = '  '.join(f"{r['median']/res[p]['median']:5.2f} of {p}" for p in PEERS if p in res)
        print(f"  {n:28} {r['median']*unit:9.2f}  {ratios}  {r['setting']}")


def bench(
    what:str='all', # 'all', or one of step, step_keep, sample, memory, score, growth, quality, plain, compile, train
    data:str=None, # Folder or zip file of images for quality, plain and train
    device:str='cpu', # 'cpu', or 'cuda' for step, sample and train
    steps:int=1000, # Steps of train, a multiple of 100
    rounds:int=4, # Rounds of A B A B
    out:str=str(HERE/'results.json'), # Where the results go; kept results of other work stay
):
    "Measure, print, and keep"
    global DEV
    of_gpu = ('step', 'sample', 'train')
    if device != 'cpu' and (device != 'cuda' or what not in ('all', *of_gpu)):
        refuse(f'device must be cpu, or cuda for step, sample and train, but is {device!r} for {what}')
    wanted = lambda k: what == k or what == 'all' and (device == 'cpu' or k in of_gpu)
    os.environ['DEVICE'] = DEV = device
    names, out = OURS + PEERS, Path(out)
    kept, rounds = json.loads(out.read_text()) if out.exists() else {}, rounds if device == 'cpu' else min(rounds, 2)
    res = kept if DEV == 'cpu' else kept.setdefault(DEV, {})
    res['machine'] = machine()
    print(res['machine'])
    for key in ('step', 'step_keep'):
        if not wanted(key): continue
        os.environ['KEEP'] = '1' if key == 'step_keep' else ''
        res[key] = in_turn(step, names, settings, rounds)
        kept_too = ', freed memory kept for all'*(key == 'step_keep')
        show(f"training, ms for a step of {64 if DEV == 'cuda' else 32} images{kept_too}", res[key])
    os.environ['KEEP'] = ''
    if wanted('sample'):
        choices = lambda n: [(*s, c) for s in settings(n) for c in ((32, 64, 128) if DEV == 'cpu' else (512,))]
        res['sample'] = in_turn(sample, OURS + PEERS[:1], choices, min(rounds, 2), 128, 4)
        show('sampling 512 images at T = 50, ms an image', res['sample'])
    if what == 'train' or DEV == 'cuda' and wanted('train'):
        res['train'] = apart(train, steps, data)
        print(f'\nddpm_train for {steps} steps, s', res['train'])
    if wanted('memory'):
        work = ('train', 20), ('sample', 100), ('sample', 10_000)
        res['memory'] = {f'{w} {n}': apart(memory, w, n) for w,n in work}
        print('\npeak memory, MiB', res['memory'])
    if wanted('score'):
        res['score'] = {k: [apart(score, k) for _ in range(2)] for k in ('ours', 'clean-fid')}
        print('\nfeatures of 512 images, s', res['score'])
    if wanted('growth'):
        usual = dict(batch=32, size=32, dim=16)
        axes = dict(batch=(8, 16, 32, 64, 128), size=(16, 32, 64), dim=(8, 16, 32))
        grow = lambda n, **kw: apart(step, n, True, n in OURS, 'eager', *(usual | kw).values(), 5)
        over_t = lambda n: [(t, apart(sample, n, True, n in OURS, 'eager', 64, 64, t)) for t in (10, 25, 50)]
        names = OURS + PEERS[:1]
        res['growth'] = {k: {n: [(v, grow(n, **{k: v})) for v in vs] for n in names} for k,vs in axes.items()}
        res['growth']['T'] = {n: over_t(n) for n in names}
        print('\ngrowth', json.dumps(res['growth']))
    if what == 'quality':
        res['quality'] = {}
        for n in ('diffusers', 'lean', 'assignment'):
            setting = res['step'][n]['setting']
            r = res['quality'][n] = dict(setting=setting, **apart(quality, n, *setting[:2], data))
            out.write_text(json.dumps(kept, indent=1))
            ratio = r['seconds']/res['quality']['diffusers']['seconds']
            print(f"{n:14} {r['seconds']:6.0f} s to {r['loss']:.4f} at step {r['steps']}  {ratio:.2f} of diffusers")
    if what == 'plain':
        res['plain'] = {n: {k: apart(held_out, n, k == 'plain', data) for k in ('default', 'plain')} for n in OURS}
        for n,r in res['plain'].items():
            ours, plain = r['default']['loss'], r['plain']['loss']
            print(f'{n:12} {ours:.5f} at the defaults, {plain:.5f} in fp32 with plain modules: {ours/plain:.3f}')
    if what == 'compile':
        res['compile'] = {k: apart(compiled, k) for k in ('eager', 'compiled')}
        print('\ntorch.compile', res['compile'])
    out.write_text(json.dumps(kept, indent=1))


if __name__ == '__main__': command(bench)()
