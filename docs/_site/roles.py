"""Sphinx roles in docstrings, such as ``:class:`bdia_jax.Online```, as links of the API site."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`~?\.?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of every object, once the whole package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        for item in _with_members(pkg):
            if item.docstring is not None:
                item.docstring.value = ROLE.sub(
                    lambda match, item=item: _link(item, match[1]), item.docstring.value
                )


def _with_members(item: griffe.Object):
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _with_members(member)


def _link(item: griffe.Object, name: str) -> str:
    """``name`` as code; a link, if the site has a place for it."""
    first, *rest = name.split(".")
    try:
        target = ".".join([item.resolve(first), *rest])
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
