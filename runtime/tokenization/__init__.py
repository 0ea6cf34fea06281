"""Text to token ids and back: checked tokenizers, a text encoder, a streaming detokenizer, token embeddings."""
