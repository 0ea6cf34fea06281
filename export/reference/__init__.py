"""Reference: the eager interpreter as a backend, and the weights of a bundle."""
