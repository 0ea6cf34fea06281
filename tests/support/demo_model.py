"""The demo model's picture, and questions about it with their answers."""

from support.paths import DEMO_CHECKPOINT

PICTURE = DEMO_CHECKPOINT.parent / "picture.png"
QUESTION, ANSWER = "What is at the top right?", "elephant"
OTHER_QUESTION, OTHER_ANSWER = "Where is the dog?", "middle right"
BACKGROUND_QUESTION = "What color is the background?"
PLACE_QUESTION, OTHER_PLACE_QUESTION = "Where is the cat?", OTHER_QUESTION
PLACES = ("top left", "top right", "bottom left", "bottom right")
PRESENCE_QUESTIONS = ("Is there a cat?", "Is there a violin?", "Is there a bus?")
