"""Record the demo as plain text in docs/first-run.md.

    python scripts/record_first_run.py

Runs the demo in an empty folder, in a terminal of 100 columns without colours, and writes down what it printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "first-run.md"
MARKER = "<!-- written by scripts/record_first_run.py; do not edit -->"
COMMAND = "make demo"
PAGE = """{marker}
# A first run

What `{command}` prints after the installation, in a terminal of 100 columns. This page is written by
`scripts/record_first_run.py` (`make docs`), which runs the demo; times are those of the machine that ran it.

```text
$ {command}
{output}
```
"""


def run_demo(folder: Path) -> str:
    """The demo's standard output and errors together; raises CalledProcessError when it fails."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-m", "softprompt.demo", "--out", "demo-run"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=True,
    ).stdout


def plain(output: str, folder: Path) -> str:
    """What is left on the screen: no escape sequences, no overwritten progress, no path of this machine."""
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace(f"{folder}{os.sep}", "")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in output.split("\n")]
    text = "\n".join(lines).strip("\n")
    for private in (str(folder), str(ROOT), str(Path.home())):
        if private in text:
            raise SystemExit(f"the demo printed {private}, a path of this machine; print paths relative to --out")
    return text


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        try:
            output = plain(run_demo(folder), folder)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{error.output}\nthe demo failed with exit code {error.returncode}") from None
    TARGET.parent.mkdir(exist_ok=True)
    temporary = TARGET.with_name(f".{TARGET.name}.tmp")
    temporary.write_text(PAGE.format(marker=MARKER, command=COMMAND, output=output), encoding="utf-8")
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
