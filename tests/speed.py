"""What learning costs on this machine: python -m tests.speed [--quick] [--threads N] [--device cuda]

With --tiny everything is measured once with networks of a few units, which says nothing but that it works.

Times are those of the scripts' own `update` and `train_model` at the paper's sizes on HalfCheetah-v4. What is
compared runs in turns in one process and the median is shown, so that ratios hold on a busy machine.
"""

import argparse
import contextlib
import fcntl
import gc
import importlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import maac_sac
from common import one_line
from common.acceleration import WARM_UP, accelerate
from common.args import parse_args
from tests.conftest import ROOT, SCRIPTS, script, tiny
from tests.inner_functions import fill, inner_functions
from tests.transcription import mage_terms

ENV = ["--env-id", "HalfCheetah-v4"]
CLEANRL = [*ENV, "--actor-hidden", "256", "--critic-hidden", "256", "--batch-size", "256"]
SIZES = []  # not empty: those of the tests (--tiny)


class Count(TorchDispatchMode):
    """Floating-point operations in matrix products (PyTorch's own counter fails at a double backward), and
    launches: the operations of PyTorch that would start work on a GPU.

    What only looks at memory in another way, allocates it, or reads a number of it back starts none. Nor does
    what touches CPU tensors alone while the networks are on a GPU. On a CPU the counters of the optimisers
    cannot be told from the rest, so that each step of an optimiser counts one operation too many. An
    operation on a list of tensors counts once, and one that PyTorch carries out by several kernels too.
    """

    IDLE = ("_local_scalar_dense", "_unsafe_view", "squeeze_", "unsqueeze_", "t_", "transpose_", "detach_")

    def __init__(self, device):
        super().__init__()
        self.device, self.flop, self.launches = device, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        name = func.overloadpacket.__name__
        idle = func.is_view or func.namespace != "aten" or name in self.IDLE or "empty" in name
        touched = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        self.launches += not idle and any(x.device.type == self.device.type for x in touched)
        return out


def counted(job, device):
    """GFLOP and launches of a job, once it has made what it keeps."""
    job()
    with Count(device) as count:
        job()
    return count.flop / 1e9, count.launches


def seconds(jobs, turns, device):
    """Median time of every job {name: function}, all in each turn -> {name: seconds}. A job runs twice
    in a turn and the second one counts: what lay idle may have left the caches, or the memory.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in jobs}
    for job in jobs.values():
        for _ in range(WARM_UP + 1 if device.type == "cuda" else 1):  # until a graph is replayed
            job()
    for _ in range(turns):
        for name, job in jobs.items():
            job()
            wait()
            start = time.perf_counter()
            job()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items() if values}


def matmul_rate(device):
    """GFLOP/s of a product of two square matrices in float32, the best of 30."""
    n = side(device)
    a, b = torch.randn(2, n, n, device=device)
    return 2 * n**3 / 1e9 / min(seconds({i: lambda: a @ b for i in range(30)}, 1, device).values())


def side(device):
    """Of the square matrices: a GPU needs large ones to be busy."""
    return 4096 if device.type == "cuda" else 1024


def sizes_of(name):
    return tiny(name, env_id=ENV[1], eval_every=100, eval_max_steps=20) if SIZES else []


def made(name, device, *argv):
    functions, inside = inner_functions(name, [*ENV, *sizes_of(name), *argv], device)
    fill(inside)
    return functions, inside


def transcription(v):
    """MAGE's critic update as it reads (tests/transcription.py): an ordinary backward pass through all of it,
    small updates of each parameter. v: what `update` closes over."""
    args, critic, target = v["args"], v["critic"], v["critic_target"]
    obs = v["buffer"].sample(args.batch_size)[0]
    with torch.no_grad():
        action = v["actor"](obs)
    member = torch.randint(args.ensemble_size, (len(obs),), device=obs.device)
    noise = torch.randn_like(obs), 0.2 * torch.randn_like(action)
    nets = (critic, v["actor_target"], target, v["model"], v["reward_of"], v["terminated_at"])
    terms = mage_terms(*nets, obs, action, member, *noise, args.gamma)
    v["critic_opt"].zero_grad()
    (terms[0] + args.lam * terms[1]).backward()
    torch.nn.utils.clip_grad_value_(critic.parameters(), 5.0)
    v["critic_opt"].step()
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.data.copy_((1 - args.tau) * slow + args.tau * fast)


def maac_batch(v):
    """A gradient step of MAAC's model, every member on 256 rows."""
    if "model_opt" not in v:
        v["model_opt"] = maac_sac.adam(v["model"], v["args"].model_lr)
    obs, action, _, next_obs, _ = v["real"].sample(v["args"].ensemble_size, maac_sac.MODEL_BATCH)
    maac_sac.descend(v["model_opt"], maac_sac.model_losses(v["model"], obs, action, next_obs).mean())


def rest(name, device):
    """Seconds of an environment step without learning: act, step, store, log, its share of evaluations."""
    steps = 100 if SIZES else 1000
    off = ["--updates-per-step", "0", "--learning-starts", "0", "--total-timesteps", str(steps)]
    off += {"td3": [], "maac_sac": ["--horizon", "0", "--no-steve", "--real-ratio", "1"]}.get(
        name, ["--model-train-every", "1000000"])  # fmt: skip
    return run(name, *ENV, *sizes_of(name), *off, "--device", device.type)[0] / steps


def run(name, *argv):
    """Trains in a folder that goes away -> seconds, the last line of train.csv as {column: text}."""
    module = script(name)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        args = parse_args(module.Args, module.PRESETS, [*argv, "--run-dir", f"{folder}/run"])
        start = time.perf_counter()
        module.train(args)
        passed = time.perf_counter() - start
        *_, last = Path(args.run_dir, "train.csv").read_text().splitlines()
        names = Path(args.run_dir, "train.csv").read_text().splitlines()[0]
    return passed, dict(zip(names.split(","), last.split(","), strict=True))


def memory(name, device, how="none"):
    """Peak memory in MB of a process that learns at the paper's sizes; on a GPU, what PyTorch holds there."""
    command = [sys.executable, "-m", "tests.speed", "--memory", name, how, "--device", device.type]
    done = subprocess.run(command + ["--tiny"] * bool(SIZES), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)


def print_memory(name, how, device):
    for job in learning_of(name, how, device)[0].values():
        for _ in range(WARM_UP + 2):
            job()
    print(peak(device))


def held(device):
    """Frees what nobody uses any more -> MB that PyTorch goes on holding on a GPU; `peak` starts anew."""
    gc.collect()  # functions that know each other
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved() / 2**20


def peak(device):
    """The most memory in MB that this process had, or on a GPU that PyTorch held there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10  # getrusage remembers who started this process


def learning_of(name, how, device):
    """What learning consists of, {part: function}, on networks of its own: a graph changes how optimisers
    count, and so the plain functions beside it. With it what they close over."""
    functions, inside = made(name, device)
    optimizers = [x for x in inside.values() if isinstance(x, torch.optim.Optimizer)]
    fast = {block: accelerate(f, how, device, optimizers) for block, f in functions.items()}
    if name == "maac_sac":
        return {"model": lambda: maac_batch(inside), "critic and actor": fast["update"]}, inside
    model = {"model": fast["train_model"]} if "train_model" in fast else {}
    critic = {"critic": lambda: fast["update"](False), "critic and actor": lambda: fast["update"](True)}
    return model | critic, inside


def per_step(name, args, cost):
    """What learning costs in an environment step, where `cost` is {part: number}, a time or launches."""
    if name == "maac_sac":
        return args.updates_per_step * cost["critic and actor"]  # its model's fits stop early: not counted
    delayed = cost["critic"] + (cost["critic and actor"] - cost["critic"]) / args.policy_delay
    batches = args.model_batches / args.model_train_every * cost["model"] if name != "td3" else 0
    return args.updates_per_step * delayed + batches


def learning(device, turns, ways, accelerated):
    """The first two tables: every script, every way to accelerate it, MAGE's transcription."""
    jobs, counts, args = {}, {}, {}
    for name in SCRIPTS:
        for how in ways if name in accelerated else ["none"]:
            parts, inside = learning_of(name, how, device)
            jobs |= {(name, how, part): job for part, job in parts.items()}
            if how == "none":
                args[name] = inside["args"]
                counts |= {(name, part): counted(job, device) for part, job in parts.items()}
        if name == "mage_td3":
            *_, inside = learning_of(name, "none", device)
            jobs[name, "naive", "critic"] = lambda v=inside: transcription(v)
    found, rate, n = seconds(jobs, turns, device), matmul_rate(device), side(device)
    print(f"a product of two {n} x {n} matrices: {rate:.0f} GFLOP/s\n")
    head = f"{'script':10} {'accelerate':10} {'update':17} {'ms':>9} {'GFLOP':>7} {'of matmul':>9}"
    print(f"{head} {'launches':>9}")
    for (name, how, part), value in found.items():
        flop, launches = counts[name, part]
        share = f"{flop:7.2f} {flop / value / rate:9.0%}" if how != "naive" else ""
        print(f"{name:10} {how:10} {part:17} {1e3 * value:9.2f} {share}" + f" {launches:9}" * (how == "none"))

    def step_of(name, values):
        return per_step(name, args[name], values)

    learn = {name: step_of(name, {part: found[name, "none", part] for n, part in counts if n == name})
             for name in SCRIPTS}  # fmt: skip
    head = f"{'an environment step':20} {'learning, ms':>12} {'launches':>9} {'all else':>9} {'share':>6}"
    print(f"\n{head} {'memory, MB':>10}")
    for name in SCRIPTS:
        launches = step_of(name, {part: count for (n, part), (_, count) in counts.items() if n == name})
        other, size = rest(name, device), memory(name, device)
        numbers = f"{1e3 * learn[name]:12.1f} {launches:9.0f} {1e3 * other:9.2f}"
        print(f"{name:20} {numbers} {other / (learn[name] + other):6.1%} {size:10.0f}")
    critic = {how: found["mage_td3", how, "critic"] for how in ("naive", *ways)}
    print()
    if device.type == "cpu":
        print(f"where MAGE's critic update spends its time: {where(jobs['mage_td3', 'none', 'critic'])}")
    for how in ways:
        print(f"MAGE's critic update, naive / {how}: {critic['naive'] / critic[how]:.1f}")
    print(f"MAGE / Dyna-TD3, learning in an environment step: {learn['mage_td3'] / learn['dyna_td3']:.2f}")


def where(job):
    """The ten operations that take most of a job's time on the CPU -> text, with their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            job()
    found = profile.key_averages()
    total = sum(x.self_cpu_time_total for x in found)
    first = sorted(found, key=lambda x: -x.self_cpu_time_total)[:10]
    return ", ".join(f"{x.key.removeprefix('aten::')} {x.self_cpu_time_total / total:.0%}" for x in first)


@contextlib.contextmanager
def among(others, alone):
    """Of the processes that share the file `others`, one may be in here alone, or any number that are not."""
    with open(others, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def rows(names, ways, device, others):
    """Yields the numbers of the first two tables as rows, a script and a way at a time, or why not. What is
    made and compiled may be so beside other processes; nobody does anything while one of them is timed."""
    turns = 9 if device.type == "cuda" else 1
    for name, how in itertools.product(names, ways):
        try:
            with among(others, alone=False):
                plain, inside = learning_of(name, "none", device)
                counts, args = {part: counted(job, device) for part, job in plain.items()}, inside["args"]
                plain = inside = parts = None  # noqa: F841
                before = held(device)
                parts, _ = learning_of(name, how, device)
                seconds(parts, 0, device)
            with among(others, alone=True):
                rate, times = matmul_rate(device), seconds(parts, turns, device)
                other = rest(name, device) if how == "none" else None
            memory = peak(device) - before
            for part, passed in times.items():
                flop, launches = counts[part]
                yield dict(table="updates", script=name, accelerate=how, update=part, ms=1e3 * passed,
                           gflop=flop, of_matmul=flop / passed / rate, matmul_gflops=rate, launches=launches)
            launches = per_step(name, args, {part: count for part, (_, count) in counts.items()})
            learn = 1e3 * per_step(name, args, times)
            yield dict(table="steps", script=name, accelerate=how, learning_ms=learn, launches=launches,
                       all_else_ms=other and 1e3 * other, memory_mb=memory)  # fmt: skip
        except Exception as error:
            yield dict(error=f"{name}, {how}: {one_line(error)}")


def growth(device, turns):
    """The second table: how MAGE's critic update and MAAC's update grow."""
    series = {
        ("mage_td3", "--batch-size"): (256, 512, 1024, 2048),
        ("mage_td3", "--ensemble-size"): (1, 2, 4, 8, 16),
        ("mage_td3", "--model-hidden"): (128, 256, 512, 1024),
        ("mage_td3", "--critic-hidden"): (128, 256, 384, 512),
        ("maac_sac", "--horizon"): (0, 1, 2, 4, 8),
        ("maac_sac", "--num-samples"): (1, 2, 5, 10),
    }
    print("\nms of an update (MAGE: critic alone) with other sizes")
    for (name, flag), values in series.items():
        jobs = {}
        for value in values[:2] if SIZES else values:
            function = made(name, device, flag, str(value), "--buffer-size", "10000")[0]["update"]
            jobs[value] = function if name == "maac_sac" else lambda f=function: f(False)
        found = seconds(jobs, turns, device)
        print(f"{name:9} {flag:15}", "   ".join(f"{value}: {1e3 * t:.1f}" for value, t in found.items()))


def cleanrl_sizes(device, steps):
    """td3.py with CleanRL's TD3's sizes, one update per step, whole steps per second after the warm-up."""
    counts = ["--learning-starts", "200", "--eval-every", str(steps), "--total-timesteps", str(2 * steps)]
    _, last = run("td3", *CLEANRL, *sizes_of("td3"), *counts, "--eval-episodes", "0", "--device", device.type)
    print(f"\ntd3.py, batch 256, 2 x 256, one update per step: {float(last['steps_per_second']):.0f} steps/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns; only MAGE compiled; no growth")
    parser.add_argument("--tiny", action="store_true", help="one turn of tiny networks: does it work?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    SIZES[:] = [True] * args.tiny
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    if args.memory:
        print_memory(*args.memory, device)
        return
    turns = 1 if args.tiny else 3 if args.quick else 9
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, median of {turns} turns")
    ways = ["none"] + ["compile"] * (not args.tiny) + (["graph"] if device.type == "cuda" else [])
    # The scripts have more than eight optimisers together, and after the eighth torch.compile would give up.
    importlib.import_module("torch._dynamo.config").recompile_limit = 64
    learning(device, turns, ways, ["mage_td3"] if args.quick else SCRIPTS)
    cleanrl_sizes(device, 300 if args.quick or args.tiny else 1000)
    if not args.quick:
        growth(device, turns)


if __name__ == "__main__":
    main()
