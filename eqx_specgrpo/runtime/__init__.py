from ._compile import (
    SMALL_HIDDEN_SIZE as SMALL_HIDDEN_SIZE,
    CompileCounter as CompileCounter,
    count_compilations as count_compilations,
)
from ._process import (
    keep_compiled_programs as keep_compiled_programs,
    keep_freed_memory as keep_freed_memory,
    kept_programs as kept_programs,
)
from ._version import package_version as package_version, source_commit as source_commit
