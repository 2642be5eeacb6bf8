"""`mae demo`: the whole story on 5,000 real handwritten digits, in minutes on a laptop."""

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mae.commands import DEMO_DIR, demo_parser
from mae.evaluation import features, plots
from mae.launch.stages import PretrainCLI
from mae.models.mae import MaskedAutoencoder
from mae.runtime.files import atomic_write_text
from mae.runtime.run_files import read_text

STEPS_PER_EPOCH = 4000 // 64

SETTINGS = [
    # Digits fill their frame and have a handedness: no crops, no flips.
    *("--data.dataset=digits", "--data.crop_scale=null", "--data.hflip=0", "--data.num_workers=0"),
    *("--data.batch_size_per_device=64", "--model.size=nano", "--model.patch_size=4"),
    *("--model.decoder_embed_dim=96", "--model.decoder_depth=2", "--model.decoder_num_heads=3"),
    # Black borders have no variance to normalise by: plain pixels are the better target here.
    *("--model.norm_pix_loss=false", "--model.base_lr=8e-3"),
    *("--trainer.max_epochs=-1", "--checkpoint.every_n_epochs=8", "--panels.every_n_epochs=16"),
    *("--trainer.check_val_every_n_epoch=4", "--trainer.accelerator=cpu"),
]


def demo_command(args: Sequence[str]) -> None:
    config = demo_parser().parse_args(list(args))
    run_dir = Path(config.run_dir)
    settings = run_dir / "config.yaml"
    if config.run_dir == DEMO_DIR and settings.exists() and "dataset: digits" in read_text(settings):
        shutil.rmtree(run_dir)  # an earlier demo; a folder that the user named, or a run on other data, stays

    print("1/3 pre-training on handwritten digits", flush=True)
    start = time.perf_counter()
    cli = PretrainCLI(
        [
            *SETTINGS,
            f"--trainer.max_steps={config.steps}",
            f"--model.warmup_epochs={0.1 * config.steps / STEPS_PER_EPOCH}",
            f"--run_dir={run_dir}",
            f"--seed_everything={config.seed_everything}",
        ]
    )
    model = cli.model.model
    untrained = copy.deepcopy(model).eval()
    cli.fit()
    model.eval()
    minutes = (time.perf_counter() - start) / 60

    print("2/3 comparing features: linear probe and k-NN on held-out digits", flush=True)

    def raw(images: Tensor) -> Tensor:
        return images.flatten(1)

    rows = {"raw": raw, "random": of_patches(untrained), "mae": of_patches(model)}
    lines = ["features   linear probe   k-NN"]
    for name, encode in rows.items():
        found = features.extract_splits(encode, cli.datamodule, torch.device("cpu"))
        score, _ = features.linear_probe(found)
        # k-NN on features as they are: raw pixels are at their best so.
        lines.append(f"{name:<10} {score:>12.2f} {features.knn_accuracy(found):>6.2f}")

    print("3/3 drawing", flush=True)
    curve = run_dir / "loss.png"
    plots.loss_curve(run_dir / "metrics.csv", curve)
    last_panel = max((run_dir / "reconstructions").glob("*.png"))
    table = "\n".join(lines)
    atomic_write_text(run_dir / "table.txt", table + "\n")
    print(f"\n{table}\n\ntop-1 in percent on 1,000 held-out digits; pre-training took {minutes:.1f} minutes")
    print(
        f"reconstructions  {last_panel}\nloss curve       {curve}\nencoder          {run_dir / 'encoder.safetensors'}"
    )


def of_patches(model: MaskedAutoencoder) -> Callable[[Tensor], Tensor]:
    return lambda images: features.mean_of_patches(model.encode(images))
