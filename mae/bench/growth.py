"""`mae bench growth` and `mae bench scaling`: what a training step costs as its settings grow, and over processes."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae.bench.figures import Figure, cores, figure, machine, ratio, write_json
from mae.bench.variants import DTYPES, forget, threads
from mae.errors import TrainingFailed, UserError
from mae.models import compilation
from mae.models.flops import SIZES as PRODUCTS
from mae.models.flops import TRIES, product_rate, product_rates, training_flops
from mae.models.mae import SIZES, MaskedAutoencoder
from mae.options import ToolParser, out_file
from mae.runtime import signals
from mae.runtime.device_clock import wait_for
from mae.runtime.memory import is_out_of_memory, keep_freed_memory
from mae.training.optim import adamw

T = TypeVar("T")


AXES = ("image_size", "mask_ratio", "depth", "decoder_depth", "batch")

MASK_RATIO, DECODER_DEPTH = 0.75, 8  # of the paper, and here where another axis is varied

BATCH = {"cpu": 8, "cuda": 256}

WARM_UP = 2  # steps; the second one is timed, roughly

TURN_SECONDS = 0.5  # a turn has as many steps as fill this, so that waiting for a device means nothing

MOST_STEPS = 50  # in a turn

PATIENCE = timedelta(minutes=30)  # with processes that compile, or take turns

MISTAKE, OUT_OF_MEMORY = 2, 3  # exit codes


class Setting(NamedTuple):
    """What network is trained on how many images; plain values, for other processes."""

    size: str
    image_size: int
    patch_size: int
    mask_ratio: float
    depth: int
    decoder_depth: int
    batch: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def network(self) -> tuple[Any, ...]:
        """Settings that are equal here can be measured on one network."""
        return self.size, self.image_size, self.patch_size, self.depth, self.decoder_depth

    def build(self) -> MaskedAutoencoder:
        return MaskedAutoencoder(
            image_size=self.image_size,
            patch_size=self.patch_size,
            **SIZES[self.size]._replace(depth=self.depth)._asdict(),
            decoder_depth=self.decoder_depth,
        )

    def flops(self, network: nn.Module | None = None) -> int:
        """Of a training step, per image.

        Args:
            network: Of this setting, where there is one already.
        """
        loss = lambda net, images: net(images, None, self.mask_ratio).loss  # noqa: E731
        return training_flops(network or self.build(), loss, 3, self.image_size, self.image_size)

    def __str__(self) -> str:
        return (
            f"{self.size} encoder of {self.depth} blocks, decoder of {self.decoder_depth}, images of {self.image_size} "
            f"pixels, patches of {self.patch_size}, {self.mask_ratio:.0%} hidden, batch {self.batch}"
        )


class How(NamedTuple):
    """In what way it is computed; plain values, for other processes."""

    dtype: str
    compiled: bool
    rounds: int
    threads: int
    turn_seconds: float


class Trained:
    """A network and what trains it.

    Raises:
        UserError: It is to be compiled, and cannot be.
    """

    def __init__(self, setting: Setting, how: How, device: torch.device, lr: float):
        torch.manual_seed(0)
        self.device, self.dtype = device, DTYPES[how.dtype]
        with device:
            self.network = setting.build().train()
        self.optimizer = adamw(self.network, lr, weight_decay=0.05, betas=(0.9, 0.95))
        # A scale that does not overflow at first: a step that the scaler leaves out would be too fast.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=self.dtype == torch.float16)
        if how.compiled:
            step = Step(self, self.network, setting).gradients
            if why := compilation.attempt(self.network, step):
                raise UserError(f"{why}; --compile false measures without")
            self.optimizer.zero_grad()


class Step:
    """One optimiser step, each time on the same random images and masks.

    Args:
        network: Of `trained`, as it is or inside DDP.
        accumulate: Micro-batches.
        synced: Gradients go to the other processes, at the last micro-batch; else to none, ever.
    """

    def __init__(
        self, trained: Trained, network: nn.Module, setting: Setting, accumulate: int = 1, synced: bool = True
    ):
        self.trained, self.network, self.setting = trained, network, setting
        self.accumulate, self.synced = accumulate, synced
        side = setting.image_size
        self.images = torch.randn(setting.batch, 3, side, side, device=trained.device)
        self.noise = torch.rand(setting.batch, setting.patches, device=trained.device)

    def gradients(self) -> None:
        dtype, scaler = self.trained.dtype, self.trained.scaler
        for micro in range(self.accumulate):
            alone = not (self.synced and micro == self.accumulate - 1)
            ddp = self.network if isinstance(self.network, DistributedDataParallel) else None
            with ddp.no_sync() if ddp and alone else contextlib.nullcontext():
                with torch.autocast(self.trained.device.type, dtype, enabled=dtype != torch.float32):
                    loss: Tensor = self.network(self.images, self.noise, self.setting.mask_ratio).loss
                scaler.scale(loss / self.accumulate).backward()  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        self.gradients()
        self.trained.scaler.step(self.trained.optimizer)
        self.trained.scaler.update()
        self.trained.optimizer.zero_grad()


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for(device)
    return time.perf_counter() - start


def steps_a_turn(one: float, how: How) -> int:
    """How many steps of so many seconds make a turn."""
    return min(MOST_STEPS, max(1, round(how.turn_seconds / one)))


def in_turn(contenders: Sequence[T], turn: int) -> Sequence[T]:
    """Forwards and backwards: none is always the one after a certain other."""
    return contenders[::-1] if turn % 2 else contenders


@contextlib.contextmanager
def many_shapes() -> Iterator[None]:
    """Each network is compiled for its own shapes, and there are more than torch lets one function have."""
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=128):
        yield


# ---- settings --------------------------------------------------------------------------------------------------------


def parser(name: str, description: str) -> ToolParser:
    found = ToolParser(prog=f"mae bench {name}", description=description)
    found.add_argument("--size", default="small", choices=list(SIZES), help="Of the encoder.")
    found.add_argument("--image_size", type=int, default=224, help="Pixels, a side.")
    found.add_argument("--patch_size", type=int, default=16, help="Pixels, a side.")
    found.add_argument(
        "--batch",
        type=int | None,
        default=None,
        help=f"In a micro-batch; null: {BATCH['cpu']}, {BATCH['cuda']} on GPUs.",
    )
    found.add_argument("--rounds", type=int, default=5, help="Turns of each contender.")
    found.add_argument("--dtype", default="float32", choices=list(DTYPES), help="Of the products, by autocast.")
    found.add_argument("--compile", type=bool, default=False, help="Blocks by torch.compile.")
    found.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any.")
    found.add_argument("--json", type=str | None, default=None, help="Write all figures to this file, too.")
    return found


def base_of(config: Namespace) -> Setting:
    """The setting around which axes are varied.

    Raises:
        UserError: Something is less than 1, or does not go together.
    """
    for key in ("image_size", "patch_size", "batch", "rounds", "threads", "accumulate"):
        if (value := config.get(key)) is not None and value < 1:
            raise UserError(f"--{key} {value}: at least 1")
    if config.image_size % config.patch_size:
        raise UserError(f"--image_size {config.image_size} is not divisible by --patch_size {config.patch_size}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    batch = config.batch or BATCH[device_of(config).type]
    depth = SIZES[config.size].depth
    base = Setting(config.size, config.image_size, config.patch_size, MASK_RATIO, depth, DECODER_DEPTH, batch)
    if not 0 < base.visible:
        raise UserError(
            f"--image_size {base.image_size} has {base.patches} patches of --patch_size {base.patch_size}: too few "
            f"to hide {MASK_RATIO:.0%} of them"
        )
    if config.json:
        out_file(config.json, "--json")
    return base


def device_of(config: Namespace) -> torch.device:
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def how_of(config: Namespace) -> How:
    return How(config.dtype, config.compile, config.rounds, config.threads or torch.get_num_threads(), TURN_SECONDS)


def plural(count: int, word: str, ending: str = "s") -> str:
    return f"{count} {word}{ending * (count != 1)}"


# ---- growth ----------------------------------------------------------------------------------------------------------


def values(axis: str, base: Setting) -> list[Any]:
    """Of one axis, the base's own among them; those that cannot be are left out."""
    grid = base.image_size // base.patch_size
    tried: dict[str, list[Any]] = {
        "image_size": [base.patch_size * round(grid * 2 ** (i / 2)) for i in range(-2, 3)],  # doubles the patches
        "mask_ratio": [0.25, 0.5, MASK_RATIO, 0.85, 0.9],
        "depth": [base.depth // 4, base.depth // 2, base.depth, 2 * base.depth],
        "decoder_depth": [1, 2, 4, DECODER_DEPTH, 12],
        "batch": [base.batch // 4, base.batch // 2, base.batch, 2 * base.batch, 4 * base.batch],
    }
    return sorted({value for value in tried[axis] if value > 0 and 0 < vary(base, axis, value).visible})


def vary(base: Setting, axis: str, value: Any) -> Setting:
    return base._replace(**{axis: value})


def growth(args: Sequence[str]) -> None:
    own = parser("growth", "What a training step costs as one setting grows, around a base, in time and in FLOPs.")
    own.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES), help="What is varied.")
    own.add_argument("--threads", type=int | None, default=None, help="Of torch; null: as many as it chooses.")
    config = own.parse_args(list(args))
    base, how, device = base_of(config), how_of(config), device_of(config)
    axes = list(dict.fromkeys(config.axes))
    keep_freed_memory()
    with threads(how.threads), many_shapes():
        where = machine(device)
        at = plural(how.threads, "thread") if device.type == "cpu" else where["device"]
        print(f"base      {base}; {how.dtype}{', compiled' * how.compiled}, {at}")
        rates = product_rates(device, DTYPES[how.dtype], seconds=0.3)
        product = (512, *PRODUCTS)[rates.index(max(rates))]
        print(f"products  {max(rates) / 1e9:,.0f} GFLOP/s, {product} x {product}; measured again in each round")
        print(f"figures   medians of {plural(how.rounds, 'round')} (lowest to highest); ratios within each round")
        tables: dict[str, Any] = {}
        for axis in axes:
            tables[axis] = Axis(axis, base, how, device).measure(product)
            print_axis(axis, tables[axis], getattr(base, axis))
            forget()
    figures = {"machine": where, "base": base._asdict(), **how._asdict(), "product": product, "axes": tables}
    write_json(config.json, figures)


class Axis:
    """All values of one axis, which take turns; those for which there is too little memory drop out."""

    def __init__(self, axis: str, base: Setting, how: How, device: torch.device):
        self.axis, self.base, self.how, self.device = axis, base, how, device
        self.own = getattr(base, axis)
        self.settings = {value: vary(base, axis, value) for value in values(axis, base)}
        self.networks: dict[tuple[Any, ...], Trained] = {}
        self.steps: dict[Any, Step] = {}

    def measure(self, product: int) -> dict[Any, dict[str, Any]]:
        """Figures by value.

        Raises:
            UserError: There is too little memory for the base.
        """
        counts = {value: self.tried(value, partial(self.prepare, value)) for value in self.settings}
        rates: dict[Any, list[float]] = {value: [] for value in self.settings}
        products: list[float] = []
        for turn in range(self.how.rounds):
            for value in in_turn(list(self.steps), turn):
                count = counts[value] or 1
                if taken := self.tried(value, partial(seconds, self.steps[value], count, self.device)):
                    rates[value].append(self.settings[value].batch * count / taken)
            dtype = DTYPES[self.how.dtype]
            products.append(max(product_rate(self.device, dtype, product) for _ in range(TRIES)))
        rows = {value: figure(rates[value]) if value in self.steps else None for value in self.settings}
        self.flops = {value: self.count(setting) for value, setting in self.settings.items()}
        return {value: self.row(value, rate, rows[self.own], figure(products)) for value, rate in rows.items()}

    def count(self, setting: Setting) -> int:
        known = self.networks.get(setting.network)
        return setting.flops(known.network if known else None)

    def prepare(self, value: Any) -> int:
        """Steps a turn, when what comes once has been."""
        setting = self.settings[value]
        if setting.network not in self.networks:
            self.networks[setting.network] = Trained(setting, self.how, self.device, lr=1e-4)
        trained = self.networks[setting.network]
        step = self.steps[value] = Step(trained, trained.network, setting)
        return steps_a_turn([seconds(step, 1, self.device) for _ in range(WARM_UP)][-1], self.how)

    def tried(self, value: Any, work: Callable[[], T]) -> T | None:
        """None: there is too little memory for this value, which drops out."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if value == self.own:
                raise UserError(
                    f"out of memory at the base, {self.base}, in one process with the other values of --axes "
                    f"{self.axis}: try a smaller --batch or --size"
                ) from None
        # Not before here: the error has held the step's tensors.
        self.steps.pop(value, None)
        setting = self.settings[value]
        if not any(step.setting.network == setting.network for step in self.steps.values()):
            self.networks.pop(setting.network, None)
        for trained in self.networks.values():
            trained.optimizer.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def row(self, value: Any, rate: Figure | None, base: Figure | None, products: Figure) -> dict[str, Any]:
        flops = self.flops[value]
        known = {"flops": flops, "flops_ratio": flops / self.flops[self.own]}
        if rate is None:
            return {**known, "out_of_memory": True}
        assert base is not None
        return {
            **known,
            "out_of_memory": False,
            "images_per_s": rate,
            "ms_per_image": figure([1000 / one for one in rate.rounds]),
            "time_ratio": ratio(base, rate),
            "of_products": figure([one * flops / most for one, most in zip(rate.rounds, products.rounds, strict=True)]),
        }


def print_axis(axis: str, rows: dict[Any, dict[str, Any]], own: Any) -> None:
    heads = f"{'images/s':<28}{'ms/image':>9}{'GFLOP/image':>13}   {'time x':<22}{'FLOP x':>6}{'of products':>13}"
    print(f"\n{axis:<14}{heads}")
    for value, row in rows.items():
        name, work = f"{value}{' (base)' * (value == own)}", row["flops"] / 1e9
        if row["out_of_memory"]:
            print(f"{name:<14}{'out of memory':<28}{'':>9}{work:>13,.3f}   {'':<22}{row['flops_ratio']:>6.2f}")
        else:
            print(
                f"{name:<14}{row['images_per_s']!s:<28}{row['ms_per_image'].median:>9.2f}{work:>13,.3f}   "
                f"{row['time_ratio']!s:<22}{row['flops_ratio']:>6.2f}{row['of_products'].median:>13.0%}"
            )
    sys.stdout.flush()


# ---- scaling: the process that asks ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """What all processes are to know; plain values."""

    setting: Setting
    how: How
    accumulate: int
    device: str
    counts: list[int]  # processes in each group, ascending
    port: int
    parent: int

    @property
    def world(self) -> int:
        return self.counts[-1]

    @property
    def backend(self) -> str:
        return "nccl" if self.device == "cuda" else "gloo"


def scaling(args: Sequence[str]) -> None:
    own = parser("scaling", "Training by 1, 2, ... processes, the same batch each: images/s beside so many times one.")
    own.add_argument(
        "--processes", type=int, nargs="+", default=None, help="Of each group; by default 1, 2, 4, ... as there are."
    )
    own.add_argument("--accumulate", type=int, default=1, help="Micro-batches an optimiser step.")
    own.add_argument("--threads", type=int, default=1, help="Of torch, in each process.")
    config = own.parse_args(list(args))
    base, how, device = base_of(config), how_of(config), device_of(config)
    counts = counts_of(config.processes, device, how.threads)
    job = Job(base, how, config.accumulate, device.type, counts, 0, os.getpid())
    print(f"each process  {base}, x {job.accumulate} a step; {how.dtype}{', compiled' * how.compiled}")
    at = plural(how.threads, "thread") if device.type == "cpu" else "one GPU"
    print(f"              {at} a process; gradients by {job.backend}")
    rows = compare(together(job), counts)
    print(f"figures       medians of {plural(how.rounds, 'round')} (lowest to highest); ratios within each round\n")
    print_scaling(rows)
    where = {**machine(device), "threads": how.threads}
    plain = {"accumulate": job.accumulate, "backend": job.backend, **how._asdict()}
    write_json(config.json, {"machine": where, "setting": base._asdict(), **plain, "processes": rows})


def counts_of(given: list[int] | None, device: torch.device, count: int) -> list[int]:
    """Processes in each group, ascending; one process is always among them.

    Raises:
        UserError: There are not so many devices or cores.
    """
    has = torch.cuda.device_count() if device.type == "cuda" else max(1, cores() // count)
    if given is None:
        return [2**i for i in range(has.bit_length())]
    if min(given) < 1:
        raise UserError(f"--processes {min(given)}: at least 1")
    if (most := max(given)) > has:
        if device.type == "cuda":
            raise UserError(f"--processes {most}: torch sees {plural(has, 'GPU')}, and each process needs its own")
        raise UserError(
            f"--processes {most}: each needs {plural(count, 'core')} (--threads {count}), and this process may use "
            f"{cores()}"
        )
    return sorted({1, *given})


def together(job: Job) -> dict[str, list[float]]:
    """Images/s in each round, by contender; no process is left, whatever happens.

    Raises:
        UserError: There is too little memory.
        TrainingFailed: A process ended without having been asked to; it has said why.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.how.threads)}
    children: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for rank in range(job.world):
            command = [sys.executable, "-c", "from mae.bench.growth import work; work()"]
            given = [json.dumps(job._replace(port=store.port)), str(rank)]
            # A session of its own: Ctrl-C reaches this process alone, which then ends the others.
            children.append(
                subprocess.Popen([*command, *given], stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
            )
        while not store.check(["rates"]):
            for rank, child in enumerate(children):
                if (code := child.poll()) == MISTAKE:
                    raise UserError(store.get("mistake").decode())
                if code == OUT_OF_MEMORY:
                    raise UserError(
                        f"out of memory at --batch {job.setting.batch} in {plural(job.world, 'process', 'es')}: a "
                        "smaller one, or fewer --processes"
                    )
                if code is not None:
                    raise TrainingFailed(f"process {rank} of the bench ended with exit code {code}")
            time.sleep(0.1)
        rates: dict[str, list[float]] = json.loads(store.get("rates"))
        return rates
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        signal.signal(signal.SIGTERM, before)


def compare(rates: dict[str, list[float]], counts: Sequence[int]) -> dict[int, dict[str, Figure]]:
    """Figures by number of processes.

    Efficiency is the rate over so many times that of one process; the same without exchange tells what is lost to the
    rest, such as memory that processes share.
    """
    found = {key: figure(values) for key, values in rates.items()}
    one = found[name(1, True)]
    rows = {}
    for count in counts:
        ideal = figure([count * rate for rate in one.rounds])
        rate = found[name(count, True)]
        rows[count] = {"images_per_s": rate, "efficiency": ratio(rate, ideal)}
        if count > 1:
            alone = found[name(count, False)]
            rows[count] |= {
                "images_per_s_no_sync": alone,
                "efficiency_no_sync": ratio(alone, ideal),
                "all_reduce": figure([1 - share for share in ratio(rate, alone).rounds]),
            }
    return rows


def print_scaling(rows: dict[int, dict[str, Figure]]) -> None:
    print(f"{'processes':<11}{'images/s':<28}{'efficiency':<22}{'without all-reduce':<22}all-reduce, of the step")
    for count, row in rows.items():
        line = f"{count:<11}{row['images_per_s']!s:<28}{row['efficiency']!s:<22}"
        if count > 1:
            cost = row["all_reduce"]
            line += f"{row['efficiency_no_sync']!s:<22}{cost.median:.1%} ({cost.low:.1%} to {cost.high:.1%})"
        print(line.rstrip())
    sys.stdout.flush()


def name(count: int, synced: bool) -> str:
    """Of a contender: so many processes, whose gradients are exchanged or stay."""
    return f"{count}" if synced else f"{count} no_sync"


# ---- scaling: each of the others -------------------------------------------------------------------------------------


def work() -> None:
    """A process of `together`: its arguments are the job as JSON and its rank."""
    setting, how, *rest = json.loads(sys.argv[1])
    job, rank = Job(Setting(*setting), How(*how), *rest), int(sys.argv[2])
    signals.die_with_parent()
    if os.getppid() != job.parent:  # it was gone before
        os._exit(1)
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False, timeout=PATIENCE)
    code = 0
    try:
        keep_freed_memory()
        with threads(job.how.threads), many_shapes():
            Rank(job, rank, store).measure()
    except UserError as error:
        store.set("mistake", str(error))
        code = MISTAKE
    except Exception as error:
        code = OUT_OF_MEMORY if is_out_of_memory(error) else 1
        if code == 1:
            traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # without waiting for processes that wait for this one


class Rank:
    """One process of all, and the groups that it belongs to: in group n are the first n."""

    def __init__(self, job: Job, rank: int, store: dist.Store):
        self.job, self.rank, self.store = job, rank, store
        self.device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
        if job.device == "cuda":
            torch.cuda.set_device(self.device)
        # Turns are taken by gloo, wherever gradients go: a process that waits uses neither core nor GPU.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=PATIENCE)
        self.steps: dict[str, Step] = {}
        for count in job.counts:
            group = dist.new_group(list(range(count)), backend=job.backend, timeout=PATIENCE) if count > 1 else None
            if rank < count:
                self.join(count, group)

    def join(self, count: int, group: Any) -> None:
        """A network for each group: one cannot be in two instances of DDP. One process has none, as in training."""
        job = self.job
        # Weights stay as they are, so that they stay equal where gradients are not exchanged; the work is the same.
        trained = Trained(job.setting, job.how, self.device, lr=0.0)
        network: nn.Module = trained.network
        if group is not None:
            network = DistributedDataParallel(
                network,
                device_ids=[self.rank] if job.device == "cuda" else None,
                process_group=group,
                gradient_as_bucket_view=True,
                static_graph=job.accumulate == 1,
            )
        for synced in (True, False)[: 1 if group is None else 2]:
            torch.manual_seed(self.rank)  # other images than other processes, the same with and without exchange
            self.steps[name(count, synced)] = Step(trained, network, job.setting, job.accumulate, synced)

    def measure(self) -> None:
        """Leaves images/s of all rounds in the store."""
        job = self.job
        contenders = [name(count, synced) for count in job.counts for synced in (True, False) if synced or count > 1]
        steps = {}
        for contender in contenders:
            one = [self.turn(contender, 1) for _ in range(WARM_UP)][-1]
            steps[contender] = self.told(steps_a_turn(one, job.how))
        for count in job.counts[1:]:
            self.check(count)
        rates: dict[str, list[float]] = {contender: [] for contender in contenders}
        images = {contender: int(contender.split()[0]) * job.setting.batch * job.accumulate for contender in contenders}
        for turn in range(job.how.rounds):
            for contender in in_turn(contenders, turn):
                taken = self.turn(contender, steps[contender])
                rates[contender].append(images[contender] * steps[contender] / taken)
        if self.rank == 0:
            self.store.set("rates", json.dumps(rates))
        dist.barrier()  # to end sooner is to have failed

    def turn(self, contender: str, steps: int) -> float:
        """Seconds until all processes of a contender have done so many steps; the others wait."""
        dist.barrier()
        start = time.perf_counter()
        if contender in self.steps:
            seconds(self.steps[contender], steps, self.device)
        dist.barrier()
        return time.perf_counter() - start

    def told(self, value: int) -> int:
        """The first process's."""
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def check(self, count: int) -> None:
        """That what is measured is data-parallel training: exchanged gradients are the mean of those that are not.

        Raises:
            RuntimeError: They are not.
        """
        own = [self.biases(name(count, synced)) for synced in (True, False)]
        found: list[Any] = [None] * self.job.world
        dist.all_gather_object(found, own)
        exchanged, kept = (torch.stack([both[i] for both in found[:count]]) for i in range(2))
        mean = kept.mean(dim=0)
        close = torch.allclose(exchanged, mean.expand_as(exchanged), rtol=1e-2, atol=1e-3 * float(mean.abs().max()))
        if not close and exchanged.isfinite().all():  # in float16 they may overflow
            raise RuntimeError(f"gradients of {count} processes are not the mean of what each has by itself")

    def biases(self, contender: str) -> Tensor:
        """Gradients of all biases and norms, on the CPU: something of every block, and not much to send."""
        if contender not in self.steps:
            return torch.empty(0)
        step = self.steps[contender]
        step.gradients()
        gradients = [p.grad for p in step.trained.network.parameters() if p.ndim == 1 and p.grad is not None]
        found = torch.cat([gradient.flatten() for gradient in gradients]).double().cpu()
        step.trained.optimizer.zero_grad()
        return found
