from ._host import on_host as on_host
from ._import_spec import (
    absolute_spec as absolute_spec,
    import_callable as import_callable,
    import_spec_of as import_spec_of,
    is_import_spec as is_import_spec,
)
from ._json import json_line as json_line, print_json as print_json
from ._module_file import load_module_file as load_module_file
from ._paths import user_path as user_path
from ._pieces import (
    Piece as Piece,
    PieceReader as PieceReader,
    StoredArray as StoredArray,
    StoredPiece as StoredPiece,
    own_pieces as own_pieces,
)
from ._tensor_file import TensorToWrite as TensorToWrite, write_tensor_file as write_tensor_file
from ._tree import named_arrays as named_arrays, read_tree as read_tree
