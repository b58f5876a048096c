"""Code blocks of the docs, put to use as a reader would."""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvflare_fm.aggregation import merge, weigh

HOW_TO = Path(__file__).parents[1] / "docs" / "how_to" / "add_a_merge_rule.md"


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@contextmanager
def pasted(page: Path = HOW_TO) -> Iterator[dict[str, merge.MergeRule]]:
    """A page's rules, each block in a module of its own, registered until the block ends; the merge rules by name.

    They stand in for rules of the same names: a reader may have put the page's rule into the package.
    """
    registries = (merge.registry, weigh.registry)
    before = [{name: registry[name] for name in registry} for registry in registries]
    for registry in registries:
        registry._entries = {}
    try:
        for number, block in enumerate(blocks(page, "python")):
            _run(f"pasted_rule_{number}", block)
        of_the_page = dict(merge.registry._entries)
        for registry, entries in zip(registries, before, strict=True):
            registry._entries = {**entries, **registry._entries}
        yield of_the_page
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry._entries = entries


def _run(name: str, block: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.py")
        file.write_text(block, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
