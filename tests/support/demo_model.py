"""The demo model's picture, and questions about it with their answers."""

from support.paths import DEMO_CHECKPOINT

PICTURE = DEMO_CHECKPOINT.parent / "picture.png"
QUESTION, ANSWER = "What color is the circle?", "blue"
COUNT_QUESTION, COUNT = "How many shapes are there?", "two"
PLACE_QUESTION, OTHER_PLACE_QUESTION = "Where is the circle?", "Where is the square?"
PLACES = ("top left", "top right", "bottom left", "bottom right")
PRESENCE_QUESTIONS = ("Is there a circle?", "Is there a cross?", "Is the circle red?")
