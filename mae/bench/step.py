"""`mae bench step`: the training step beside plainer ones and Hugging Face's, and by settings."""

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from jsonargparse import Namespace

from mae.bench.figures import (
    Figure,
    add_json_option,
    alternate,
    check_options,
    figure,
    ratio,
    steps_per_turn,
    torch_threads,
    write_json,
)
from mae.bench.variants import COMPILED, DTYPES, PEERS, Setting, Variant, enough_memory, forget_networks, peak_memory
from mae.errors import UserError
from mae.models import flops
from mae.models.blocks import cpu_has_bfloat16
from mae.models.mae import SIZES
from mae.options import ToolParser, plural
from mae.runtime.device_clock import wait_for
from mae.runtime.machine import available_cores, machine_details
from mae.runtime.memory import GIB, keep_freed_memory

WARM_UP = 2  # steps of each variant that do not count; the last one says how many fill a turn

MODES = {"both": (COMPILED, ""), "true": (COMPILED,), "false": ("",)}  # ends of the names of ours

ABLATION = ("mask-tokens", "ours", "ours-depth-1")

# Table 2 of the paper: how many times faster without mask tokens, with a decoder of depth 8 and with one of depth 1.
PAPER = {"large": (2.8, 3.7), "huge": (3.5, 4.1)}

AXES = ("image_size", "mask_ratio", "depth", "decoder_depth", "batch")


def step_command(args: Sequence[str]) -> None:
    config = parse_options(args)
    device = chosen_device(config.device)
    for name in config.dtypes:
        check_dtype(name, device)
    names = variant_names(config)
    all_settings = [base_setting(config, size, dtype, device) for size, dtype in product(config.sizes, config.dtypes)]
    keep_freed_memory()
    print_header(config, device)
    results: list[dict[str, Any]] = []
    for setting in all_settings:
        for table in tables(config, setting, names):
            results.append(table)
            (print_sweep if config.sweep else print_comparison)(table)
            # Written after each table, so that a bench that is stopped keeps what it has measured.
            write_json(config.json, {"machine": versions(device), "results": results})


def parse_options(args: Sequence[str]) -> Namespace:
    """The options, checked as far as that needs no device."""
    parser = ToolParser(
        prog="mae bench step",
        description="Images/s, memory and FLOPs of the pre-training step on random images: beside the same network "
        "without its savings and Hugging Face's ViTMAEForPreTraining, in turns in one process; or as one setting grows "
        "(--sweep).",
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
        "--dtypes", type=str, nargs="+", default=["float32"], choices=list(DTYPES), help="Half precision is autocast."
    )
    parser.add_argument(
        "--compile", type=str, default="both", choices=list(MODES), help="Whether our blocks are compiled."
    )
    parser.add_argument(
        "--against", type=str, nargs="*", default=list(PEERS), choices=list(PEERS), help="What to compare ours with."
    )
    parser.add_argument("--threads", type=int, nargs="+", help="Of the CPU, a table for each; all cores.")
    parser.add_argument("--rounds", type=int, default=10, help="Turns of each variant, after a warm-up.")
    parser.add_argument("--memory", type=bool, default=True, help="Peak memory, in a process for each of the compared.")
    parser.add_argument(
        "--ablation",
        type=bool,
        default=False,
        help="Compare ours with an encoder that sees mask tokens instead: the paper's Table 2.",
    )
    parser.add_argument(
        "--sweep",
        type=str,
        nargs="+",
        default=[],
        choices=AXES,
        help="Vary these settings of ours instead, one by one.",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    add_json_option(parser)
    config = parser.parse_args(list(args))
    check_options(config, "image_size", "patch_size", "batch", "rounds", "threads")
    if config.sweep and config.ablation:
        raise UserError("--sweep and --ablation true are benches of their own: take one of them")
    return config


def variant_names(config: Namespace) -> list[str]:
    """The variants to measure, ours first."""
    modes = MODES[config.compile]
    if config.ablation:
        return [name + mode for mode in modes for name in ABLATION]
    ours = ["ours" + mode for mode in modes]
    if config.sweep:
        return ours
    peers = [name for name in config.against if name.startswith("hf-")]
    if peers and not find_spec("transformers"):
        raise UserError(
            f"{' and '.join(peers)}: transformers is not installed; `pip install transformers`, or leave them out: "
            "--against plain"
        )
    return ours + list(dict.fromkeys(config.against))


def base_setting(config: Namespace, size: str, dtype: str, device: torch.device) -> Setting:
    """The setting that the options describe.

    Raises:
        UserError: Images of this size have too few patches.
    """
    setting = Setting(
        size=size,
        patch_size=config.patch_size or (14 if size == "huge" else 16),
        dtype=dtype,
        device=str(device),
        depth=SIZES[size].depth,
        **{
            key: config[key]
            for key in ("image_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "batch")
        },
    )
    if setting.visible < 1:
        raise UserError(
            f"--image_size {setting.image_size} has {setting.patches} patches of --patch_size {setting.patch_size}: "
            f"too few to hide {setting.mask_ratio:.0%} of them"
        )
    return setting


def chosen_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: it must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are measured")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; --device cpu")
    return device


def check_dtype(name: str, device: torch.device) -> None:
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtypes float16: on CUDA only; the CPU has float32 and bfloat16")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--dtypes bfloat16: {torch.cuda.get_device_name(device)} has none; float16 or float32")


def tables(config: Namespace, setting: Setting, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each table of a setting as it is measured."""
    all_threads = config.threads or [available_cores() if setting.device.startswith("cpu") else torch.get_num_threads()]
    if config.sweep:
        for threads, name, axis in product(all_threads, names, dict.fromkeys(config.sweep)):
            yield sweep(axis, name, setting, threads, config.rounds)
        return
    # Before all of them are in this process's memory.
    peaks = {name: peak_memory(name, setting, max(all_threads)) for name in names} if config.memory else {}
    for threads in all_threads:
        yield compare(names, setting, threads, config.rounds, peaks)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    planned: dict[Any, tuple[str, Setting]], threads: int, rounds: int, peaks: dict[str, int | None]
) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """How it was measured, and the figures of each variant.

    Args:
        planned: Name and setting of each variant; all are on one device, in one dtype.
        peaks: Bytes that each name takes at most, where they are known.
    """
    _, setting = next(iter(planned.values()))
    by_cpu_time = threads == 1 and setting.device == "cpu"
    clock = time.process_time if by_cpu_time else time.perf_counter
    forget_networks()
    import torch._dynamo.config as dynamo

    # A sweep compiles blocks for more shapes than torch by default allows for one function.
    with torch_threads(threads), dynamo.patch(recompile_limit=128):
        variants = {}
        for key, (name, own) in planned.items():
            with enough_memory(name, own):
                variants[key] = Variant(name, own)
        seconds, products = time_in_turns(variants, clock, rounds)
        work = {key: variant.flops() for key, variant in variants.items()}
    rate = max(products)
    rows = {}
    for key, variant in variants.items():
        per_second = variant.setting.batch / seconds[key].median
        rows[key] = {
            "seconds": seconds[key],
            "images_per_second": per_second,
            "peak_bytes": peaks.get(variant.name),
            "flops_per_image": work[key],
            "share_of_product_rate": work[key] * per_second / rate,
            "parameters": variant.parameters,
        }
    how = {"threads": threads, "clock": "CPU time" if by_cpu_time else "wall clock", "product_rate": rate}
    return {"setting": setting._asdict(), **how}, rows


def time_in_turns(
    variants: dict[Any, Variant], clock: Callable[[], float], rounds: int
) -> tuple[dict[Any, Figure], list[float]]:
    """Seconds a step of each, one turn a round; and FLOP/s of matrix products, measured in between.

    What slows the machine down for a while slows down all of them.
    """
    first = next(iter(variants.values()))
    device, dtype = first.device, first.dtype

    def turn(variant: Variant, steps: int) -> float:
        wait_for(device)
        start = clock()
        for _ in range(steps):
            variant.step()
        wait_for(device)
        return (clock() - start) / steps

    steps = {}
    for key, variant in variants.items():
        with enough_memory(variant.name, variant.setting):
            seconds = [turn(variant, 1) for _ in range(WARM_UP)]
        steps[key] = steps_per_turn(seconds[-1])
    products = flops.product_rates(device, dtype, clock, tries=1)
    sizes = flops.SIZES[: len(products) - 1] or (512,)
    times: dict[Any, list[float]] = {key: [] for key in variants}
    for number in range(rounds):
        for key in alternate(list(variants), number):
            times[key].append(turn(variants[key], steps[key]))
        products += [flops.product_rate(device, dtype, size, clock) for size in sizes]
    return {key: figure(values) for key, values in times.items()}, products


def compare(
    names: Sequence[str], setting: Setting, threads: int, rounds: int, peaks: dict[str, int | None]
) -> dict[str, Any]:
    """One table: variants at one setting."""
    table, rows = measure({name: (name, setting) for name in names}, threads, rounds, peaks)
    ours = [name for name in names if name.removesuffix(COMPILED) == "ours"]
    seconds = {name: row["seconds"] for name, row in rows.items()}
    faster = {one: {name: ratio(seconds[name], seconds[one]) for name in names} for one in ours}
    table |= {"contenders": rows, "ours_is_faster": faster}
    if names[0].startswith(ABLATION[0]):
        table["ablation"] = ablation(setting, rows)
    return table


def ablation(setting: Setting, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many times faster than an encoder with mask tokens: in time, in FLOPs, and in the paper."""
    as_in_paper = setting.image_size == 224 and setting.decoder_depth == 8
    paper = PAPER.get(setting.size) if as_in_paper else None
    result = {}
    for name, row in rows.items():
        base_name = name.removesuffix(COMPILED)
        if base_name == ABLATION[0]:
            continue
        slow = rows[name.replace(base_name, ABLATION[0])]
        result[name] = {
            "time": ratio(slow["seconds"], row["seconds"]),
            "flops": slow["flops_per_image"] / row["flops_per_image"],
            "paper": paper[ABLATION.index(base_name) - 1] if paper else None,
        }
    return result


def axis_values(axis: str, base: Setting) -> list[Any]:
    """Values of one axis around the base's own, which is among them; those that cannot be are left out."""
    grid, depth = base.image_size // base.patch_size, base.depth or SIZES[base.size].depth
    candidates: dict[str, list[Any]] = {
        "image_size": [base.patch_size * round(grid * 2 ** (i / 2)) for i in range(-2, 3)],  # doubles the patches
        "mask_ratio": [0.25, 0.5, base.mask_ratio, 0.85, 0.9],
        "depth": [depth // 4, depth // 2, depth, 2 * depth],
        "decoder_depth": [1, 2, 4, base.decoder_depth, 8, 12],
        "batch": [base.batch // 4, base.batch // 2, base.batch, 2 * base.batch, 4 * base.batch],
    }
    return sorted({value for value in candidates[axis] if value > 0 and base._replace(**{axis: value}).visible > 0})


def sweep(axis: str, name: str, base: Setting, threads: int, rounds: int) -> dict[str, Any]:
    """One table: a variant of ours as one setting grows, in time and in FLOPs."""
    planned = {value: (name, base._replace(**{axis: value})) for value in axis_values(axis, base)}
    table, rows = measure(planned, threads, rounds, {})
    per_image = {
        value: figure([seconds / setting.batch for seconds in rows[value]["seconds"].rounds])
        for value, (_, setting) in planned.items()
    }
    own = getattr(base, axis)
    for value, row in rows.items():
        row["time_ratio"] = ratio(per_image[value], per_image[own])
        row["flops_ratio"] = row["flops_per_image"] / rows[own]["flops_per_image"]
    return {**table, "setting": base._asdict(), "variant": name, "sweep": axis, "values": rows}


# ---- printing --------------------------------------------------------------------------------------------------------


def versions(device: torch.device) -> dict[str, Any]:
    """Machine and packages, without the threads, which each table names."""
    details = machine_details(device)
    del details["threads"]
    if find_spec("transformers"):
        details["transformers"] = version("transformers")
    return {**details, "float32 products": torch.get_float32_matmul_precision()}


def print_header(config: Namespace, device: torch.device) -> None:
    print(", ".join(f"{key} {value}" for key, value in versions(device).items()))
    print(f"a step: forward, backward, AdamW, gradients dropped; {config.batch} random images, 3/4 of them hidden")
    print(f"{plural(config.rounds, 'round')}, in turns, the order reversed every other time; median (range)")
    if not config.sweep:
        print("ours: fused AdamW; the others: torch's AdamW with its defaults")
    print("the process keeps freed memory (glibc's thresholds): all variants gain from it")
    if "bfloat16" in config.dtypes and device.type == "cpu" and not cpu_has_bfloat16():
        print("this CPU has no bfloat16 products (AVX-512 BF16 or AMX): torch emulates them; expect no gain")
    print(flush=True)


def heading(table: dict[str, Any]) -> str:
    setting = table["setting"]
    return (
        f"{setting['size']}, patch {setting['patch_size']}, {setting['image_size']} px, batch {setting['batch']}, "
        f"{setting['dtype']}, {plural(table['threads'], 'thread')}, {table['clock']}; matrix products: "
        f"{table['product_rate'] / 1e9:,.1f} GFLOP/s at best"
    )


def print_row(name: str, row: dict[str, Any], columns: str) -> None:
    milliseconds = figure([1000 * value for value in row["seconds"].rounds])
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
    print(
        f"{name:<22}{row['images_per_second']:>8,.1f}{milliseconds!s:>34}{peak:>10}"
        f"{row['flops_per_image'] / 1e9:>11.3g}{row['share_of_product_rate']:>13.0%}{columns}"
    )


HEAD = f"{'img/s':>8}{'ms a step':>34}{'peak GiB':>10}{'GFLOP/img':>11}{'of products':>13}"


def print_comparison(table: dict[str, Any]) -> None:
    ours = table["ours_is_faster"]
    print(heading(table))
    print(f"{'':<22}{HEAD}" + "".join(f"{one + ' is faster':>28}" for one in ours))
    for name, row in table["contenders"].items():
        columns = (f"{'':>28}" if name == one else f"{figures[name]!s:>28}" for one, figures in ours.items())
        print_row(name, row, "".join(columns))
    for name, row in table.get("ablation", {}).items():
        paper = f", the paper's {row['paper']}" if row["paper"] else ""
        print(f"without mask tokens, {name}: {row['time']} times as fast; FLOPs {row['flops']:.2f}{paper}")
    print(flush=True)


def print_sweep(table: dict[str, Any]) -> None:
    own = table["setting"][table["sweep"]]
    print(heading(table))
    print(f"{table['variant'] + ', ' + table['sweep']:<22}{HEAD}{'time an image x':>24}{'FLOP x':>9}")
    for value, row in table["values"].items():
        columns = f"{row['time_ratio']!s:>24}{row['flops_ratio']:>9.2f}"
        print_row(f"{value}{' (base)' * (value == own)}", row, columns)
    print(flush=True)
