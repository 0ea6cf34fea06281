"""An OpenAI-compatible HTTP server: whatever speaks OpenAI's API asks a bundle about images. Needs the extra ``serve``."""
