"""Ask a bundle questions about a picture and print the answers as they are generated.

python examples/ask_picture.py BUNDLE PICTURE "How many people are there?" "What are they doing?"
"""

from __future__ import annotations

import argparse

import fusion_edge


def main() -> None:
    """Ask every question in one conversation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle")
    parser.add_argument("picture")
    parser.add_argument("questions", nargs="+")
    arguments = parser.parse_args()

    with fusion_edge.load(arguments.bundle) as fusion:
        conversation = fusion.conversation(arguments.picture)
        for question in arguments.questions:
            for piece in conversation.ask(question):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    main()
