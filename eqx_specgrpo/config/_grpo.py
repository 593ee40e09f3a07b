"""`[grpo]`: the policy's side of a run. What a loss alone has a use for is stated by the loss, and read here."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from ..grpo import (
    OPTIMIZERS,
    POLICY_LOSSES,
    AbstractPolicyLoss,
    AdvantageEstimator,
    CorrectionMode,
    KLEstimator,
    Level,
    OptimizerName,
    ScaleRewards,
)
from ..grpo.losses import LossOption, options_of
from ._section import NoneWord, Section


def _of_bool(value: Any) -> Any:
    """TRL takes `scale_rewards` as a boolean as well."""
    return {True: "group", False: "none"}[value] if isinstance(value, bool) else value


class _Keys(Section):
    num_generations: int = Field(
        default=8, ge=2, description="number of completions of each prompt, which are its group"
    )
    prompts_per_step: int = Field(default=4, ge=1, description="number of prompts of a step")
    max_sample_batches: int = Field(
        default=1,
        ge=0,
        description="dynamic sampling: the most batches of prompts_per_step prompts that a step may take to find "
        "prompts whose completions differ in their rewards; 0 or 1: off",
    )
    max_completion_length: int = Field(default=160, ge=1, description="length of the longest completion, in tokens")
    max_rows: Annotated[Annotated[int, Field(ge=1)] | None, NoneWord] = Field(
        default=None,
        description="number of completions that are decoded at a time; waiting ones take the places of finished ones; "
        "none: all of a step",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="temperature of sampling; the loss uses log-probabilities at the same temperature",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample among the likeliest tokens whose probabilities add up to this; 1: among all",
    )
    top_k: int = Field(default=0, ge=0, description="sample among this number of likeliest tokens; 0: among all")
    min_p: Annotated[Annotated[float, Field(gt=0, le=1)] | None, NoneWord] = Field(
        default=None,
        description="sample among tokens with at least this share of the likeliest token's probability; none: among "
        "all",
    )
    max_support: int = Field(
        default=128,
        ge=1,
        description="with top_p, top_k or min_p: the most tokens kept at a position, the likeliest ones; kept tokens "
        "are recorded (4 bytes each), and the loss uses the probabilities among them",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="texts that end a completion, at the first token with which one of them is complete"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="arguments of the chat template, such as {enable_thinking = false}"
    )
    learning_rate: float = Field(default=1e-6, ge=0, description="highest learning rate of the policy's optimizer")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        default="linear",
        description="schedule of the learning rate; linear and cosine fall to 0 at the last step; each warms up for "
        "grpo.warmup_steps",
    )
    warmup_steps: int = Field(default=0, ge=0, description="number of steps over which the learning rate rises from 0")
    optim: OptimizerName = Field(
        default="adamw",
        description="the policy's optimizer; "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in OPTIMIZERS.items()),
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay rate of the first moment, for adamw and lion")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="decay rate of the second moment, for adamw and lion"
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="epsilon of AdamW")
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled weight decay, multiplied by the learning rate; vectors have none"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="norm to which the policy's gradient is clipped")
    loss_type: str = Field(default="dapo", description="loss of the policy; see docs/losses.md")
    importance_sampling_level: Level = Field(
        default="token", description="one importance ratio per token, or one per completion (GSPO, with loss_type grpo)"
    )
    beta: float = Field(
        default=0.0,
        ge=0,
        description="weight of the KL divergence from the starting policy; 0: no reference model is held",
    )
    kl_estimator: KLEstimator = Field(default="k3", description="estimator of the KL from the probabilities of a token")
    use_bias_correction_kl: bool = Field(
        default=True,
        description="multiply the estimate of the KL by the importance ratio, which makes the gradient of k1 and k3 "
        "unbiased",
    )
    use_kl_in_reward: bool = Field(
        default=False,
        description="subtract the KL, summed over the completion, from the rewards, in place of adding it to the loss",
    )
    sync_ref_model: bool = Field(
        default=False, description="move the reference model towards the policy every ref_model_sync_steps"
    )
    ref_model_mixup_alpha: float = Field(
        default=0.6, gt=0, le=1, description="share of the policy in the new reference model; the rest is the old one"
    )
    ref_model_sync_steps: int = Field(default=512, ge=1, description="steps between two moves of the reference model")
    advantage_estimator: AdvantageEstimator = Field(
        default="group", description="estimator of the advantages from the rewards; see docs/losses.md"
    )
    scale_rewards: Annotated[ScaleRewards, BeforeValidator(_of_bool)] = Field(
        default="group",
        description="standard deviation by which advantages are divided (estimators group and pass_at_k): that of the "
        "group, of the batch, or none; true: group, false: none",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        default="sum_then_normalize", description="how several reward functions are joined; normalize_then_sum: GDPO"
    )
    num_iterations: int = Field(default=1, ge=1, description="number of updates on each batch of rollouts")
    mask_truncated_completions: bool = Field(
        default=False, description="leave completions that were cut off out of the loss"
    )
    off_policy_mask_threshold: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(
        default=None,
        description="leave completions with a negative advantage out of the loss if their mean log(sampler/policy) is "
        "above this; none: off",
    )
    top_entropy_quantile: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the step's tokens that count in the loss, those with the highest entropy; 1: all",
    )
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the mean entropy as a bonus in the loss")
    use_adaptive_entropy: bool = Field(
        default=False,
        description="raise entropy_coef by entropy_coef_delta after a step whose entropy is at or below "
        "entropy_target, and lower it after others",
    )
    entropy_target: float = Field(
        default=0.2, ge=0, description="entropy in nats per token, above which there is no bonus"
    )
    entropy_coef_delta: float = Field(default=0.005, gt=0, description="change of entropy_coef after a step")
    entropy_coef_min: float = Field(default=0.0, ge=0, description="lower bound of entropy_coef while it adapts")
    entropy_coef_max: float = Field(default=1.0, ge=0, description="upper bound of entropy_coef while it adapts")
    importance_sampling_correction: bool = Field(
        default=False,
        description="weigh tokens by the ratio of the trainer's and the decoder's probability; of use in bfloat16, "
        "where the two differ",
    )
    importance_sampling_mode: CorrectionMode = Field(
        default="sequence_mask",
        description="one weight per token or per completion; a weight beyond the bounds is clipped (truncate) or 0 "
        "(mask)",
    )
    importance_sampling_clip_max: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(
        default=3.0, description="upper bound of the weight; none: no bound"
    )
    importance_sampling_clip_min: Annotated[Annotated[float, Field(gt=0)] | None, NoneWord] = Field(
        default=None, description="lower bound of the weight; none: no bound"
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="number of micro-batches that a step is split into"
    )
    max_tokens_per_micro_batch: Annotated[Annotated[int, Field(ge=1)] | None, NoneWord] = Field(
        default=None,
        description="the most tokens of a micro-batch, padding included; a single row is never cut; none: chosen by an "
        "estimate of the memory, at most 2048 on a CPU (not with bnpo), and divided further where keeping short rows, "
        "or rows without a gradient, apart saves a tenth",
    )
    gradient_checkpointing: Literal["auto", True, False] = Field(
        default="auto",
        description="keep only the layers' inputs for the backward pass, which takes less memory and more arithmetic; "
        "auto: where keeping all would, by an estimate, take more memory than is free, or on a CPU more than an eighth "
        "of the machine's memory",
    )
    logprob_chunk: int = Field(default=512, ge=1, description="number of tokens whose logits are computed at a time")


def _option_fields() -> dict[str, Any]:
    """A key for each option that a loss states. One that several losses state differently is unset by default, and
    then means what each of them has for its own default."""
    stated: dict[str, dict[str, LossOption]] = {}
    for name, loss in POLICY_LOSSES.items():
        for key, option in options_of(loss).items():
            stated.setdefault(key, {})[name] = option
    return {key: _option_field(losses) for key, losses in stated.items()}


def _option_field(losses: dict[str, LossOption]) -> tuple[Any, Any]:
    names_of: dict[LossOption, list[str]] = {}
    for name, option in losses.items():
        names_of.setdefault(option, []).append(name)
    description = "; ".join(f"{', '.join(names)}: {option.description}" for option, names in names_of.items())
    first, *others = names_of
    bounds: dict[str, Any] = dict(first.bounds)
    assert all(bounds == other.bounds for other in others), description
    if others or first.default is None:
        annotation = Annotated[Annotated[float, Field(**bounds)] | None, NoneWord]
        return annotation, Field(default=None, description=description)
    return float, Field(default=first.default, description=description, **bounds)


_WithLosses: type[_Keys] = create_model(
    "_WithLosses",
    __base__=_Keys,
    loss_type=(Literal[tuple(POLICY_LOSSES)], _Keys.model_fields["loss_type"]),  # pyright: ignore
    **_option_fields(),
)


class GRPOConfig(_WithLosses):  # pyright: ignore[reportGeneralTypeIssues]
    """Sampling, loss and optimizer of the policy. Names and most defaults are TRL's, where TRL has the option."""

    @property
    def loss(self) -> type[AbstractPolicyLoss]:
        """The loss that `loss_type` names."""
        return POLICY_LOSSES[self.loss_type]

    @property
    def truncates(self) -> bool:
        """Whether rollouts are drawn from a part of the vocabulary."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p is not None

    @property
    def loss_options(self) -> dict[str, float | None]:
        """The options of that loss, by name; `None` for its own default."""
        values = dict(self)
        return {key: values[key] for key in options_of(self.loss)}

    @model_validator(mode="after")
    def _consistent(self):
        rows = self.num_generations * self.prompts_per_step
        if rows % self.gradient_accumulation_steps:
            raise ValueError(
                f"grpo.gradient_accumulation_steps = {self.gradient_accumulation_steps} does not divide the {rows} "
                "rows of a step (num_generations * prompts_per_step): choose a divisor"
            )
        if self.entropy_coef_min > self.entropy_coef_max:
            raise ValueError(
                f"grpo.entropy_coef_min = {self.entropy_coef_min} is more than grpo.entropy_coef_max = "
                f"{self.entropy_coef_max}: exchange them"
            )
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"grpo.importance_sampling_clip_min = {low} is not below grpo.importance_sampling_clip_max = {high}: "
                "every weight would be beyond the bounds"
            )
        if self.top_k > self.max_support:
            raise ValueError(
                f"grpo.top_k = {self.top_k} is more than grpo.max_support = {self.max_support}, the most tokens that "
                f"are kept: set grpo.max_support={self.top_k}, or a smaller grpo.top_k"
            )
        self._check_loss()
        self._check_advantages()
        self._check_switches()
        return self

    def _check_loss(self) -> None:
        of, traits = f"grpo.loss_type = {self.loss_type!r}", self.loss.traits
        if traits.depends_on_micro_batches and self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"grpo.max_tokens_per_micro_batch with {of}, whose value depends on the micro-batches: set "
                "grpo.gradient_accumulation_steps instead, or use loss_type 'dapo'"
            )
        if self.importance_sampling_level not in traits.levels:
            raise ValueError(
                f"{of} is made for grpo.importance_sampling_level = {traits.levels[0]!r}, which is "
                f"{self.importance_sampling_level!r}: set it so, or take another loss"
            )
        if self.importance_sampling_correction and self.importance_sampling_mode not in traits.correction_modes:
            modes = " or ".join(repr(mode) for mode in traits.correction_modes)
            way_out = f"set {modes}" if modes else "drop it: this loss compares with the sampler by itself"
            raise ValueError(
                f"{of} cannot be corrected by grpo.importance_sampling_mode = {self.importance_sampling_mode!r}: "
                f"{way_out}"
            )
        values, stated = dict(self), options_of(self.loss)
        for key, field in _option_fields().items():
            if key not in stated and values[key] != field[1].default:
                losses = [repr(name) for name, loss in POLICY_LOSSES.items() if key in options_of(loss)]
                raise ValueError(
                    f"grpo.{key} = {values[key]} is an option of loss_type {' or '.join(losses)}, but {of}: drop one "
                    "of them"
                )
        for key, option in stated.items():
            complaint = None
            if option.complaint is not None and values[key] is not None:
                complaint = option.complaint(values[key], self.loss_options)
            if complaint is not None:
                raise ValueError(complaint)

    def _check_advantages(self) -> None:
        of = f"grpo.advantage_estimator = {self.advantage_estimator!r}"
        if self.scale_rewards == "batch" and self.advantage_estimator in ("rloo", "max_rl"):
            raise ValueError(f"grpo.scale_rewards = 'batch', but {of} is not divided by a deviation: drop one of them")
        if self.multi_objective_aggregation == "normalize_then_sum":
            other = of if self.advantage_estimator != "group" else "grpo.use_kl_in_reward = true"
            if self.advantage_estimator != "group" or self.use_kl_in_reward:
                raise ValueError(
                    f"grpo.multi_objective_aggregation = 'normalize_then_sum' goes from each function's rewards to "
                    f"advantages by itself, and cannot be had with {other}: drop one of them"
                )

    def _check_switches(self) -> None:
        """What has no effect as things are was meant otherwise."""
        values, fields = dict(self), type(self).model_fields
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if name not in OPTIMIZERS[self.optim].uses and values[name] != fields[name].default:
                raise ValueError(f"grpo.{name} = {values[name]} is no option of grpo.optim = {self.optim!r}: drop one")
        for needs, is_on, names in (
            ("grpo.top_p, top_k or min_p", self.truncates, ("max_support",)),
            ("grpo.beta above 0", self.beta > 0, ("kl_estimator", "use_kl_in_reward", "sync_ref_model")),
            ("grpo.sync_ref_model = true", self.sync_ref_model, ("ref_model_mixup_alpha", "ref_model_sync_steps")),
            (
                "grpo.use_adaptive_entropy = true",
                self.use_adaptive_entropy,
                ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
            ),
            (
                "grpo.importance_sampling_correction = true",
                self.importance_sampling_correction,
                ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min"),
            ),
        ):
            for name in names:
                if not is_on and values[name] != fields[name].default:
                    raise ValueError(
                        f"grpo.{name} = {values[name]} has no effect without {needs}: set that, or drop it"
                    )
