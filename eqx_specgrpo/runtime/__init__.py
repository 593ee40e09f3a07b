from ._compile import (
    SMALL_HIDDEN_SIZE as SMALL_HIDDEN_SIZE,
    CompileCounter as CompileCounter,
    count_compilations as count_compilations,
)
from ._environment import (
    as_typed as as_typed,
    check_jax as check_jax,
    set_aside_number_settings as set_aside_number_settings,
)
from ._exit import (
    ending_of_one_of as ending_of_one_of,
    ending_on_our_terms as ending_on_our_terms,
    plain_messages as plain_messages,
)
from ._memory import Memory as Memory, device_memory as device_memory, host_memory as host_memory
from ._output import (
    GuardedOutput as GuardedOutput,
    OutputLost as OutputLost,
    check_output_arrived as check_output_arrived,
    guarded_streams as guarded_streams,
    hold_standard_descriptors as hold_standard_descriptors,
    plain_lines_in_notebooks as plain_lines_in_notebooks,
    progress_console as progress_console,
)
from ._process import (
    keep_compiled_programs as keep_compiled_programs,
    keep_freed_memory as keep_freed_memory,
    kept_programs as kept_programs,
)
from ._program_memory import (
    ProgramMemory as ProgramMemory,
    held_besides_arrays as held_besides_arrays,
    most_for_programs as most_for_programs,
)
from ._version import package_version as package_version, source_commit as source_commit
