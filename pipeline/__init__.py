"""The stages put together: one configuration, one run, progress on the screen, the report."""
