"""Ask one question about every picture of a folder and write the answers as JSON lines.

python examples/folder_to_jsonl.py BUNDLE FOLDER "What is in the picture?" > answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import fusion_edge

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def main() -> None:
    """Write one line a picture; a picture that cannot be read is reported and skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("question")
    arguments = parser.parse_args()

    pictures = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in PICTURES)
    with fusion_edge.load(arguments.bundle) as fusion:
        for picture in pictures:
            try:
                answer = fusion.answer(picture, arguments.question)
            except fusion_edge.FusionError as error:
                print(error, file=sys.stderr)
                continue
            line = {"image": picture.name, "answer": answer.text, "finish_reason": answer.finish_reason}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
