"""A loader that hangs on one file: the watchdog names it. Real processes; see also the watchdog's own tests."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import save_images

from mae.callbacks.liveness import Alive
from mae.data import sources
from mae.data.datamodule import ImageData
from mae.data.datasets import images_under_way


def train_until_it_hangs(folder: Path, hanging: Path, workers: int, out: Path) -> None:
    """In a process of its own; ends by the watchdog."""
    usual = sources.open_image

    def open_image(data: bytes, path: str, in_chans: int) -> object:
        while str(path) == str(hanging):
            time.sleep(1)
        return usual(data, path, in_chans)

    with (out / "stderr").open("wb") as file:
        os.dup2(file.fileno(), 2)
    with mock.patch.object(sources, "open_image", open_image):
        data = ImageData(root=str(folder), image_size=14, batch_size_per_device=2, num_workers=workers)
        data.setup("fit")
        alive = Alive(mock.Mock(), 1.5 / 60)
        alive.on_train_start(SimpleNamespace(strategy=None, local_rank=0, global_rank=0, default_root_dir=out), None)  # type: ignore[arg-type]
        alive.watchdog.grace = 0.1  # type: ignore[union-attr]
        for _ in data.train_dataloader():
            pass


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_watchdog_names_the_file_that_a_loader_is_at(tmp_path: Path, workers: int) -> None:
    paths = save_images(tmp_path / "images", 8)
    child = os.fork()
    if child == 0:
        try:
            train_until_it_hangs(tmp_path / "images", paths[5], workers, tmp_path)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    line = (tmp_path / "stderr").read_text().splitlines()[0]
    images = line.partition("images being read: ")[2]
    assert images.startswith(f"{paths[5]} (pid ")
    assert images.count("(pid ") == 1  # the other loader waits
    assert (f"(pid {child}, " in images) == (workers == 0)
    assert "; stacks in" in line
    assert images.partition("; ")[0] in (tmp_path / "stacks" / "rank_0000.txt").read_text()


def test_nothing_is_under_way_after_a_batch(tmp_path: Path) -> None:
    save_images(tmp_path, 4)
    data = ImageData(root=str(tmp_path), image_size=14, batch_size_per_device=2, num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(list(loader)) == 2
    assert images_under_way() == ""
