"""What stands under each field of a class, as text: the source is parsed when a schema is asked for.

Owns that reading. pydantic has it as `use_attribute_docstrings`, and parses when a class is made: that took 0.07 CPU-s of each start of
`osctl`, and `explain` and the chart alone need the words.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap


@functools.cache
def of_fields(kind: type) -> dict[str, str]:
    """By name of a field that this class itself declares. Empty where its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, SyntaxError):
        return {}
    (declared,) = tree.body
    assert isinstance(declared, ast.ClassDef), f"{kind.__name__} is a class"
    found = {}
    for field, text in itertools.pairwise(declared.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = inspect.cleandoc(words)
    return found
