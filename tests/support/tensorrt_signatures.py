"""Signatures of what our code uses of TensorRT, read from its Python modules, by version.

``tests/data/tensorrt_signatures.json`` holds those of several versions, so tests need none installed. As a script:
compare it with the importable module, or write them:

    python -m support.tensorrt_signatures tensorrt|tensorrt_rtx [--write]
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from support.paths import DATA
from support.tensorrt_types import Results
from support.tensorrt_usage import FULL, RTX, Call, Use, all_uses, attribute_names, module_names, sources

FILE = DATA / "tensorrt_signatures.json"
Signatures = Mapping[str, str]
"""By dotted name: ``(name: type, other: type = ...) -> type`` and its overloads, ``property -> type``, or a number."""
CLASS, ENUMERATION = "class", "enumeration"
OVERLOAD = " | "
SETTABLE = ", settable"
RTX_LABEL = "RTX "


def results(signatures: Iterable[Signatures]) -> Results:
    """Return the classes that the functions and properties of some versions return."""
    found: dict[str, frozenset[str]] = {}
    for one in signatures:
        for name, signature in one.items():
            is_class = signature in (CLASS, ENUMERATION)
            returned = {name} if is_class else set(re.findall(r"-> (\w+)", signature)) & one.keys()
            found[name] = found.get(name, frozenset()) | returned
    return found


def read(trt: ModuleType) -> dict[str, str]:
    """Return the signatures of what our code uses; all members of an enumeration that it uses as a whole."""
    known = _read(trt)
    used = {name for use in all_uses(results([known])) for name in use.names}
    called = {f"{name}.__init__" for name in used if known.get(name) == CLASS}
    wanted = called.union(*map(_prefixes, used))
    return {
        name: signature
        for name, signature in known.items()
        if name in wanted
        or f"*.{name.rpartition('.')[2]}" in used
        or (name.rpartition(".")[0] in used and known[name.rpartition(".")[0]] == ENUMERATION)
    }


def _read(trt: ModuleType) -> dict[str, str]:
    """Return the signatures of the module's names in use, and of all classes that they lead to.

    Members are those that have the name of some attribute in our files.
    """
    trees = sources().values()
    members = {"__init__"}.union(*map(attribute_names, trees))
    names = {outer for tree in trees for name in module_names(tree) for outer in _prefixes(name)}
    found: dict[str, str] = {}
    classes: dict[str, type] = {}
    for dotted in sorted(names):
        value = _lookup(trt, dotted)
        if isinstance(value, type):
            classes[dotted] = value
        elif value is not None:
            found[dotted] = _signature(value)
    while classes:
        name, owner = classes.popitem()
        enumerated = getattr(owner, "__members__", None)
        found[name] = CLASS if enumerated is None else ENUMERATION
        for member in members & set(dir(owner)) if enumerated is None else {"name", *enumerated}:
            signature = found[f"{name}.{member}"] = _signature(getattr(owner, member))
            for word in re.findall(r"-> (\w+)", signature):
                if isinstance(getattr(trt, word, None), type) and word not in found:
                    classes[word] = getattr(trt, word)
    return {name: signature for name, signature in sorted(found.items()) if signature}


def _prefixes(name: str) -> Iterator[str]:
    """Yield ``a``, ``a.b``, ``a.b.c`` of ``a.b.c``, where ``plugin`` is no class."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        if parts[:count] != ["plugin"]:
            yield ".".join(parts[:count])


def _lookup(trt: ModuleType, name: str) -> Any:
    """Return a name of the module; None if it has none."""
    value: Any = trt
    if name.startswith("plugin."):
        try:
            value = importlib.import_module(f"{trt.__name__}.plugin")
        except ModuleNotFoundError:
            return None
        name = name.removeprefix("plugin.")
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _signature(value: Any) -> str:
    """Return the signature of a function, a property or a number; empty for a constructor that does not exist."""
    if isinstance(value, property):
        kind = re.search(r"-> (.*)", (value.fget and value.fget.__doc__) or "")
        return "property" + (f" -> {_plain(kind[1])}" if kind else "") + (SETTABLE if value.fset else "")
    if not callable(value):
        return str(int(value))
    if inspect.isfunction(value) or inspect.ismethod(value):
        given = [one for one in inspect.signature(value).parameters.values() if one.name != "self"]
        return f"({', '.join(one.name + ('' if one.default is one.empty else ' = ...') for one in given)})"
    documented = re.findall(rf"^(?:\d+\. )?{value.__name__}\((self: .*)\) -> (.*)$", value.__doc__ or "", re.MULTILINE)
    return OVERLOAD.join(f"({_parameters(given)}) -> {_plain(result)}" for given, result in documented)


def _parameters(text: str) -> str:
    """Return the parameters that a docstring lists, without ``self`` and with ``...`` for each default."""
    depth, parts = 0, [""]
    for letter in text:
        depth += letter in "([{<"
        depth -= letter in ")]}>"
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parameters = [re.sub(r" = .*", " = ...", part.strip(), flags=re.DOTALL) for part in parts]
    return ", ".join(_plain(one) for one in parameters if not one.startswith("self:"))


def _plain(text: str) -> str:
    """Return a type as all versions write it: without its module, and a number that converts to int as ``int``."""
    text = re.sub(r"\b(?:\w+(?:\.|::))+(?=\w)", "", text.strip())
    for word, plain in {"SupportsInt": "int", "Buffer": "buffer"}.items():
        text = re.sub(rf"\b{word}\b", plain, text)
    return text


# Comparison ------------------------------------------------------------------------------------------------------


def problems(uses: Sequence[Use], library: str, version: str, signatures: Signatures) -> Iterator[str]:
    """Yield a sentence for each use that a version of TensorRT has not, or has with other parameters."""
    for use in uses:
        if use.condition.holds(library, version):
            found = [signature for name in use.names for signature in _found(name, use, signatures)]
            if not any(_fits(use, overload) for signature in found for overload in signature.split(OVERLOAD)):
                has = f"it has {found}" if found else "if the name is new to our code, run .ci/bindings --write"
                yield f"{library} {version} has no {' or '.join(use.names)}, as used in {use.place}; {has}."


def _found(name: str, use: Use, signatures: Signatures) -> list[str]:
    """Return the signatures of a name: of the constructor where a class is called."""
    if name.startswith("*"):
        return [signature for one, signature in signatures.items() if one.endswith(name[1:])]
    if use.call is not None and signatures.get(name) == CLASS:
        name += ".__init__"
    return [signatures[name]] if name in signatures else []


def _fits(use: Use, signature: str) -> bool:
    if use.is_assigned:
        return signature.endswith(SETTABLE)
    return use.call is None or accepts(signature, use.call, use.is_override)


def accepts(signature: str, call: Call, is_override: bool = False) -> bool:
    """Return whether a signature takes these arguments. An overriding method takes as many as it will be given."""
    if not signature.startswith("("):
        return False
    given = parameters(signature)
    if is_override or call.positional > len(given):
        return call.positional == len(given)
    rest = dict(list(given.items())[call.positional :])
    required = {name for name, is_required in rest.items() if is_required}
    return call.keywords <= rest.keys() and (call.has_more or required <= call.keywords)


def parameters(signature: str) -> dict[str, bool]:
    """Return the parameters of a signature in order, and whether each is required."""
    inside = signature[1:].partition(") -> ")[0].removesuffix(")")
    found = re.findall(r"(?:^|, )(\w+)(?=:|,| =|$)(.*?)(?=, \w+(?::|,| =|$)|$)", inside)
    return {name: not rest.endswith("= ...") for name, rest in found}


# The committed file ----------------------------------------------------------------------------------------------


def committed() -> dict[tuple[str, str], dict[str, str]]:
    """Return the committed signatures by library and version."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, variants in (json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}).items():
        for signature, versions in variants.items():
            for version in versions.split(", "):
                library = RTX if version.startswith(RTX_LABEL) else FULL
                found.setdefault((library, version.removeprefix(RTX_LABEL)), {})[name] = signature
    return found


def write(signatures: Mapping[tuple[str, str], Signatures]) -> None:
    """Write the file: by name, every signature with the versions that have it."""
    content: dict[str, dict[str, list[str]]] = {}
    for library, version in sorted(signatures, key=lambda one: (one[0], [int(part) for part in one[1].split(".")])):
        for name, signature in signatures[library, version].items():
            label = (RTX_LABEL if library == RTX else "") + version
            content.setdefault(name, {}).setdefault(signature, []).append(label)
    plain = {name: {one: ", ".join(have) for one, have in content[name].items()} for name in sorted(content)}
    FILE.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def main(library: str, *options: str) -> int:
    """Run the script and return its exit code."""
    trt, current = importlib.import_module(library), committed()
    version = library, str(trt.__version__)
    signatures = read(trt)
    if options == ("--write",):
        write(current | {version: signatures})
    elif different := set(signatures.items()) ^ set(current.get(version, {}).items()):
        names = ", ".join(sorted({name for name, _ in different}))
        sys.stderr.write(f"{FILE.name} is out of date for {' '.join(version)}: {names}. Run .ci/bindings --write.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
