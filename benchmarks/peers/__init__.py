"""Peers that live in an environment of their own, each run by a script that this project's environment talks to."""
