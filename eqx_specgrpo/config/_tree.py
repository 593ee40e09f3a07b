"""The configuration of a run: one typed, frozen tree. It exists at the edge only; below are constructor arguments."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..choices import TASKS, TRACKERS, Among, listed
from ..decoding import VERIFIER_KINDS
from ..distill import DRAFT_LOSS_KINDS
from ..drafts import DRAFT_KINDS, OWN_CLASS
from ..errors import did_you_mean
from ..files import is_import_spec
from ._draft_options import check_options
from ._eval import EvalConfig, check_best_metric
from ._given_names import is_given
from ._grpo import GRPOConfig
from ._lora import LoRAConfig
from ._section import NoneWord as _NoneWord, Section as _Section
from ._tracking import TrackerNames as _TrackerNames

# Those that any temperature may have.
_VERIFIERS = tuple(name for name, kind in VERIFIER_KINDS.items() if not kind.greedy_only)


class ModelConfig(_Section):
    """The model that is trained, the policy."""

    path: str = Field(
        default="", description="folder, .gguf file or org/name of the model; empty: the embedded default model"
    )
    revision: Annotated[str | None, _NoneWord] = Field(
        default=None, description="branch, tag or commit of a model by name; none: the main branch"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the weights in computation; master weights and optimizer states are float32",
    )
    base_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype in which the frozen weights are held while adapters learn (with a lora.rank)",
    )
    adapter: Annotated[str | None, _NoneWord] = Field(
        default=None,
        description="folder of an adapter in PEFT's format to start from; it is trained further, or merged into the "
        "weights with lora.rank = 0",
    )


class TaskConfig(_Section):
    """Where prompts come from. Every key but `name` is an option of the task itself."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="arithmetic", min_length=1, description=listed(TASKS))

    @property
    def options(self) -> dict[str, Any]:
        """The task's own options, to be checked by the task."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _options_are_plain_keys(self):
        if "options" in self.options:
            raise ValueError("write a task's options directly in [task], as in task.high = 99")
        return self


class RewardConfig(_Section):
    """The functions that judge completions."""

    functions: list[str] = Field(default=[], description="reward functions: built-in names, package.module:function or "
                                 "file.py:function; empty: the task's own")  # fmt: skip
    weights: Annotated[list[float] | None, _NoneWord] = Field(
        default=None, description="one weight per function; none: all 1"
    )
    timeout: Annotated[Annotated[float, Field(gt=0)] | None, _NoneWord] = Field(
        default=300.0, description="seconds that each function may take for the completions of a step; none: no limit"
    )

    @model_validator(mode="after")
    def _one_weight_a_function(self):
        if self.weights is not None and self.functions and len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward.weights has {len(self.weights)} values for {len(self.functions)} functions: give one for each"
            )
        return self


class DraftConfig(_Section):
    """The draft: which kind it is, how many tokens it guesses, and how it learns."""

    kind: str = Field(
        default="medusa",
        description=f"kind of draft: {', '.join(DRAFT_KINDS)}, or {OWN_CLASS}; none: plain decoding",
    )
    options: dict[str, Any] = Field(
        default={},
        description="options of a fresh draft of this kind, and of ngram where draft.ngram = true; see below",
    )
    path: Annotated[str | None, _NoneWord] = Field(
        default=None,
        description="folder of a saved draft to start from, which knows its kind and max_length; none: a fresh draft",
    )
    ngram: bool = Field(
        default=False,
        description="in rows where an n-gram matches, guess what followed it before; in others the draft guesses",
    )
    mode: Literal["online", "frozen", "off"] = Field(
        default="online",
        description="online: the draft learns at every step; frozen: in the warm-up only; off: plain decoding",
    )
    length: int = Field(
        default=3, ge=0, le=8, description="tokens guessed in a round (with draft.adaptive, at most); 0: plain decoding"
    )
    adaptive: bool = Field(
        default=True,
        description="choose the number of guesses, from 0 to draft.length, by measured speed and acceptance; false: "
        "always guess draft.length tokens, so that a run can be repeated to the bit",
    )
    max_length: int = Field(
        default=4,
        ge=1,
        le=8,
        description="the most tokens that the draft can guess in a round: its number of heads, for instance",
    )
    verifier: Annotated[str, Among(_VERIFIERS)] = Field(
        default="block",
        description="the lossless rule that checks the guesses: "
        + ", ".join(f"{name} ({VERIFIER_KINDS[name].summary})" for name in _VERIFIERS),
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="learning rate of the draft's own optimizer")
    loss: Annotated[str, Among(tuple(DRAFT_LOSS_KINDS))] = Field(
        default="kl",
        description="what the draft minimises; "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in DRAFT_LOSS_KINDS.items()),
    )
    fraction: float = Field(
        default=0.25, gt=0, le=1, description="share of a step's completions that the draft learns from"
    )
    lesson_share: Annotated[Annotated[float, Field(gt=0)] | None, _NoneWord] = Field(
        default=0.25,
        description="lessons take at most this share of the seconds that speculation saves, after the first ten steps; "
        "none, and always with draft.adaptive = false: one lesson in every step",
    )
    warmup: int = Field(
        default=20, ge=0, description="updates that a fresh draft makes on the first rollouts, before the first step"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="the draft's gradient is clipped to this norm")
    vocabulary: Annotated[Annotated[int, Field(ge=0)] | None, _NoneWord] = Field(
        default=None,
        description="size of the draft's vocabulary, which holds the tokens that the policy's completions use most; "
        "0: the whole vocabulary; none: that of a saved draft, and for a fresh draft 8192 if the model has more than "
        "16384 tokens",
    )
    fit_temperature: bool = Field(
        default=False, description="fit a temperature for each draft position, at which most guesses are accepted"
    )

    @property
    def enabled(self) -> bool:
        """Whether there is a draft at all."""
        return self.kind != "none" and self.mode != "off"

    @property
    def warms_up(self) -> bool:
        """Whether a fresh draft is trained before the first step; a draft that was saved has learned already."""
        return self.enabled and self.path is None and self.warmup > 0 and not is_given(self.kind)

    @property
    def learns(self) -> bool:
        """Whether the draft is distilled during the run."""
        return self.enabled and self.mode == "online"

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind in DRAFT_KINDS or is_import_spec(kind) or is_given(kind):
            return kind
        raise ValueError(
            f"draft.kind = {kind!r}: there is no such draft.{did_you_mean(kind, DRAFT_KINDS)} (Or {OWN_CLASS}.)"
        )

    @model_validator(mode="after")
    def _consistent(self):
        if self.length > self.max_length:
            longer = f"set draft.max_length={self.length} or a shorter draft.length"
            way_out = longer if self.path is None else "set a shorter draft.length, or name another draft"
            raise ValueError(
                f"draft.length = {self.length} is more than draft.max_length = {self.max_length}, the longest draft it "
                f"can make: {way_out}"
            )
        if is_given(self.kind) and self.options:
            raise ValueError(
                f"draft.options.{next(iter(self.options))} is an option of a draft that is made, but {self.kind!r} was "
                "handed over ready: drop one of them"
            )
        kind = DRAFT_KINDS.get(self.kind)
        if kind is not None and kind.needs_learning and self.enabled and self.mode == "frozen" and self.path is None:
            if self.warmup == 0:
                raise ValueError(
                    "draft.mode = 'frozen' with draft.warmup = 0 and no draft.path would guess with heads that never "
                    "learned: name a saved draft in draft.path, or let draft.warmup be above 0"
                )
        if self.path is not None and not self.enabled:
            off = "draft.kind" if self.kind == "none" else "draft.mode"
            raise ValueError(f"draft.path = {self.path!r} names a draft, but {off} says that there is none: drop one")
        if kind is not None and not kind.has_probabilities:
            self._check_without_probabilities()
        if kind is not None:  # a class of the user's own is not imported for this
            complete = self.enabled and self.path is None
            check_options(self.kind, self.ngram, self.max_length, self.options, complete=complete)
        return self

    def _check_without_probabilities(self) -> None:
        if self.ngram:
            raise ValueError(
                f"draft.ngram = true puts an n-gram lookup in front of a draft, but draft.kind is {self.kind!r}: set "
                "draft.kind=ngram alone, or another kind"
            )
        for name, value in (("vocabulary", self.vocabulary), ("fit_temperature", self.fit_temperature)):
            if value:
                raise ValueError(
                    f"draft.{name} = {value!r} is an option of drafts that have probabilities, but draft.kind is "
                    f"{self.kind!r}: drop one of them"
                )


class DevicesConfig(_Section):
    """How a run is divided over devices. All that there are take part, those of other processes included."""

    model: int = Field(
        default=1,
        ge=1,
        description="devices that share one copy of the weights; rows are divided over the rest",
    )


class RunConfig(_Section):
    """The configuration of a run. Most defaults are TRL's, where TRL has the option."""

    steps: int = Field(default=60, ge=1, description="number of steps in all, including those before a resume")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of every random number of the run")
    num_train_epochs: Annotated[Annotated[float, Field(gt=0)] | None, _NoneWord] = Field(
        default=None,
        description="passes over a task that has an end, from which steps follows; none: steps is taken as it is",
    )
    curriculum: Literal["none", "easiest_first"] = Field(
        default="none",
        description="order of the items; none: each epoch is shuffled by seed; easiest_first: from the second epoch "
        "on, items with the highest mean reward in the epoch before come first",
    )
    save_steps: int = Field(
        default=10, ge=1, description="steps between two checkpoints; there is one at the end as well"
    )
    save_total_limit: Annotated[Annotated[int, Field(ge=1)] | None, _NoneWord] = Field(
        default=2, description="number of checkpoints that are kept, the newest ones; none: all"
    )
    save_best: Annotated[str | None, _NoneWord] = Field(
        default=None,
        description='metric of the evaluation by which the best policy is kept in best/, such as "eval/pass@1"; none: '
        "off",
    )
    out: str = Field(default="runs/default", min_length=1, description="the run folder")
    compare: bool = Field(
        default=True, description="measure decoding with the draft against plain decoding at the end of the run"
    )
    tracking: _TrackerNames = Field(
        default=[], description=f"trackers that get the metrics besides metrics.jsonl: any of {listed(TRACKERS, 'and')}"
    )
    project: str = Field(default="eqx_specgrpo", min_length=1, description="project under which trackers file the run")
    run_name: Annotated[str | None, _NoneWord] = Field(
        default=None, description="name of the run in trackers; none: the name of its folder"
    )
    log_completions_steps: int = Field(
        default=10, ge=0, description="steps between two tables of completions for trackers; 0: none"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    draft: DraftConfig = Field(default_factory=DraftConfig)
    devices: DevicesConfig = Field(default_factory=DevicesConfig)

    @model_validator(mode="after")
    def _best_can_be_told(self):
        if self.save_best is not None:
            check_best_metric(self.save_best, self.eval, self.grpo.num_generations)
        return self

    @model_validator(mode="after")
    def _adapters_are_consistent(self):
        if self.lora.rank == 0 and self.model.base_dtype != "float32":
            raise ValueError(
                f"model.base_dtype = {self.model.base_dtype!r} is of weights that stand still, but with lora.rank = 0 "
                "all weights are trained, in float32: set a lora.rank (16 is usual), or leave model.base_dtype out"
            )
        if self.lora.rank > 0 and self.grpo.sync_ref_model:
            raise ValueError(
                "grpo.sync_ref_model = true keeps a second set of all weights, but with lora.rank the reference is the "
                "base, of which no copy is held: set one of the two off"
            )
        return self
