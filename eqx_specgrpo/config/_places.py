"""Files and folders that a configuration names, found again from any working directory."""

from ..choices import absolute_place
from ..files import absolute_spec, is_import_spec
from ..tasks import absolute_task, absolute_task_options
from ._draft_options import with_absolute_places
from ._tree import RunConfig, TaskConfig


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with every file and folder that it names as an absolute path.

    A run keeps it in its folder, where it is found again by a resume that is started elsewhere. What is not there, the
    name of a model to be downloaded, say, stays as it is. So does `out`: a resume is told where the run is.
    """
    draft = config.draft
    return config.model_copy(
        update={
            "model": config.model.model_copy(
                update={
                    "path": absolute_place(config.model.path),
                    "adapter": absolute_place(config.model.adapter),
                }
            ),
            "task": TaskConfig(name=absolute_task(config.task.name), **absolute_task_options(config.task.options)),
            "reward": config.reward.model_copy(
                update={"functions": [_absolute_function(name) for name in config.reward.functions]}
            ),
            "eval": config.eval.model_copy(
                update={
                    "task": absolute_task(config.eval.task) if config.eval.task else "",
                    "functions": [_absolute_function(name) for name in config.eval.functions],
                }
            ),
            "draft": draft.model_copy(
                update={
                    "kind": absolute_spec(draft.kind) if is_import_spec(draft.kind) else draft.kind,
                    "path": absolute_place(draft.path),
                    "options": with_absolute_places(draft.kind, draft.ngram, draft.options) if draft.options else {},
                }
            ),
        }
    )


def _absolute_function(name: str) -> str:
    return absolute_spec(name) if is_import_spec(name) else name
