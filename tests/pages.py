"""Tables in docs/ that a run rewrites: where it ran, and the text between two markers."""

import re
from datetime import date
from pathlib import Path


def machine() -> str:
    """Date, machine and versions, for the head of a table."""
    import torch
    import transformers

    from lmssl import machine as hardware
    from lmssl import output

    found = output.environment(hardware.device())
    return f"{date.today()}, {found['device']}, Python {found['python']}, torch {torch.__version__}, transformers {transformers.__version__}"


def rewrite(page: Path, begin: str, end: str, text: str) -> None:
    """Put `text` between the markers of a page; the rest stays."""
    body = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n\n{text}\n\n{end}", page.read_text(), flags=re.DOTALL)
    page.write_text(body)
