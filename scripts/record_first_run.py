"""Record the demo as plain text in docs/first-run.md.

    python scripts/record_first_run.py

Runs the demo as `make demo` does, in a terminal of 100 columns without colours, and writes down what it printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def run_demo() -> str:
    """The demo's standard output and errors together; raises CalledProcessError when it fails."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "softprompt.demo", "--out", "runs/demo"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=True,
    ).stdout


def plain(output: str) -> str:
    """What is left on the screen: no escape sequences, no overwritten progress, no path of this machine."""
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in output.split("\n")]
    text = "\n".join(lines).strip("\n")
    for private in (str(ROOT), str(Path.home())):
        if private in text:
            raise SystemExit(f"the demo printed {private}, a path of this machine; it must print relative ones")
    return text


def main() -> None:
    try:
        output = plain(run_demo())
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{error.output}\nthe demo failed with exit code {error.returncode}") from None
    TARGET.parent.mkdir(exist_ok=True)
    temporary = TARGET.with_name(f".{TARGET.name}.tmp")
    temporary.write_text(PAGE.format(marker=MARKER, command=COMMAND, output=output), encoding="utf-8")
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()
