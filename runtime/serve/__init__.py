"""An OpenAI-compatible HTTP server, so whatever speaks OpenAI's API asks a bundle. Needs the extra ``serve``."""
