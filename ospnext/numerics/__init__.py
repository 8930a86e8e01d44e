"""Number formats, from their definitions. No operator, no model and no device lives here."""

from ospnext.numerics import hif8, scaling

__all__ = ["hif8", "scaling"]
