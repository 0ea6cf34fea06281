"""What FUSION computes, written once over a small set of operations, and their eager interpreter."""
