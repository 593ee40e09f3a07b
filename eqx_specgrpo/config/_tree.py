"""The configuration of a run: one typed, frozen tree. It exists at the edge only; below are constructor arguments."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..errors import did_you_mean
from ..files import is_import_spec

DRAFT_KINDS = ("medusa", "hydra", "eagle", "model", "layer_skip", "ngram", "none")
DRAFT_OPTIONS = ("ngram", "train_length", "num_layers", "model", "min_ngram")  # of a kind, or beside it
# These begin as the target's own prediction, one token late: they are rarely right before they have learned.
_NEED_LEARNING = ("medusa", "hydra", "eagle")

# TOML has no null, so that an optional key is unset with the word "none".
_NoneWord = BeforeValidator(lambda value: None if value in ("none", "None") else value)


class _Section(BaseModel):
    # `strict`: "60" is not a number, and `true` is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(_Section):
    """The target, which is the policy."""

    path: str = Field(default="", description="folder, .gguf file or org/name; empty: the embedded default model")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in computation; master weights and optimizer are float32"
    )


class TaskConfig(_Section):
    """Where prompts come from. Every key but `name` is an option of the task itself."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="arithmetic", min_length=1, description="a built-in task, FILE.jsonl or reasoning_gym:NAME"
    )

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
    """What is rewarded."""

    functions: list[str] = Field(default=[], description="built-in names, package.module:function or file.py:function; "
                                 "empty: the task's own")  # fmt: skip
    weights: Annotated[list[float] | None, _NoneWord] = Field(default=None, description="one a function, none: all 1")

    @model_validator(mode="after")
    def _one_weight_a_function(self):
        if self.weights is not None and self.functions and len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward.weights has {len(self.weights)} values for {len(self.functions)} functions: give one for each"
            )
        return self


class GRPOConfig(_Section):
    """The policy's side. Names follow TRL where it has the option, and so do most defaults."""

    num_generations: int = Field(default=8, ge=2, description="completions of each prompt: the group")
    prompts_per_step: int = Field(default=4, ge=1, description="prompts of a step")
    max_completion_length: int = Field(default=160, ge=1, description="longest completion, in tokens")
    max_rows: Annotated[Annotated[int, Field(ge=1)] | None, _NoneWord] = Field(
        default=None,
        description="completions decoded at a time; when some finish, waiting ones take their places; none: all",
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling, and of the log-probabilities in the loss")
    learning_rate: float = Field(default=1e-6, ge=0, description="AdamW's, at its height")
    lr_scheduler_type: Literal["constant", "linear"] = Field(
        default="linear", description="linear: down to 0 at the last step"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises from 0")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="the policy's gradient is clipped to this norm")
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        default="dapo", description="how token losses are averaged"
    )
    epsilon: float = Field(default=0.2, gt=0, le=1, description="the ratio is clipped below at 1 - epsilon")
    epsilon_high: Annotated[Annotated[float, Field(gt=0)] | None, _NoneWord] = Field(
        default=None, description="the ratio is clipped above at 1 + epsilon_high; none: epsilon"
    )
    delta: Annotated[Annotated[float, Field(gt=1)] | None, _NoneWord] = Field(
        default=None,
        description="upper bound of the ratio where the advantage is negative (two-sided clipping); none: off",
    )
    beta: float = Field(
        default=0.0, ge=0, description="weight of the KL to the starting policy; 0: no reference is held"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group", description="whose standard deviation divides the advantages"
    )
    num_iterations: int = Field(default=1, ge=1, description="updates on each batch of rollouts")
    mask_truncated_completions: bool = Field(
        default=False, description="leave completions without an end out of the loss"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="micro-batches a step is split into")
    max_tokens_per_micro_batch: Annotated[Annotated[int, Field(ge=1)] | None, _NoneWord] = Field(
        default=None,
        description="divide the rows further, until no micro-batch of several rows holds more tokens, padding "
        "included; none: by an estimate of what the memory holds, at most 2048 on a CPU (not with bnpo), and further "
        "where keeping short rows, or rows without a gradient, apart saves a tenth",
    )
    gradient_checkpointing: Literal["auto", True, False] = Field(
        default="auto",
        description="keep only the layers' inputs for the backward pass: less memory, more arithmetic; auto: where, by "
        "an estimate, keeping all takes more than there is, or on a CPU more than an eighth of the machine's memory",
    )
    logprob_chunk: int = Field(default=512, ge=1, description="tokens unembedded at a time")

    @model_validator(mode="after")
    def _consistent(self):
        rows = self.num_generations * self.prompts_per_step
        if rows % self.gradient_accumulation_steps:
            raise ValueError(
                f"grpo.gradient_accumulation_steps = {self.gradient_accumulation_steps} does not divide the {rows} "
                "rows of a step (num_generations * prompts_per_step): choose a divisor"
            )
        if self.loss_type == "bnpo" and self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                "grpo.max_tokens_per_micro_batch with grpo.loss_type = 'bnpo', whose value depends on the "
                "micro-batches: set grpo.gradient_accumulation_steps instead, or use loss_type 'dapo'"
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"grpo.delta = {self.delta} must be greater than 1 + epsilon_high = {1 + high}: below that it would "
                "override the ordinary clipping"
            )
        return self


class DraftConfig(_Section):
    """The draft's side: what guesses, how far ahead, and how it keeps learning."""

    kind: str = Field(
        default="medusa",
        description="medusa, hydra, eagle, model, layer_skip, ngram, none (plain decoding), or a class of your own as "
        "file.py:Class or package.module:Class",
    )
    path: Annotated[str | None, _NoneWord] = Field(
        default=None, description="a saved draft to start from, which says its kind and max_length; none: a fresh one"
    )
    ngram: bool = Field(
        default=False, description="where an n-gram matches, take what followed it before; else the draft guesses"
    )
    mode: Literal["online", "frozen", "off"] = Field(
        default="online", description="online: distilled at every step; frozen: only warmed up; off: plain decoding"
    )
    length: int = Field(default=3, ge=0, le=8, description="tokens guessed ahead in a round; 0: plain decoding")
    adaptive: bool = Field(
        default=True,
        description="guess as many tokens, up to draft.length, as measured times and acceptance say pays, or none; "
        "false: always draft.length, and a run can be repeated to the bit",
    )
    max_length: int = Field(
        default=4, ge=1, le=8, description="the longest draft that it can make: how many heads it has, for instance"
    )
    verifier: Literal["rejection", "block", "coupled"] = Field(
        default="block",
        description="the lossless rule that checks the guesses: token by token, together, or by shared noise",
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="of the draft's own optimizer")
    loss: Literal["kl", "reverse_kl", "tv", "hybrid", "e2e_tv"] = Field(
        default="kl",
        description="forward or reverse KL, total variation, KL that becomes total variation as acceptance grows, or "
        "the rejected share of a whole chain; tv and e2e_tv are for drafts that are aligned already",
    )
    fraction: float = Field(default=0.25, gt=0, le=1, description="share of the rollouts that the draft learns from")
    warmup: int = Field(default=20, ge=0, description="updates of a fresh draft on the first rollouts, before step 0")
    max_grad_norm: float = Field(default=1.0, gt=0, description="the draft's gradient is clipped to this norm")
    train_length: Annotated[Annotated[int, Field(ge=1, le=8)] | None, _NoneWord] = Field(
        default=None, description="eagle: steps unrolled in training; none: 3, or max_length if that is less"
    )
    num_layers: Annotated[Annotated[int, Field(ge=1)] | None, _NoneWord] = Field(
        default=None, description="layer_skip: how many of the target's first layers draft; none: a quarter of them"
    )
    model: Annotated[str | None, _NoneWord] = Field(
        default=None, description="model: the drafting model's folder, .gguf file or org/name"
    )
    min_ngram: Annotated[Annotated[int, Field(ge=1)] | None, _NoneWord] = Field(
        default=None, description="ngram: tokens that must match at least; none: 2, or 3 in front of another draft"
    )
    vocabulary: Annotated[Annotated[int, Field(ge=0)] | None, _NoneWord] = Field(
        default=None,
        description="guess only so many tokens, those that the policy's completions use most, kept up to date; 0: all; "
        "none: as a saved draft has it; a fresh one 8192 if the model has more than twice as many, else all",
    )
    fit_temperature: bool = Field(
        default=False, description="follow the temperature of each draft position that is accepted most"
    )

    @property
    def enabled(self) -> bool:
        """Whether there is a draft at all."""
        return self.kind != "none" and self.mode != "off"

    @property
    def warms_up(self) -> bool:
        """Whether a fresh draft is trained before step 0; a draft that was saved has learned already."""
        return self.enabled and self.path is None and self.warmup > 0

    @property
    def learns(self) -> bool:
        """Whether the draft is distilled during the run."""
        return self.enabled and self.mode == "online"

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind in DRAFT_KINDS or is_import_spec(kind):
            return kind
        raise ValueError(
            f"draft.kind = {kind!r}: there is no such draft.{did_you_mean(kind, DRAFT_KINDS)} (Or a class of your own "
            "as file.py:Class or package.module:Class.)"
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
        if self.enabled and self.kind in _NEED_LEARNING and self.mode == "frozen" and self.path is None:
            if self.warmup == 0:
                raise ValueError(
                    "draft.mode = 'frozen' with draft.warmup = 0 and no draft.path would guess with heads that never "
                    "learned: name a saved draft in draft.path, or let draft.warmup be above 0"
                )
        if self.path is not None and not self.enabled:
            off = "draft.kind" if self.kind == "none" else "draft.mode"
            raise ValueError(f"draft.path = {self.path!r} names a draft, but {off} says that there is none: drop one")
        if self.ngram and self.kind in ("ngram", "none"):
            raise ValueError(
                f"draft.ngram = true puts an n-gram lookup in front of a draft, but draft.kind is {self.kind!r}: set "
                "draft.kind=ngram alone, or another kind"
            )
        if self.kind == "model" and self.model is None and self.path is None:
            raise ValueError("draft.kind = 'model' drafts with another model: name it in draft.model")
        if self.train_length is not None and self.train_length > self.max_length:
            raise ValueError(
                f"draft.train_length = {self.train_length} is more than draft.max_length = {self.max_length}: nothing "
                "that far ahead is ever drafted"
            )
        self._check_options()
        return self

    def _check_options(self) -> None:
        looks_up = self.ngram or self.kind == "ngram"
        has_logits, of_logits = self.kind not in ("ngram", "none"), "drafts that have probabilities"
        for name, value, serves, of in (
            ("train_length", self.train_length, self.kind == "eagle", "kind 'eagle'"),
            ("num_layers", self.num_layers, self.kind == "layer_skip", "kind 'layer_skip'"),
            ("model", self.model, self.kind == "model", "kind 'model'"),
            ("min_ngram", self.min_ngram, looks_up, "kind 'ngram' and of draft.ngram = true"),
            ("vocabulary", self.vocabulary or None, has_logits, of_logits),
            ("fit_temperature", self.fit_temperature or None, has_logits, of_logits),
        ):
            if value is not None and not serves:
                raise ValueError(
                    f"draft.{name} = {value!r} is an option of {of}, but draft.kind is {self.kind!r}: drop one of them"
                )


class RunConfig(_Section):
    """All of a run. See the sections for what each key means. Defaults are TRL's where it has the option, mostly."""

    steps: int = Field(default=60, ge=1, description="steps in all, those before a resume included")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything random")
    save_steps: int = Field(default=10, ge=1, description="a checkpoint every so many steps, and at the end")
    out: str = Field(default="runs/default", min_length=1, description="the run folder")
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    draft: DraftConfig = Field(default_factory=DraftConfig)
