"""Every Python block of the README and of the documentation runs as it stands.

The blocks of a page share a namespace, in order. A block that can't run by itself has a comment directly above it that
says what it needs and which test runs it, with the page's text in its hands:

    <!-- needs: a finished run; tests/launch/test_distill_launcher.py::test_a_student_loads -->
"""

import ast
import pathlib
import re
import textwrap
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[^\n`]*)$")
NEEDS = re.compile(r"^\s*<!-- needs: (?P<what>[^;]+); (?P<file>[\w/]+\.py)::(?P<test>\w+) -->\s*$")


class Block(NamedTuple):
    """Python code of a page, the number of the line above it, and the match of NEEDS or None."""

    code: str
    line: int
    needs: re.Match | None


def blocks_of(text: str) -> list[Block]:
    lines, found, start = text.splitlines(), [], None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if start is None and fence:
            start, opening = number, fence
        elif start is not None and fence and line.strip() == opening["ticks"]:
            if opening["language"].split() and opening["language"].split()[0].lower() in ("python", "py", "python3"):
                code = textwrap.dedent("\n".join(lines[start + 1 : number])) + "\n"
                found.append(Block(code, start + 1, NEEDS.match(lines[start - 1]) if start else None))
            start = None
    assert start is None, f"the fence of line {start + 1} is never closed"
    return found


def name_of(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = {name_of(page): blocks_of(page.read_text()) for page in PAGES}
RUNNING = [name for name, blocks in BLOCKS.items() if any(not block.needs for block in blocks)]
NEEDING = [
    pytest.param(name, block.needs, id=f"{name}-{block.line}")
    for name, blocks in BLOCKS.items()
    for block in blocks
    if block.needs
]


def run(name: str, blocks: list[Block]) -> None:
    """Runs the blocks; lines in a traceback are those of the page."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(ROOT / name), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(name, [block for block in BLOCKS[name] if not block.needs])


@pytest.mark.parametrize(("name", "needs"), NEEDING)
def test_blocks_that_need_more_run_in_the_test_that_they_name(name, needs):
    text = (ROOT / needs["file"]).read_text()
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert needs["test"] in functions, f"{needs['file']} has no {needs['test']}"
    assert pathlib.PurePath(name).name in text, f"{needs['file']} does not read {name}"


def test_every_page_with_code_takes_part_and_every_comment_stands_above_a_block():
    assert {"README.md", "docs/methods/lion_kappa.md"} <= BLOCKS.keys()
    for page in PAGES:
        text, blocks = page.read_text(), BLOCKS[name_of(page)]
        assert len(re.findall(r"^ *(?:```|~~~)py", text, flags=re.MULTILINE | re.IGNORECASE)) == len(blocks)
        assert text.count("<!-- needs:") == sum(block.needs is not None for block in blocks)


PAGE = """# A page

```python
x = 1
```

- an item

  ```py title="in a list"
  assert x == 1
  y = x + missing
  ```

```bash
not python
```

<!-- needs: an hour; tests/core/test_clock.py::test_an_hour -->
```python
wait()
```
"""


def test_blocks_are_found_and_errors_tell_the_line_of_the_page():
    first, second, third = blocks_of(PAGE)
    assert (first.line, second.line, third.line) == (3, 9, 19)
    assert second.code.startswith("assert x")
    assert third.needs.groupdict() == {"what": "an hour", "file": "tests/core/test_clock.py", "test": "test_an_hour"}
    assert first.needs is None
    with pytest.raises(NameError) as raised:
        run("page.md", [first, second])
    assert raised.traceback[-1].lineno + 1 == 11
    assert PAGE.splitlines()[10].strip() == "y = x + missing"
    with pytest.raises(AssertionError, match="line 1 is never closed"):
        blocks_of("```python\nx = 1\n")
