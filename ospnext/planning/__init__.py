"""What a number of devices would do with a model: layouts, memory, bytes, predicted time. Nothing runs here."""
