"""From rows to what people look at: pages.py for files, tables.py, plots.py by drawing.py."""
