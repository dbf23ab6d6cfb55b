"""Lists the commands of poise: ``python -m poise.launch``."""

import ast
import pathlib
import sys


def commands() -> dict[str, str]:
    """What each command does, by its name, in the order of names; nothing is imported for it.

    Example:
      >>> from poise.launch.__main__ import commands
      >>> commands()["sample"]
      'Draws images from a finished run.'
    """
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and 'if __name__ == "__main__"' in text:
            sentence = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
            found[path.stem] = " ".join(sentence.partition(": ``")[0].replace("``", "").split()).rstrip(".") + "."
    return found


def main() -> int:
    """Prints the commands."""
    print("python -m poise.launch.COMMAND --help tells the flags of a command:\n")
    for name, sentence in commands().items():
        print(f"  {name:<12} {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
