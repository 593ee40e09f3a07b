"""TensorBoard: event files in the run's folder, written without TensorFlow or torch."""

import html
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ._base import AbstractTracker, Begun, Outcome, Table, TrackedRun, TrackerKind


class TensorBoard(AbstractTracker[Any]):
    """Event files in `tensorboard/` of the run's folder: `tensorboard --logdir runs` shows all runs beside one another.

    The session is the package's writer of event files.
    """

    def begin(self, run: TrackedRun) -> Begun[Any]:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "tensorboard"
        writer = EventFileWriter(str(folder))
        # What was written of later steps is done again: readers drop what is from this step on.
        event = _messages().event
        start = event.SessionLog(status=event.SessionLog.START)
        writer.add_event(event.Event(wall_time=time.time(), step=run.done + 1, session_log=start))
        _write(writer, 0, hparams_pb({key: _hyperparameter(value) for key, value in run.config.items()}, run.name))
        rows = [(key, str(value)) for key, value in run.config.items()]
        _write(writer, run.done, _text("config", _markdown(("key", "value"), rows)))
        return Begun(writer, {}, f"tensorboard --logdir {folder.parent}")

    def step(self, session: Any, step: int, metrics: Mapping[str, float | int]) -> None:
        _write(session, step, _scalars(metrics))

    def completions(self, session: Any, step: int, table: Table) -> None:
        _write(session, step, _text("completions", _markdown(table.columns, table.rows)))

    def summary(self, session: Any, values: Mapping[str, float | int]) -> None:
        _write(session, 0, _scalars(values))

    def end(self, session: Any, outcome: Outcome) -> None:
        try:
            _write(session, 0, _session_end(outcome))
        finally:
            session.close()


def _messages() -> Any:
    """The package's messages, by their files. They are made on import, so that a type checker knows none of them."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    return SimpleNamespace(
        event=event_pb2, summary=summary_pb2, status=api_pb2, hparams=plugin_data_pb2, metadata=metadata
    )


def _write(writer: Any, step: int, summary: Any) -> None:
    """In the file, whole, when it returns: a kill loses nothing that was told."""
    writer.add_event(_messages().event.Event(wall_time=time.time(), step=step, summary=summary))
    writer.flush()


def _scalars(values: Mapping[str, float | int]) -> Any:
    kind = _messages().summary.Summary
    return kind(value=[kind.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _text(tag: str, markdown: str) -> Any:
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, markdown.encode("utf-8", "replace"))


def _session_end(outcome: Outcome) -> Any:
    """How the run ended, for the page of hyperparameters. The package's own function for it wants TensorFlow."""
    messages = _messages()
    status = {
        Outcome.FINISHED: messages.status.STATUS_SUCCESS,
        Outcome.STOPPED: messages.status.STATUS_UNKNOWN,
        Outcome.FAILED: messages.status.STATUS_FAILURE,
    }[outcome]
    info = messages.hparams.SessionEndInfo(status=status, end_time_secs=time.time())
    metadata = messages.metadata
    about = metadata.create_summary_metadata(messages.hparams.HParamsPluginData(session_end_info=info))
    kind = messages.summary.Summary
    return kind(value=[kind.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)])


def _hyperparameter(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _markdown(columns: tuple[str, ...], rows: Any) -> str:
    """A table, which TensorBoard shows as one. What stands in its cells is text, whatever signs are in it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = html.escape("" if value is None else str(value), quote=False)
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text.replace("\n", "<br>")


TRACKER = TrackerKind(TensorBoard(), modules=("tensorboard",), package="tensorboard")
