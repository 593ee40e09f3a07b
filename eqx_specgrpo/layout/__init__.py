"""Where arrays live when there are several devices: the mesh, and one table of rules by parameter path.

Everything takes an [`eqx_specgrpo.layout.AbstractDeviceMesh`][]. With `OneDevice` its methods leave arrays as they are;
with a `DeviceMesh` rows are divided over the axis `data` (`ROWS`), and parameters are in one of two layouts
(`Layout.MASTER`, `Layout.COPY`). Models and drafts know nothing of it.

Where there are several processes, an [`eqx_specgrpo.layout.AbstractProcesses`][] keeps them in step.
"""

from ._coordinated import AbstractStore as AbstractStore, ManyProcesses as ManyProcesses
from ._device_mesh import DeviceMesh as DeviceMesh, make_mesh as make_mesh
from ._gather import (
    GatheredAtUse as GatheredAtUse,
    at_use as at_use,
    gathered as gathered,
    own_parts_of_total as own_parts_of_total,
    value_and_gradients as value_and_gradients,
)
from ._join import ProcessPlace as ProcessPlace, join_processes as join_processes, process_place as process_place
from ._mesh import AbstractDeviceMesh as AbstractDeviceMesh, OneDevice as OneDevice
from ._processes import (
    AbstractProcesses as AbstractProcesses,
    NotInStepError as NotInStepError,
    OneProcess as OneProcess,
    OtherProcessError as OtherProcessError,
    nothing as nothing,
)
from ._rules import (
    DATA as DATA,
    MODEL as MODEL,
    ROWS as ROWS,
    RULES as RULES,
    WHOLE as WHOLE,
    Layout as Layout,
    Rule as Rule,
    parameter_spec as parameter_spec,
    parameter_specs as parameter_specs,
    path_name as path_name,
)
