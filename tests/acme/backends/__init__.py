"""A vendor's own package of this name, next to which `ospnext.backends` must still be found."""
