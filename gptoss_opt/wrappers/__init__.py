"""One file per public wrapper. Wrappers never import each other."""
