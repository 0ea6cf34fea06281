"""``fusion-export --push-to-hub``: publish a bundle on the Hugging Face hub."""
