"""Standard output and error that are closed or full, places that cannot be written, and who ends the program."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from tiny_run import as_flags, tiny_folder as tiny_folder, tiny_settings

from eqx_specgrpo.bench import check_plot
from eqx_specgrpo.cli import main
from eqx_specgrpo.errors import Stopped, UserError
from eqx_specgrpo.records import RunFolder, latest_checkpoint, read_records, save_figure, try_folder
from eqx_specgrpo.runtime import (
    GuardedOutput,
    OutputLost,
    check_output_arrived,
    ending_on_our_terms,
    guarded_streams,
    plain_lines_in_notebooks,
    progress_console,
)

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")


class Broken(io.StringIO):
    """A stream whose other end raises."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error", [FULL, BrokenPipeError(errno.EPIPE, "Broken pipe"), RuntimeError("reentrant call inside")], ids=repr
)
def test_progress_is_dropped(error):
    stream = GuardedOutput(Broken(error))
    assert stream.write("text") == 4
    stream.flush()
    assert stream.lost is error


def test_what_can_be_written_is(monkeypatch):
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = GuardedOutput(inner)
    stream.write("caf\xe9 \ud83d\n")
    stream.flush()
    assert inner.buffer.getvalue() == b"caf? ?\n" and stream.lost is None and stream.encoding == "ascii"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr("sys.stdout", None)  # what Python makes of a stream that was closed from the start
    progress_console().print("anything")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    progress_console().print("anything")


def test_progress_in_a_notebook_is_lines_of_text(monkeypatch):
    """Not one output in HTML for each, and no live line, though kernels ask for colours."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    told = io.StringIO()
    monkeypatch.setattr("sys.stdout", told)
    assert Console().is_jupyter
    with progress_console().status("live"):
        progress_console().print("[red]step 1")
    assert told.getvalue() == "step 1\n"


@pytest.mark.parametrize("in_notebook", [True, False])
def test_a_command_in_a_notebook_is_not_at_a_terminal(monkeypatch, in_notebook):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    if in_notebook:
        monkeypatch.setenv("JPY_PARENT_PID", "1")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    plain_lines_in_notebooks()
    assert Console(file=io.StringIO()).is_terminal is not in_notebook


def test_results_that_did_not_arrive_are_an_error(monkeypatch):
    for error, code, words in (
        (FULL, 2, "standard output could not be written, and its end is missing: No space left"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 128 + signal.SIGPIPE, ""),
    ):
        monkeypatch.setattr("sys.stdout", Broken(error))
        with guarded_streams():
            print("a result")
            with pytest.raises(OutputLost) as info:
                check_output_arrived()
        assert (
            info.value.exit_code == code and str(info.value).startswith(words) and bool(words) == bool(str(info.value))
        )
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with guarded_streams():
        print("a result")
        check_output_arrived()


@needs_dev_full
def test_a_run_goes_on_without_its_output(tiny_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr("eqx_specgrpo.cli.keep_freed_memory", lambda: None)
    settings = tiny_settings(tiny_folder, out, "steps=1", "draft.mode=off")
    monkeypatch.setattr("sys.argv", ["specgrpo", "run", *as_flags(settings)])
    # A descriptor of its own, which is pointed elsewhere in the end.
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as info:
            main()
    assert not info.value.code and capsys.readouterr().err == ""
    assert len(read_records(out / "metrics.jsonl")) == 1 and (out / "policy" / "model.safetensors").is_file()
    assert latest_checkpoint(out) == out / "checkpoints" / "step-000001"


def test_a_reader_that_has_gone(tmp_path):
    """In a process of its own, where Python says at its end what it could not write; and with no descriptors at all,
    where the first file opened would be standard output."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    # Much, which cannot be written before the end, and little, which Python would first write at its end.
    for arguments, code in ((["run", "--dry-run", "--out", str(tmp_path / "run")], 141), (["--version"], 0)):
        command = [sys.executable, "-c", "from eqx_specgrpo.cli import main; main()", *arguments]
        finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
        assert (finished.returncode, finished.stderr) == (code, "")
    os.close(writer)
    held = (
        "import os\nfrom eqx_specgrpo.runtime import hold_standard_descriptors\n"
        f"hold_standard_descriptors()\nraise SystemExit(os.open({str(tmp_path)!r}, os.O_RDONLY) <= 2)"
    )
    finished = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, held])
    assert finished.returncode == 0


def test_who_ends_the_program(capsys):
    def leave(code):
        sys.exit(code)

    with pytest.raises(UserError, match=r"test_output.py, line \d+: sys.exit\(0\) was called there"):
        with ending_on_our_terms("stopped"):
            leave(0)
    for stop, code, said in (
        (Stopped(signal.SIGTERM, at_once=True), 143, "stopped\n"),
        (Stopped(signal.SIGHUP, at_once=False), 129, ""),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ):
        with pytest.raises(SystemExit) as info:
            with ending_on_our_terms("stopped"):
                raise stop
        assert info.value.code == code and capsys.readouterr().err == said


def test_who_ends_the_program_where_its_exit_is_anothers(monkeypatch):
    """As under wandb, which has a method `exit` in that place."""
    leave = sys.exit

    def exit(code=0):
        leave(code)

    monkeypatch.setattr(sys, "exit", exit)
    with pytest.raises(UserError, match=r"test_output.py, line (\d+): sys.exit\(3\) was called there") as info:
        with ending_on_our_terms("stopped"):
            sys.exit(3)
    assert "leave" not in str(info.value)


def test_places_are_tried_and_left_as_they_were(tmp_path, monkeypatch):
    try_folder(tmp_path / "a" / "b")
    (tmp_path / "there").mkdir()
    try_folder(tmp_path / "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "d", tmp_path / "file"):
        with pytest.raises(UserError, match="cannot be written: .*--out"):
            try_folder(place)

    def full(*_):
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        RunFolder(tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


def test_a_picture_is_tried_before_what_it_shows(tmp_path, monkeypatch):
    check_plot(tmp_path / "bench.png")
    check_plot(tmp_path / "bench")
    for place, words in (
        (tmp_path / "bench.xyz", "no picture format .xyz"),
        (tmp_path / "nowhere" / "bench.png", "there is no folder"),
        (tmp_path, "is a folder: name a file"),
    ):
        with pytest.raises(UserError, match=words):
            check_plot(place)
    monkeypatch.setattr("sys.argv", ["specgrpo", "bench", "--plot", str(tmp_path / "bench.xyz")])
    monkeypatch.setattr("eqx_specgrpo.cli.keep_freed_memory", lambda: None)
    monkeypatch.setattr("eqx_specgrpo.bench.bench", None)  # it does not come to that
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2 and not list(tmp_path.iterdir())


def test_a_picture_that_is_there_outlives_a_full_disk(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    picture = save_figure(Figure(), tmp_path / "curves.png")
    before = picture.read_bytes()

    def full(*_):
        raise FULL

    monkeypatch.setattr("eqx_specgrpo.records._folder.os.fsync", full)
    with pytest.raises(UserError, match="curves.png could not be written: No space left.*as it was"):
        save_figure(Figure(figsize=(1, 1)), tmp_path / "curves.png")
    assert picture.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["curves.png"]
