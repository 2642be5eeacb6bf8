"""`mae bench step`: the training step of our network beside plainer ones, and beside Hugging Face's."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from jsonargparse import Namespace

from mae.bench import figures as figures_module
from mae.bench.figures import Figure, figure, ratio, write_json
from mae.bench.variants import COMPILED, DTYPES, OTHERS, Contender, Setting, enough_memory, forget, peak_memory, threads
from mae.errors import UserError
from mae.models import flops
from mae.models.blocks import cpu_has_bfloat16
from mae.models.mae import SIZES
from mae.options import ToolParser, out_file
from mae.runtime.device_clock import wait_for
from mae.runtime.memory import GIB, keep_freed_memory

WARM_UP = 2  # steps of each contender that do not count

MODES = {"both": (COMPILED, ""), "true": (COMPILED,), "false": ("",)}  # what stands behind the names of ours

ABLATION = ("mask-tokens", "ours", "ours-depth-1")

# Table 2 of the paper: how many times faster without mask tokens, decoder of depth 8; then with a decoder of depth 1.
PAPER = {"large": (2.8, 3.7), "huge": (3.5, 4.1)}


def step_command(args: Sequence[str]) -> None:
    config = parsed(args)
    device = chosen_device(config.device)
    dtypes = [checked_dtype(name, device) for name in config.dtypes]
    names = contenders(config)
    keep_freed_memory()
    print_header(config, device)
    results: list[dict[str, Any]] = []
    for size in config.sizes:
        setting = Setting(
            size,
            config.image_size,
            config.patch_size or (14 if size == "huge" else 16),
            config.decoder_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
            config.batch,
            "",
            str(device),
        )
        for dtype in dtypes:
            one = setting._replace(dtype=dtype)
            counts = config.threads or [all_threads(device)]
            # Before all of them are in the memory of this process.
            peaks = {name: peak_memory(name, one, max(counts)) for name in names} if config.memory else {}
            for count in counts:
                result = bench(names, one, count, config.rounds, peaks)
                results.append(result)
                print_table(result)
                # After each table: of a bench that is stopped, what is done stays.
                rows = [figures_module.plain(row) for row in results]
                write_json(config.json, {"machine": versions(device), "results": rows})


def parsed(args: Sequence[str]) -> Namespace:
    """The options, those checked that need no device."""
    parser = ToolParser(
        prog="mae bench step",
        description="Images/s, memory and FLOPs of the pre-training step, beside the same network without its savings "
        "and Hugging Face's ViTMAEForPreTraining: in one process, in turns, on random images.",
    )
    parser.add_argument("--config", action="config")
    parser.add_argument("--sizes", type=str, nargs="+", default=["base"], choices=list(SIZES), help="Of the encoder.")
    parser.add_argument("--image_size", type=int, default=224, help="Pixels, a side.")
    parser.add_argument("--patch_size", type=int | None, default=None, help="Pixels, a side; 16, and 14 for huge.")
    parser.add_argument("--decoder_embed_dim", type=int, default=512)
    parser.add_argument("--decoder_depth", type=int, default=8)
    parser.add_argument("--decoder_num_heads", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="Images a step.")
    parser.add_argument(
        "--dtypes",
        type=str,
        nargs="+",
        default=["float32"],
        choices=list(DTYPES),
        help="Other than float32: autocast.",
    )
    parser.add_argument(
        "--compile", type=str, default="both", choices=list(MODES), help="Whether our blocks are compiled."
    )
    parser.add_argument(
        "--against", type=str, nargs="*", default=list(OTHERS), choices=list(OTHERS), help="Who else takes part."
    )
    parser.add_argument("--threads", type=int, nargs="+", help="Of the CPU, one table each (default: all cores).")
    parser.add_argument("--rounds", type=int, default=10, help="Steps of each, in turns, after a warm-up.")
    parser.add_argument("--memory", type=bool, default=True, help="Peak memory, in a process for each contender.")
    parser.add_argument(
        "--ablation",
        type=bool,
        default=False,
        help="Instead: ours beside an encoder that sees mask tokens, the paper's Table 2.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    parser.add_argument("--json", type=str | None, default=None, help="Write all figures to this file, too.")
    config = parser.parse_args(list(args))
    for option in ("image_size", "batch", "rounds"):
        if config[option] < 1:
            raise UserError(f"--{option} {config[option]}: at least 1")
    if config.patch_size is not None and config.patch_size < 1:
        raise UserError(f"--patch_size {config.patch_size}: at least 1")
    for count in config.threads or []:
        if not 1 <= count <= figures_module.cores():
            raise UserError(f"--threads {count}: this process may use 1 to {figures_module.cores()}")
    if config.json:
        out_file(config.json, "--json")
    return config


def contenders(config: Namespace) -> list[str]:
    """Who takes part, ours first."""
    if config.ablation:
        return [name + mode for mode in MODES[config.compile] for name in ABLATION]
    peers = [name for name in config.against if name.startswith("hf-")]
    if peers and not find_spec("transformers"):
        raise UserError(
            f"{' and '.join(peers)}: transformers is not installed; `pip install transformers`, or leave them out: "
            "--against plain"
        )
    return ["ours" + mode for mode in MODES[config.compile]] + list(dict.fromkeys(config.against))


def chosen_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: wanted is auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; --device cpu")
    return device


def checked_dtype(name: str, device: torch.device) -> str:
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtypes float16: on CUDA only; the CPU has float32 and bfloat16")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--dtypes bfloat16: {torch.cuda.get_device_name(device)} has none; float16 or float32")
    return name


def all_threads(device: torch.device) -> int:
    return figures_module.cores() if device.type == "cpu" else torch.get_num_threads()


def bench(
    names: Sequence[str], setting: Setting, count: int, rounds: int, peaks: dict[str, int | None]
) -> dict[str, Any]:
    """One table: figures of each contender at a setting.

    Args:
        count: Threads.
        peaks: Bytes that each takes at most; what is not known may be missing.
    """
    device = torch.device(setting.device)
    by_cpu_time = count == 1 and device.type == "cpu"
    clock = time.process_time if by_cpu_time else time.perf_counter
    forget()
    with threads(count):
        fields = {}
        for name in names:
            with enough_memory(name, setting):
                fields[name] = Contender(name, setting)
        seconds, products = in_turns(fields, clock, rounds)
        work = {name: contender.flops() for name, contender in fields.items()}
        trained = {name: contender.parameters for name, contender in fields.items()}
    rate = max(products)
    figures = {
        name: {
            "seconds": seconds[name],
            "images_per_second": setting.batch / seconds[name].median,
            "peak_bytes": peaks.get(name),
            "flops_per_image": work[name],
            "share_of_product_rate": work[name] * setting.batch / seconds[name].median / rate,
            "parameters": trained[name],
        }
        for name in names
    }
    ours = [name for name in names if name.removesuffix(COMPILED) == "ours"]
    result = {
        "setting": setting._asdict(),
        "threads": count,
        "clock": "CPU time" if by_cpu_time else "wall clock",
        "product_rate": rate,
        "contenders": figures,
        "ours_is_faster": {one: {name: ratio(seconds[name], seconds[one]) for name in names} for one in ours},
    }
    if names[0].startswith(ABLATION[0]):
        result["ablation"] = ablation(names, setting, seconds, work)
    return result


def in_turns(
    fields: dict[str, Contender], clock: Callable[[], float], rounds: int
) -> tuple[dict[str, Figure], list[float]]:
    """Seconds a step of each, one step a round; and FLOP/s of matrix products, measured in between.

    What slows the machine down for a while slows down all; the order is turned round every other time, as each step
    finds in the caches what its neighbour has left there.
    """
    device, dtype = next((one.device, one.dtype) for one in fields.values())
    for name, contender in fields.items():
        with enough_memory(name, contender.setting):
            for _ in range(WARM_UP):
                contender.step()
    products = flops.product_rates(device, dtype, clock, tries=1)
    sizes = flops.SIZES[: len(products) - 1] or (512,)
    seconds: dict[str, list[float]] = {name: [] for name in fields}
    for number in range(rounds):
        for name in list(fields)[:: -1 if number % 2 else 1]:
            wait_for(device)
            start = clock()
            fields[name].step()
            wait_for(device)
            seconds[name].append(clock() - start)
        products += [flops.product_rate(device, dtype, size, clock) for size in sizes]
    return {name: figure(values) for name, values in seconds.items()}, products


def ablation(
    names: Sequence[str], setting: Setting, seconds: dict[str, Figure], work: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """How many times faster than an encoder with mask tokens: in time, in FLOPs, and in the paper."""
    as_in_paper = setting.image_size == 224 and setting.decoder_depth == 8
    rows = {}
    for name in names:
        mode = COMPILED if name.endswith(COMPILED) else ""
        slow, kind = ABLATION[0] + mode, name.removesuffix(COMPILED)
        if kind == ABLATION[0]:
            continue
        paper = PAPER.get(setting.size) if as_in_paper else None
        rows[name] = {
            "time": ratio(seconds[slow], seconds[name]),
            "flops": work[slow] / work[name],
            "paper": paper[ABLATION.index(kind) - 1] if paper else None,
        }
    return rows


def versions(device: torch.device) -> dict[str, Any]:
    """Machine and packages; threads are each table's own."""
    found = figures_module.machine(device)
    del found["threads"]
    if find_spec("transformers"):
        found["transformers"] = version("transformers")
    return {**found, "float32 products": torch.get_float32_matmul_precision()}


def print_header(config: Namespace, device: torch.device) -> None:
    print(", ".join(f"{key} {value}" for key, value in versions(device).items()))
    print(f"a step: forward, backward, AdamW, gradients forgotten; {config.batch} random images, 3/4 of them hidden")
    print(f"{config.rounds} rounds of one step each, in turns, the order turned round every other time; median (range)")
    print("ours: fused AdamW; the others: torch's AdamW as it is by default")
    print("freed memory is kept by the process (glibc's thresholds): all contenders gain from it")
    if "bfloat16" in config.dtypes and device.type == "cpu" and not cpu_has_bfloat16():
        print("this CPU has no bfloat16 products (AVX-512 BF16 or AMX): torch goes a long way round; expect no gain")
    print(flush=True)


def print_table(result: dict[str, Any]) -> None:
    setting, threads_, ours = result["setting"], result["threads"], result["ours_is_faster"]
    print(
        f"{setting['size']}, patch {setting['patch_size']}, {setting['image_size']} px, batch {setting['batch']}, "
        f"{setting['dtype']}, {threads_} thread{'s' if threads_ != 1 else ''}, {result['clock']}; matrix products: "
        f"{result['product_rate'] / 1e9:,.1f} GFLOP/s at best"
    )
    heads = "".join(f"{one + ' is faster':>28}" for one in ours)
    print(f"{'':<22}{'img/s':>8}{'ms a step':>34}{'peak GiB':>10}{'GFLOP/img':>11}{'of products':>13}{heads}")
    for name, row in result["contenders"].items():
        milliseconds = figure([1000 * value for value in row["seconds"].rounds])
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
        faster = "".join(f"{'':>28}" if name == one else f"{figures[name]!s:>28}" for one, figures in ours.items())
        print(
            f"{name:<22}{row['images_per_second']:>8,.1f}{milliseconds!s:>34}{peak:>10}"
            f"{row['flops_per_image'] / 1e9:>11.3g}{row['share_of_product_rate']:>13.0%}{faster}"
        )
    for name, row in result.get("ablation", {}).items():
        paper = f", the paper's {row['paper']}" if row["paper"] else ""
        print(f"without mask tokens, {name}: {row['time']} times as fast; FLOPs {row['flops']:.2f}{paper}")
    print(flush=True)
