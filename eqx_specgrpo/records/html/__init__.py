from ._page import write_report as write_report
from ._read import flattened as flattened
