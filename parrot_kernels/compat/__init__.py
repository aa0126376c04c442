"""Drop-in signatures of other packages."""
