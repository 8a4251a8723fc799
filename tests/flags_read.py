"""Which flags of a recipe are read anywhere."""
from __future__ import annotations

import ast
from collections.abc import Iterable


def fields_read(texts: Iterable[str]) -> set[str]:
    """Every x of an `args.x` that is read in a function with a parameter `args` of a recipe's flags, or with those of
    its run."""
    found = set()
    for function in (node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        given = {ast.unparse(parameter) for parameter in (*function.args.posonlyargs, *function.args.args)}
        of_run = {ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Assign)}
        if given & {"args: LLMArgs", "args: RunArgs", "args: Args"} or of_run & {"args = run.args", "args = self.args"}:
            found |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)
                      and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "args"}
    return found
