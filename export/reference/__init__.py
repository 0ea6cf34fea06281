"""The reference that backends and bundles are compared with."""
