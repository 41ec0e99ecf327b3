"""From YAML text to plain values that know the line they stand on.

The syntax is YAML 1.1 as PyYAML reads it, so JSON and NeoX's JSON-like style with comments,
trailing commas and True are included. Two things differ: 6e-4 is a number (PyYAML wants 6.0e-4),
and 12:30 is text, not a number to the base 60. Tags that build objects are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from neox.config.values import listed, show
from neox.errors import ConfigError

SUFFIXES = (".yml", ".yaml", ".json")
_DEEPEST = 50
_MOST_VALUES = 100_000  # far above any configuration; an alias bomb stops here
_MERGE = "tag:yaml.org,2002:merge"
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):
    """Scalars of our dialect; only composing is used, so no constructor runs."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}
    _depth = 0

    def descend_resolver(self, parent: Any, index: Any) -> None:
        """Called on the way into every node: libyaml's own recursion would end in a crash."""
        self._depth += 1
        if self._depth > _DEEPEST:
            mark = parent.start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {_DEEPEST} levels", problem_mark=mark)

    def ascend_resolver(self) -> None:
        """Called on the way out."""
        self._depth -= 1


def _resolve(kind: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{kind}", re.compile(rf"^(?:{pattern})$"), list(first) if first else [""]
    )


_WORDS = "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
_INTEGER = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)"
_EXPONENT = "[eE][-+]?[0-9]+"
_DECIMAL = (
    rf"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:{_EXPONENT})?|[0-9][0-9_]*{_EXPONENT})"
)
_resolve("bool", _WORDS, "yYnNtTfFoO")
_resolve("int", _INTEGER, "-+0123456789")
_resolve("float", rf"{_DECIMAL}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789")
_resolve("null", "~|null|Null|NULL", "~nN")
_resolve("null", "", "")
_resolve("merge", "<<", "<")


class Malformed(Exception):
    """A text is not a configuration; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Source:
    """The values of one text. `lines` has the line of every key, dotted: "optimizer.params.lr"."""

    name: str
    text: str
    values: dict[str, Any]
    lines: dict[str, int]
    duplicates: list[tuple[str, int, int]] = field(default_factory=list)  # key, first, second line


def find(path: Path) -> Path:
    """The file a user means: as named, or with .yml, .yaml or .json behind it."""
    tried = [path]
    if path.suffix not in SUFFIXES:
        tried += [Path(f"{path}{suffix}") for suffix in SUFFIXES]
    for candidate in tried:
        if candidate.exists() and not candidate.is_dir():
            return candidate
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in SUFFIXES)
        hint = f" It holds {listed(inside[:8], 'and')}." if inside else ""
        raise ConfigError(f"{path} is a folder, not a configuration file.{hint}")
    raise ConfigError(f"{path} does not exist.{_near_files(path, tried)}")


def _near_files(path: Path, tried: list[Path]) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent}."
    names = {p.name: p for p in path.parent.iterdir() if p.suffix in SUFFIXES}
    near = [
        match
        for candidate in tried
        for match in difflib.get_close_matches(candidate.name, names, n=1, cutoff=0.7)
    ]
    also = f" Nor do {listed((p.name for p in tried[1:]), 'and')}." if len(tried) > 1 else ""
    return f"{also} Did you mean {names[near[0]]}?" if near else also


def read(path: Path) -> Source:
    """The values of one file. Raises ConfigError for a file that cannot be read at all."""
    try:
        path = find(path)
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")
        return parse(text, path.name)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path.name}:{line}: not text: byte 0x{data[error.start]:02x} is not UTF-8."
        ) from None
    except Malformed as error:
        raise ConfigError(f"{path.name}:{error.line}: {error}") from None


def parse(text: str, name: str) -> Source:
    """The values of one text. Raises Malformed."""
    control = _CONTROL.search(text)
    if control:
        line = text[: control.start()].count("\n") + 1
        raise Malformed(f"not text: it holds the control character {control[0]!r}.", line)
    root = compose(text)
    if root is None:
        raise Malformed("the file is empty: it holds no key.", 1)
    if not isinstance(root, yaml.MappingNode):
        what = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {show(root.value)}"
        raise Malformed(
            f"the file holds {what}, but a configuration is keys with values, such as "
            '"num_layers": 12.',
            root.start_mark.line + 1,
        )
    walk = _Walk()
    values = walk.mapping(root, "")
    return Source(name, text, values, walk.lines, walk.duplicates)


def parse_value(text: str) -> Any:
    """One value as YAML reads it. Raises Malformed."""
    node = compose(text)
    return None if node is None else _Walk().value(node, "")


def compose(text: str) -> Any:
    """The YAML node of a text, None when it is empty. Raises Malformed."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Malformed(_explain(error, text), mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as error:
        raise Malformed(f"not valid YAML: {error}.", 1) from None


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    problem = error.problem or "it cannot be read"
    mark = error.problem_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        return "a tab stands where YAML wants spaces. Replace tabs with spaces."
    if "expected a single document" in problem or problem.startswith("but found another document"):
        return "a second document begins (---). A configuration file holds one."
    if error.context == "while scanning an alias":
        return 'a value that begins with * goes into quotes, such as "*.txt".'
    where = f" {error.context}" if error.context else ""
    if where and error.context_mark and mark and error.context_mark.line != mark.line:
        where += f", which starts on line {error.context_mark.line + 1}"
    comma = " A comma may be missing on the line before." if "','" in problem else ""
    return f"not valid YAML: {problem}{where}.{comma}"


class _Walk:
    """Turns nodes into values, noting lines and keys that come twice."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.duplicates: list[tuple[str, int, int]] = []
        self._open: set[int] = set()
        self._count = 0

    def value(self, node: Any, path: str) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise Malformed(f"it expands to more than {_MOST_VALUES} values.", _line(node))
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if id(node) in self._open:
            raise Malformed("an alias (*) refers to a value that contains it.", _line(node))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, f"{path}." if path else "")
            _check_tag(node, "seq")
            return [self.value(item, f"{path}.{i}") for i, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def mapping(self, node: Any, prefix: str) -> dict[str, Any]:
        """Keys, hyphens folded to underscores; merged (<<) ones yield to the mapping's own."""
        _check_tag(node, "map")
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, int] = {}
        merges = [pair for pair in node.value if pair[0].tag == _MERGE]
        for _, bases in merges:
            for base in self._bases(bases):
                merged = self.value(base, prefix.rstrip(".")) | merged
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            name, line = _name(key_node), _line(key_node)
            if name in first:
                self.duplicates.append((prefix + name, first[name], line))
                continue
            first[name] = line
            own[name] = self.value(value_node, prefix + name)
            self.lines[prefix + name] = line
        return merged | own

    def _bases(self, node: Any) -> Iterator[Any]:
        bases = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for base in bases:
            if not isinstance(base, yaml.MappingNode):
                raise Malformed("<< merges mappings only.", _line(node))
            yield base


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _check_tag(node: Any, kind: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        raise Malformed(f"the tag {_short(node.tag)} is not allowed.", _line(node))


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _name(node: Any) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise Malformed("a list or a mapping stands where a key belongs.", _line(node))
    if not node.tag.endswith(":str"):
        shown = node.value or "null"
        raise Malformed(f"the key {shown} is not a name. Keys are words.", _line(node))
    return node.value.strip().replace("-", "_")


def _scalar(node: Any) -> Any:
    text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    try:
        if kind == "int":
            return _integer(text.replace("_", ""))
        if kind == "float":
            return float(re.sub(r"\.(?=[in])", "", text.replace("_", "").lower()))
    except ValueError:
        raise Malformed(f"{show(text)} is not a number that can be read.", _line(node)) from None
    raise Malformed(f"the tag {_short(node.tag)} is not allowed.", _line(node))


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    if digits.startswith("0") and digits[1:].isdigit():
        return int(text, 8)
    return int(text, 0)
