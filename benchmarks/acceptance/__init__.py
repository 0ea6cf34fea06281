"""Checks of everything that needs a GPU, in one command for the first person who has one."""
