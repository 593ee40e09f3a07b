from ._certificate import Certificate as Certificate, Finding as Finding, verify_pair as verify_pair
from ._draft import DraftReport as DraftReport, check_draft as check_draft
from ._draws import check_draws as check_draws
from ._errors import ConformanceError as ConformanceError
from ._gradients import check_gradients as check_gradients
from ._interface import check_interface as check_interface
from ._law import check_law as check_law
from ._one_of import OneOf as OneOf, verifier_name as verifier_name
from ._pair import Pair as Pair, make_pair as make_pair, perturbed as perturbed
from ._rewind import check_rewind as check_rewind
from ._saving import check_saving as check_saving
from ._tokens import Difference as Difference, TokenComparison as TokenComparison, compare_tokens as compare_tokens
from ._training import check_training as check_training
from ._truncated import TruncationReport as TruncationReport, check_truncation as check_truncation
from ._verifier import VerifierReport as VerifierReport, check_verifier as check_verifier
