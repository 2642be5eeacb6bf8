"""A fixed sample of the files that `tests/soak/fuzz.py` changes at random; and whether it would see what is wrong."""

import time
from pathlib import Path

import fuzz
import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read in /proc")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(
    ("name", "cases"), [("image", 1500), ("weights", 400), ("index", 600), ("tar", 1500), ("run", 500)]
)
def test_changed_files_are_read_or_refused_in_one_line(
    name: str, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 60)  # of a busy machine
    outcomes, findings = fuzz.attack(name, range(cases), tmp_path)
    assert findings == []
    assert outcomes["refused"] > 50
    assert sum(outcomes.values()) == cases


@needs_proc
def test_what_a_reader_must_not_do_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path) -> list[Path]:
        (folder / "file").write_text("whole")
        return [folder / "file"]

    def raises(path: Path) -> None:
        raise KeyError(path)

    bad = {"raises": raises, "hangs": lambda _: time.sleep(60), "grows": lambda _: len(b"x" * (300 << 20))}
    said = {"raises": "see above", "hangs": "took over 1 s", "grows": "see above"}
    for name, read in bad.items():
        target = fuzz.Target(make, read, 256, fuzz.plain)
        monkeypatch.setitem(fuzz.TARGETS, name, target)
        monkeypatch.setattr(fuzz, "SECONDS", 1 if name == "hangs" else 60)
        outcomes, (finding,) = fuzz.attack(name, [7], tmp_path)
        assert finding.startswith(f"{name} 7: {said[name]}; {tmp_path}")
        assert not outcomes.total()
