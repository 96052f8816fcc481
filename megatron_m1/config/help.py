"""What `--help` says of every key: the docstrings of the schema."""

import ast
import inspect
import typing

from jsonargparse import ArgumentParser

from megatron_m1.config import schema

__all__ = ["describe_keys", "key_texts"]


def describe_keys(parser: ArgumentParser) -> None:
    """Put the docstrings of sections and keys, and a short usage line, into the help of `parser`."""
    texts = key_texts()
    parser.usage = "%(prog)s COMMAND [--config FILE ...] [--section.key VALUE ...]"
    for action in parser._actions:
        if action.help is None and action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")
    sections = {str(kind): name for name, kind in _sections().items()}
    for group in parser._action_groups:
        name = sections.get(group.title or "")
        if name is not None:
            group.title, group.description = name, texts.get(name)


def key_texts() -> dict[str, str]:
    """The docstrings of the dotted keys and sections (`model`) that have one, each on one line."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)}
    texts = {}
    for section, kind in _sections().items():
        node = classes[kind.__name__]
        texts[section] = ast.get_docstring(node) or ""
        for statement, following in zip(node.body, node.body[1:]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[f"{section}.{key}"] = text
    return {key: " ".join(text.split()) for key, text in texts.items() if text}


def _sections() -> dict[str, type]:
    return typing.get_type_hints(schema.Config)
