"""Constrained answers: grammars, and masks of the tokens that a grammar allows."""
