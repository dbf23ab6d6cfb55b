"""Reads docstrings, which are written for ``help()``, for the documentation site; loaded by mkdocstrings."""

import re
from collections.abc import Iterator

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Makes links of Sphinx's roles and sections of examples, and finds functions that are called as their file is."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: object) -> None:
        """Changes docstrings, then the members that Python sees otherwise."""
        loader.resolve_aliases(implicit=True, external=False)  # while modules are still found by their names
        objects = list(_objects(pkg))
        for found in objects:
            if found.docstring:
                text = found.docstring.value.replace("\nExample:\n", "\nExamples:\n")
                found.docstring.value = _ROLE.sub(lambda role, scope=found: _link(scope, role[1]), text)
        for module in objects:
            if isinstance(module, griffe.Module):
                for name, source in module.imports.items():
                    if source == f"{module.path}.{name}.{name}":  # `poise.optim.adamp` is the function
                        module.members[name] = griffe.Alias(name, module.members[name].members[name], parent=module)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(scope: griffe.Object, name: str) -> str:
    """A link where the site documents the name, plain code elsewhere."""
    try:
        target = scope.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
