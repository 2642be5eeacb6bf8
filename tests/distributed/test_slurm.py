"""The sbatch scripts: what they run, what goes back into the queue; and on a real Slurm of two emulated nodes.

The cluster needs root and namespaces, and Debian packages that tests/local-slurm installs. With SLURM_TESTS=required in
the environment its tests fail where it cannot be had, instead of being skipped.
"""

import os
import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import slurm_soak
from conftest import DIGITS, TINY
from slurm_soak import Job

SETTINGS = [*TINY, *DIGITS, "--trainer.log_every_n_steps=1", "--data.batch_size_per_device=128"]

# ---- without a cluster: programs of its names that do as they are told -----------------------------------------------


class Desk:
    """Runs a script as Slurm would, with an srun and an scontrol that say what a test wants and note what is asked."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.notes = folder, folder / "runs", folder / "notes"
        self.program("srun", 'printf "%s\\n" "$@" >srun; eval "$SRUN"')
        self.program(
            "scontrol", 'echo "$*" >>scontrol; [ "$1" = requeue ] || echo "JobId=7 JobState=$STATE Restarts=0"'
        )

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        self.notes.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\ncd {self.notes}\n{text}\n")
        path.chmod(0o755)

    def run(self, *args: str, nodes: int = 1, srun: str = "exit 0", state: str = "RUNNING", **environ: str) -> int:
        """Returns the exit code; `log`, `asked` and `command` are what came of it."""
        for path in self.notes.iterdir():
            path.unlink()
        own = {"SLURM_JOB_NAME": "mine", "SLURM_JOB_ID": "7", "SLURM_NNODES": str(nodes), "SLURM_NTASKS_PER_NODE": "8"}
        own |= {"SLURM_NTASKS": str(8 * nodes), "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(slurm_soak.ROOT)}
        own |= {"SLURM_CPUS_PER_TASK": "3", "RUNS": str(self.runs), "SRUN": srun, "STATE": state}
        own |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **environ}
        with (self.folder / "log").open("a") as log:  # Slurm's, from one start to the next
            done = subprocess.run(
                ["bash", slurm_soak.SCRIPT, *args],
                cwd=slurm_soak.ROOT, env={**os.environ, **own}, stdout=log, stderr=log, timeout=60, check=False,
            )  # fmt: skip
        self.log = (self.folder / "log").read_text()
        self.asked, self.command = self.noted("scontrol"), self.noted("srun")
        return done.returncode

    def noted(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> bool:
        return "requeue 7" in self.asked

    def setting(self, key: str) -> str | None:
        """Of `mae`, the last, which counts."""
        places = [i for i, word in enumerate(self.command) if word == key]
        return self.command[places[-1] + 1] if places else None


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def error_of(code: int) -> str:
    """An srun one of whose tasks ends with this, whereupon the others are killed."""
    return f"echo 'srun: error: node1: tasks 0-1: Exited with exit code {code}' >&2; exit 143"


@pytest.mark.parametrize(
    ("config", "nodes", "accumulate"),
    [
        ("pretrain/vitb16_in1k", 8, "1"),
        ("pretrain/vith14_in1k", 1, "8"),
        ("linprobe/vitl16_in1k", 4, "1"),
        ("linprobe/vitl16_in1k", 1, "4"),
        ("finetune/vitb16_in1k", 2, "2"),
        ("finetune/vith14_in1k", 1, "8"),
        ("pretrain/micro_cifar10", 1, None),  # for any number of devices
    ],
)
def test_a_step_has_as_many_images_on_fewer_nodes(desk: Desk, config: str, nodes: int, accumulate: str | None) -> None:
    stage = config.partition("/")[0]
    # By its name, by its path, and by its name among the configs of the stage.
    for way in (config, f"configs/{config}.yaml", config.partition("/")[2]):
        assert desk.run(stage, "--config", way, nodes=nodes) == 0, desk.log
        assert desk.setting("--trainer.accumulate_grad_batches") == accumulate
        assert (desk.setting("--trainer.num_nodes"), desk.setting("--trainer.devices")) == (str(nodes), "8")


def test_what_is_run(desk: Desk) -> None:
    config = ["--config=configs/pretrain/vitb16_in1k.yaml", "--trainer.accumulate_grad_batches", "3"]
    assert desk.run("pretrain", *config, "--data.root", "a folder", PYTHON="python3") == 0
    assert desk.setting("--trainer.accumulate_grad_batches") == "3"  # what is given counts
    assert desk.setting("--data.root") == "a folder"
    assert (desk.setting("--run_dir"), desk.setting("--ckpt_path")) == (str(desk.runs / "mine"), "last")
    assert "--cpus-per-task=3 python3 -m mae.cli pretrain --config" in " ".join(desk.command)


@pytest.mark.parametrize(
    ("args", "name", "complaint"),
    [
        (["predict"], "mine", "'predict' is not a stage"),
        (["pretrain"], "train_8x8.sbatch", "the run has no name"),
        (["pretrain", "--run_dir=runs/other"], "mine", "follow from the job's name"),
        (["pretrain", "--config", "nowhere.yaml"], "mine", "--config nowhere.yaml cannot be read"),
        (["probe", "--config", "configs/linprobe/vitb16_in1k.yaml"], "mine", "is for 32 devices"),
    ],
)
def test_what_cannot_be_meant_is_refused(desk: Desk, args: list[str], name: str, complaint: str) -> None:
    assert desk.run(*args, nodes=8, SLURM_JOB_NAME=name) == 2
    assert complaint in desk.log
    assert not desk.command


@pytest.mark.parametrize(
    ("srun", "state", "code", "requeued"),
    [
        ("exit 0", "RUNNING", 0, False),
        ("exit 137", "RUNNING", 137, True),
        (error_of(1), "RUNNING", 143, True),
        (error_of(2), "RUNNING", 2, False),  # the user's mistake
        (error_of(130), "RUNNING", 130, False),  # Ctrl-C
        ("exit 143", "CANCELLED", 143, False),
        ("exit 143", "PENDING", 143, False),  # in the queue already
    ],
)
def test_what_goes_back_into_the_queue(desk: Desk, srun: str, state: str, code: int, requeued: bool) -> None:
    assert (desk.run("pretrain", srun=srun, state=state), desk.requeued) == (code, requeued)


def test_the_log_of_earlier_starts_does_not_count(desk: Desk) -> None:
    assert desk.run("pretrain", srun=error_of(2)) == 2
    assert desk.run("pretrain", srun="exit 1") == 1
    assert desk.requeued


def test_crashes_count_until_there_is_a_new_checkpoint(desk: Desk) -> None:
    def crash(**environ: str) -> bool:
        assert desk.run("pretrain", srun="exit 1", **environ) == 1
        return desk.requeued

    assert [crash(), crash(), crash()] == [True, True, False]
    assert desk.log.endswith("crash 3 since the newest checkpoint (none): giving up\n")
    assert crash(SLURM_JOB_ID="8") is False  # noted under its own id
    assert desk.asked[-1] == "requeue 8"
    (desk.runs / "mine" / "checkpoints").mkdir()
    last = desk.runs / "mine" / "checkpoints" / "last.ckpt"
    last.symlink_to("step_0000010.ckpt")
    assert [crash(), crash()] == [True, True]
    assert desk.run("pretrain", srun="exit 0") == 0  # gone back into the queue, as after a preemption
    last.unlink()
    last.symlink_to("step_0000020.ckpt")
    assert [crash(), crash(), crash()] == [True, True, False]
    assert crash(CRASHES="9") is True


def test_of_an_array_the_task_goes_back(desk: Desk) -> None:
    desk.run("pretrain", srun="exit 1", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert desk.asked[-1] == "requeue 5_2"


# ---- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster() -> Iterator[Mapping[str, str]]:
    try:
        with slurm_soak.cluster() as environ:
            yield environ
    except slurm_soak.NoCluster as error:
        if os.environ.get("SLURM_TESTS") == "required":
            raise
        pytest.skip(str(error).splitlines()[-1])


def job(cluster: Mapping[str, str], folder: Path, name: str, *settings: str, **environ: str) -> Job:
    return Job(cluster, folder, name, [*SETTINGS, *settings], own_environ=environ)


@pytest.mark.slow
def test_a_job_that_is_signalled_and_crashes_ends_with_the_same_bits(
    cluster: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm_soak.soak(cluster, tmp_path, ["usr1", "kill"], random.Random(0))
    assert "start 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_away(cluster: Mapping[str, str], tmp_path: Path) -> None:
    slow = "--trainer.callbacks+=slurm_soak.SlowRank"
    training = job(cluster, tmp_path, "new", slow, "--trainer.max_steps=200", SLOW="0.5")
    training.submit()
    try:
        assert training.wait_for_start(1).first == 1  # whatever other jobs have left
        training.command("scancel", training.id)
        assert training.wait_for_the_end() == "CANCELLED"
    finally:
        training.cancel()
    assert training.state()["Restarts"] == "0"
    assert "has been cancelled; --ckpt_path last goes on" in training.log()
    assert training.starts()[0].stopped == training.kept() > 0


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(cluster: Mapping[str, str], tmp_path: Path) -> None:
    wrong = job(cluster, tmp_path, "wrong", "--trainer.max_steps=9", "--data.dataset=folder", "--data.root=nowhere")
    wrong.submit()
    assert wrong.wait_for_the_end() == "FAILED"
    assert (wrong.state()["ExitCode"], wrong.state()["Restarts"]) == ("2:0", "0")
    assert "mae: error" in wrong.log()


@pytest.mark.slow
def test_crashes_without_progress_are_bounded(cluster: Mapping[str, str], tmp_path: Path) -> None:
    hopeless = job(cluster, tmp_path, "hopeless", PYTHON="false", CRASHES="2")
    hopeless.submit()
    assert hopeless.wait_for_the_end() == "FAILED"
    assert (hopeless.state()["ExitCode"], hopeless.state()["Restarts"]) == ("1:0", "1")
    assert "crash 2 since the newest checkpoint (none): giving up" in hopeless.log()
