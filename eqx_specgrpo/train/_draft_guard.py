"""That the draft which guesses is the one that learned last: a stale one costs speed, which nothing else would show."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..drafts import AbstractDraft, draft_digest
from ..errors import UserError

FINGERPRINT = "draft/fingerprint"


class DraftGuard:
    """Follows the draft of a run by its fingerprint.

    **Arguments:**

    - `records`: of the steps that are done, as `metrics.jsonl` has them; those of earlier versions have no fingerprint.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self._seen: dict[int, int] = {}  # the last step that left each
        self._newest: int | None = None
        for record in records:
            if FINGERPRINT in record:
                self._keep(int(record[FINGERPRINT]), int(record["step"]))

    def _keep(self, digest: int, step: int) -> None:
        self._seen[digest], self._newest = step, digest

    def begin(self, draft: AbstractDraft, step: int) -> None:
        """Before the rollouts of a step.

        **Raises:**

        `UserError` if this is not the draft that the step before has left.
        """
        digest = draft_digest(draft)
        if self._newest is not None and digest != self._newest:
            older = f", but that of step {self._seen[digest]}" if digest in self._seen else ""
            raise UserError(
                f"step {step} would guess with another draft than step {self._seen[self._newest]} left "
                f"({digest} instead of {self._newest}){older}: the draft of a run is changed by its lessons alone. "
                "A callback that replaced it, or a checkpoint whose files are of two runs, does this"
            )
        self._keep(digest, step - 1)

    def end(
        self, draft: AbstractDraft, step: int, lessons: int, *, can_change: bool, remembers: bool = False
    ) -> dict[str, int]:
        """After a step's lessons.

        **Arguments:**

        - `lessons`: how many updates the draft has had in this step.
        - `can_change`: whether they had a gradient and a learning rate.
        - `remembers`: whether it was told of rollouts that it may have kept.

        **Returns:**

        The metric of the step.

        **Raises:**

        `UserError` if the lessons changed nothing, or if the draft is an older one; and if it has changed without
        lessons.
        """
        digest = draft_digest(draft)
        if lessons == 0 and not remembers and digest != self._newest:
            raise UserError(f"step {step}: the draft has changed, though it had no lesson: something else changed it")
        if lessons > 0 and can_change and digest == self._newest:
            raise UserError(
                f"step {step}: {lessons} lesson{'s' if lessons > 1 else ''} changed nothing of the draft. Its learning "
                "rate may be too small for float32 (draft.learning_rate), or an optimizer of your own lets it stand "
                "still: draft.mode=frozen says so without lessons"
            )
        if lessons > 0 and digest != self._newest and digest in self._seen:
            raise UserError(
                f"step {step}: after its lessons the draft is that of step {self._seen[digest]} again: an older one "
                "was taken in its place"
            )
        self._keep(digest, step)
        return {FINGERPRINT: digest}
