"""The proofs that a draft can be put through."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.random as jr

from ..drafts import AbstractDraft, DraftError
from ..models import AbstractLanguageModel
from ._draws import check_draws
from ._errors import require
from ._gradients import check_gradients
from ._interface import check_interface
from ._law import check_law
from ._pair import Pair, make_pair, perturbed
from ._rewind import check_rewind
from ._saving import check_saving
from ._tokens import TokenComparison, compare_tokens
from ._training import check_training


class DraftReport(eqx.Module):
    """What was found of a draft that passed; printed, it says so, line by line.

    **Arguments:**

    - `name`: its class.
    - `rewind_error`: the largest difference between a probability after rounds of every kind and the same after a fresh
        start.
    - `training_error`: the largest difference between a probability that training sees and the one drafted with.
    - `draw_p_value`: the least of the tests whether drafted tokens are draws from what comes with them.
    - `law_p_value`: the least of the tests whether tokens decoded with the draft follow the target's law.
    - `greedy`, `coupled`: decoding with the draft beside plain decoding, greedily and sampled.
    - `loaded_by_name`: whether `load_draft` knows this kind, else it is loaded into a draft that is there already.
    """

    name: str
    rewind_error: float
    training_error: float
    draw_p_value: float
    law_p_value: float
    greedy: TokenComparison
    coupled: TokenComparison
    loaded_by_name: bool

    def __repr__(self) -> str:
        found = (
            "found by its name" if self.loaded_by_name else "read into a draft that was there, not found by its name"
        )
        return "\n".join(
            [
                f"{self.name} passed every check.",
                f"  rewinding: a probability is off by at most {self.rewind_error:.1e} from what is committed",
                f"  training: a probability is off by at most {self.training_error:.1e} from the one drafted with",
                f"  drafted tokens are draws from what comes with them: least p-value {self.draw_p_value:.3f}",
                f"  decoded tokens follow the target's law: least p-value {self.law_p_value:.3f}",
                f"  greedy tokens beside plain decoding's: {self.greedy.summary()}",
                f"  coupled tokens beside plain decoding's: {self.coupled.summary()}",
                f"  saved and loaded: the same; {found}",
            ]
        )


def check_draft(
    draft: AbstractDraft,
    target: AbstractLanguageModel,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 16,
    draws: int = 256,
    noise: float = 0.02,
    same_after_restart: bool = True,
    same_in_training: bool = True,
    frozen: Sequence[str] = (),
    other_target: AbstractLanguageModel | None = None,
    tolerance: float = 1e-4,
    near_tie: float = 1e-3,
    logprob_tolerance: float = 1e-3,
    on_progress: Callable[[str], None] | None = None,
) -> DraftReport:
    """Puts a draft through everything that the decoder and the draft step rely on.

    No draft can make the output wrong on its own, as long as its tokens are draws from the distributions that come with
    them. But one that loses its place drafts badly from then on, silently; that, too, is found here.

    Checked are: shapes and dtypes of every method; that the state follows what is committed, after full, partial and
    no acceptance, in unequal rows, after rounds without drafting, and after tokens that another draft had drafted (as
    under [`eqx_specgrpo.drafts.FallbackDraft`][]); that training sees the distributions that are drafted with; that
    tokens are draws from the returned distributions; that tokens decoded with it follow the target's law; that decoding
    says the same as plain decoding, greedily and with [`eqx_specgrpo.decoding.Coupled`][], through the decoder itself;
    that the draft step's gradient reaches all of the draft and nothing of the target; saving and loading.

    **Arguments:**

    - `draft`, `target`: the pair, in float32. A few small forwards are all it takes: any size will do.
    - `prompts`: token ids, of unequal lengths; random ones by default.
    - `max_new_tokens`: how long the completions are that are compared with plain decoding's.
    - `draws`: proposals drawn for the statistics; four rows are decoded for each. The more, the finer what is noticed:
        a thousand find a draft that draws at a temperature of 0.8 and reports 1.
    - `noise`: put on every weight first. Fresh weights are often zero, and hide what comes after them.
    - `same_after_restart`: `False` says that the draft by design remembers more of a row than its committed tokens, or
        less when started anew on them; it is then only demanded that rejected tokens leave no trace. So it is for a
        `FallbackDraft` in any case.
    - `same_in_training`: `False` says that training by design sees other distributions than are drafted with.
    - `frozen`: places of weights that are meant not to learn, as in `.adapter.scale`.
    - `other_target`: one that the draft does not fit: `check` has to say so.
    - `tolerance`: of probabilities after a rewind.
    - `near_tie`: two tokens whose scores are as near as this may be swapped by rounding.
    - `logprob_tolerance`: of reported log-probabilities.
    - `on_progress`: is told what is being checked.

    **Returns:**

    The worst that was found.

    **Raises:**

    `ConformanceError`, naming the case, if the draft fails; whatever the draft itself raises.
    """
    say = on_progress or (lambda _: None)
    draft = perturbed(draft, noise)
    pair = make_pair(draft, target, prompts)
    say("shapes and dtypes")
    check_interface(pair)
    if other_target is not None:
        _check_refusal(pair, other_target)
    say("rewinding")
    rewind_error = check_rewind(pair, same_after_restart=same_after_restart, tolerance=tolerance)
    say("training")
    training_error = check_training(pair) if same_in_training else 0.0
    say("draws")
    p_value = check_draws(pair, draws=draws)
    say("the law of what is decoded")
    law_p_value = check_law(pair, draws=4 * draws)
    comparisons = []
    for name, greedy in (("greedily", True), ("coupled", False)):
        say(f"decoding {name}, with the draft and without")
        comparison = compare_tokens(
            draft,
            target,
            pair.prompts,
            greedy=greedy,
            key=jr.key(6),
            max_new_tokens=max_new_tokens,
            length=draft.max_length,
        )
        comparison.require_near_ties(f"{pair.name}, decoding {name}", near_tie)
        comparison.require_logprobs(f"{pair.name}, decoding {name}", logprob_tolerance)
        comparisons.append(comparison)
    say("gradients")
    check_gradients(pair, frozen=frozen)
    say("saving and loading")
    greedy_tokens, coupled_tokens = comparisons
    return DraftReport(
        pair.name,
        rewind_error,
        training_error,
        p_value,
        law_p_value,
        greedy_tokens,
        coupled_tokens,
        check_saving(pair),
    )


def _check_refusal(pair: Pair, other: AbstractLanguageModel) -> None:
    try:
        pair.draft.check(other)
    except DraftError as error:
        require(len(str(error).split()) > 5, f"{pair.name}.check says {str(error)!r}: name both sides, in a sentence")
    else:
        require(False, f"{pair.name}.check accepts a target that the draft does not fit: raise DraftError")
