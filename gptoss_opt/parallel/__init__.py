"""A model over several ranks: what of it is spread how, and where the ranks meet."""
