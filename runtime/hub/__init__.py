"""Bundles on the Hugging Face hub: the only files of the runtime that use ``huggingface_hub`` (extra ``hub``)."""
