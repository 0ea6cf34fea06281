"""The FUSION model, written once over a small set of operations, and its eager interpreter."""
