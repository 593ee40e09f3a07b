from .._types import (
    DecodeStatistics as DecodeStatistics,
    Prompts as Prompts,
    Rollouts as Rollouts,
    ScoredRollouts as ScoredRollouts,
    StopReason as StopReason,
    Support as Support,
)
from ..sampling import (
    AbstractSampling as AbstractSampling,
    Categorical as Categorical,
    GreedySampling as GreedySampling,
    Sampling as Sampling,
    TruncatedSampling as TruncatedSampling,
    make_sampling as make_sampling,
)
from ._adaptive import AdaptiveLength as AdaptiveLength
from ._adaptive_state import AdaptiveState as AdaptiveState
from ._block import Block as Block
from ._buckets import default_smallest_bucket as default_smallest_bucket
from ._compiler import (
    AbstractCompiler as AbstractCompiler,
    CompileAtOnce as CompileAtOnce,
    CompileBehind as CompileBehind,
    CompileSparingly as CompileSparingly,
)
from ._coupled import Coupled as Coupled
from ._decode import DecodeProgress as DecodeProgress, decode as decode
from ._finite import NonFiniteLogits as NonFiniteLogits
from ._greedy_match import GreedyMatch as GreedyMatch
from ._length import (
    AbstractLengthController as AbstractLengthController,
    Expectation as Expectation,
    FixedLength as FixedLength,
    SegmentObservation as SegmentObservation,
    SegmentPlan as SegmentPlan,
)
from ._plain_time import plain_seconds as plain_seconds
from ._programs import decode_programs as decode_programs
from ._rejection import Rejection as Rejection
from ._round import decode_round as decode_round
from ._score import (
    completion_logits as completion_logits,
    teacher_forced_logprobs as teacher_forced_logprobs,
    whole_sequences as whole_sequences,
)
from ._segment import (
    AbstractSegmentLoop as AbstractSegmentLoop,
    FixedRounds as FixedRounds,
    UntilRowsFinish as UntilRowsFinish,
)
from ._state import DecodeState as DecodeState
from ._stop import (
    AbstractStop as AbstractStop,
    NoStop as NoStop,
    StopStrings as StopStrings,
    make_stop as make_stop,
)
from ._verifier_kind import VerifierKind as VerifierKind
from ._verifiers import VERIFIER_KINDS as VERIFIER_KINDS, make_verifier as make_verifier
from ._verify import (
    AbstractAcceptanceRule as AbstractAcceptanceRule,
    AbstractVerifier as AbstractVerifier,
    Verdict as Verdict,
)
