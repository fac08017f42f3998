"""Bundle -> running service; never imports torch."""
