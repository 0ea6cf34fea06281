"""FUSION's LLM and vision encoder side by side with other runtimes."""
