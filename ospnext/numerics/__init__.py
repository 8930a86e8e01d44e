"""Number formats, from their definitions. No operator, no model and no device lives here."""

from ospnext.numerics import carrier, hif8, scaling

__all__ = ["carrier", "hif8", "scaling"]
