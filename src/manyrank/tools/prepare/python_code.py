"""Python code, as the filter `quality` judges it: whether it parses, has tests and comments. Pure."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings


def parse(code: str) -> ast.Module | None:
    """Parse the code; None where it is no Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes, which are the row's own business
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def has_tests(tree: ast.Module) -> bool:
    """Tell whether there is an assert, a function test..., or an import of unittest or pytest."""
    return any(map(_is_test, ast.walk(tree)))


def _is_test(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name.startswith("test_")
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return any(module.split(".")[0] in ("unittest", "pytest") for module in modules)
    return isinstance(node, ast.Assert)


def comment_lines(code: str) -> int | None:
    """Count the lines with a comment; None where Python cannot tell."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    return sum(token.type == tokenize.COMMENT for token in tokens)
